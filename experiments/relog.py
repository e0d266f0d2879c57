"""Fill loggers after training: ``python -m experiments.relog run=GLOB logger=wandb``.

For runs that were trained without a logger, or whose logger failed at the end. What a logger has
already is not logged twice.
"""

import sys

from omegaconf import DictConfig

from experiments.config.entry import RunFailed, as_typed, entry
from experiments.config.identity import plain
from experiments.runs.run_dir import find_runs, open_external
from experiments.system.locks import RunLocked


def relog(cfg: DictConfig) -> None:
    """Log the rows of metrics.csv of each run that conf/relog.yaml's keys name.

    Raises:
        FileNotFoundError, ValueError: if there is no such run, or no logger was chosen.
        RunFailed: if a logger failed, once all runs were tried.
    """
    from experiments.training.loggers import make_loggers

    pattern = plain(cfg)["run"]
    failed = []
    for run in find_runs(pattern if isinstance(pattern, list) else str(pattern)):
        if not run.metrics_file.is_file():
            print(f"{run.path}: no metrics.csv, skipped")
            continue
        cfg.suite = open_external(run.path).config.suite
        loggers = make_loggers(cfg, run)
        if loggers is None:
            raise ValueError("say where to log: logger=tensorboard, logger=wandb or logger=mlflow")
        try:
            with run.lock():
                loggers.log_metrics({})
                loggers.finalize("success" if run.finished else "failed")
        except RunLocked as error:
            print(f"error: {error}: it logs by itself", file=sys.stderr)
            failed.append(str(run.path))
            continue
        failed += [f"{run.path} ({name})" for name in loggers.failed]
        if not loggers.failed:
            print(f"{run.path}: logged")
    if failed:
        raise RunFailed(f"not logged, for the reasons above: {', '.join(failed)}")


def main() -> None:
    typed, sys.argv[1:] = as_typed(sys.argv[1:], ("run",))

    @entry("relog")
    def task(cfg: DictConfig) -> None:
        cfg.merge_with(typed)
        relog(cfg)

    task()


if __name__ == "__main__":
    main()
