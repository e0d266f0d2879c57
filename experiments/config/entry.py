"""What every command line entry shares: Hydra composes conf/<name>.yaml, and an error is one line.

Exit codes: 0 done, 1 a run failed, 2 bad input, 130 or 143 stopped by SIGINT or
SIGTERM, 75 saved and to be requeued. That of a sweep says how many of its trials failed.
Set HYDRA_FULL_ERROR=1 to see tracebacks.
"""

import functools
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

ONE_LINE = "RWKV_PARITY_ONE_LINE_ERRORS"
CONF_DIR = Path(__file__).resolve().parents[2] / "conf"


class RunFailed(Exception):
    """A run failed for a reason already reported; the entry exits with code 1."""


REPORTED = (
    RunFailed,
    ValueError,
    OSError,
    ImportError,
    HydraException,
    OmegaConfBaseException,
)


def one_line(error: BaseException) -> str:
    """The message of an error (and of the cause that Hydra wrapped), as one line."""
    parts = [str(error)]
    if isinstance(error, (HydraException, OmegaConfBaseException)) and error.__cause__:
        parts.append(str(error.__cause__))
    text = " ".join(" ".join(parts).split())
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        text = f"{error.strerror}: {error.filename}"
    if "'hydra/launcher/submitit_" in text:  # an optional package brings it
        text = "hydra/launcher=slurm and submitit_local need pip install -e '.[slurm]'"
    return text or type(error).__name__


def fail(message: str, code: int) -> None:
    """Print one error line and leave with the exit code."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Within it, bad input ends the process with one line and exit code 2, not a traceback."""
    # Hydra would print and exit by itself; asked for full errors it hands them to us instead. The
    # second variable tells this process's children that the user did not ask.
    if os.environ.get("HYDRA_FULL_ERROR") != "1":
        os.environ["HYDRA_FULL_ERROR"] = os.environ[ONE_LINE] = "1"
    try:
        yield
    except Exception as error:
        if ONE_LINE not in os.environ or not isinstance(error, REPORTED):
            raise
        fail(one_line(error), 1 if isinstance(error, RunFailed) else 2)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def entry(name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Decorator: turn ``task(cfg)`` into a command line entry configured by conf/<name>.yaml."""

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def guarded(cfg: DictConfig) -> Any:
            with one_line_errors():  # here, or Hydra would add lines of its own
                return task(cfg)

        composed = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=name)

        def main() -> None:
            with one_line_errors():
                composed(guarded)()

        return main

    return decorate


def as_typed(
    arguments: list[str], keys: Collection[str], many: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Split texts and paths, which are not meant to be Hydra's grammar, from other arguments.

    There a text would have to be quoted twice and could not hold a line end, nor a path a comma,
    which the names of runs have. Of the `keys` given, those of `many` may come more than once, and
    all but a prompt stays Hydra's if it is null, quoted or a list.
    """
    typed: dict[str, Any] = {}
    others = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        is_hydras = key != "prompt" and (value == "null" or value[:1] in ("[", "'", '"'))
        if not equals or key not in keys or is_hydras:
            others.append(argument)
        elif key in many:
            typed.setdefault(key, []).append(value)
        else:
            typed[key] = value
    return typed, [*others, *(f"{key}=null" for key in typed)]
