"""Train one run, or with ``-m`` (or an experiment's own grid) many.

Every run is frozen into its directory first and trained in a fresh process from there. The same
command again skips what is finished, goes on with what is not, and refuses what differs.
"""

import contextlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.config import check_config
from experiments.entry import REPORTED, entry, one_line
from experiments.run_dir import RunDir
from experiments.sweep import Outcome

# exit codes of a run that was told to stop: after it saved, or before it could
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)


def train(cfg: DictConfig, overrides: Sequence[str]) -> Outcome:
    """Bring one run to its end, in a process of its own.

    Raises:
        ValueError: if the run cannot be frozen, or its folder belongs to another config.
        KeyboardInterrupt: if it was stopped by a signal.
    """
    if cfg.data.vocab_size is None:  # the tokenizer file knows it
        from experiments.data.prepare import prepare
        from experiments.data.token_data import TokenData

        cfg.data.vocab_size = TokenData.open(prepare(cfg.data)).vocab_size
    check_config(cfg)
    run = RunDir.freeze(cfg, overrides)
    if run.finished:
        print(f"{run.name}: finished already", flush=True)
        return Outcome(str(run.path), "skipped")
    code = run_child([sys.executable, "-m", "experiments.fit", str(run.path)])
    if code == 0:
        return Outcome(str(run.path), "done")
    if code in STOPPED:
        raise KeyboardInterrupt
    error_file = run.path / "error.txt"
    if code < 0:
        reason = f"training was killed by signal {-code}"
        reason += " (the system was out of memory?)" if -code == signal.SIGKILL else ""
        print(f"error: {reason}; the same command goes on", file=sys.stderr, flush=True)
        return Outcome(str(run.path), "failed", reason, 1)
    reason = f"training ended with exit code {code}"
    if error_file.is_file():  # its first line; the process has printed it too
        reason = error_file.read_text(encoding="utf-8").partition("\n")[0]
    if code == 2 and not run.manifest:
        shutil.rmtree(run.path)  # bad input, nothing trained: leave nothing behind
        with contextlib.suppress(OSError):  # nor an empty folder of this model
            run.path.parent.rmdir()
    return Outcome(str(run.path), "failed", reason, code)


def run_child(command: list[str]) -> int:
    """Run a command to its end and return its exit code; it is told of our SIGTERM."""
    child = subprocess.Popen(command)
    previous = signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    try:
        return child.wait()
    except KeyboardInterrupt:  # the terminal told the child too; it saves and leaves
        return child.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)


@entry("train")
def main(cfg: DictConfig) -> Outcome:
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    if hydra.mode == RunMode.MULTIRUN:
        try:
            return train(cfg, overrides)
        except REPORTED as error:  # the other jobs go on
            label = ",".join(overrides)
            print(f"error: {label}: {one_line(error)}", file=sys.stderr, flush=True)
            return Outcome(label, "failed", one_line(error))
    outcome = train(cfg, overrides)
    if outcome.exit_code:
        sys.exit(outcome.exit_code)
    return outcome


if __name__ == "__main__":
    main()
