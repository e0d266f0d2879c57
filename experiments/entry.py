"""What every command line entry shares: Hydra composes conf/<name>.yaml, and an error is one line.

Exit codes: 0 done, 1 a run failed, 2 bad input, 130 interrupted.
Set HYDRA_FULL_ERROR=1 to see tracebacks.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"


class RunFailed(Exception):
    """A run failed for a reason already reported; the entry exits with code 1."""


def one_line(error: BaseException) -> str:
    """The message of an error (and of the cause that Hydra wrapped), as one line."""
    parts = [str(error)]
    if isinstance(error, (HydraException, OmegaConfBaseException)) and error.__cause__:
        parts.append(str(error.__cause__))
    text = " ".join(" ".join(parts).split())
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        text = f"{error.strerror}: {error.filename}"
    return text or type(error).__name__


def fail(message: str, code: int) -> None:
    """Print one error line and leave with the exit code."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def guard(function: Callable[[], Any]) -> None:
    """Run a command line entry: bad input becomes one line and exit code 2, not a traceback."""
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra would print and exit by itself; asked for full errors it hands them to us instead
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        function()
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except RunFailed as error:
        if full_error:
            raise
        fail(str(error), 1)
    except (ValueError, OSError, ImportError, HydraException, OmegaConfBaseException) as error:
        if full_error:
            raise
        fail(one_line(error), 2)


def entry(name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Decorator: turn ``task(cfg)`` into a command line entry configured by conf/<name>.yaml."""

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        composed = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=name)

        def main() -> None:
            guard(composed(task))

        return main

    return decorate
