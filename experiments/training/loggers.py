"""Loggers beside ``metrics.csv``: Lightning's own for TensorBoard, Weights & Biases and MLflow.

Each is opened under the identity of its run and given every row of the file that it lacks; then it
follows. So a resumed run is one run there, and one whose logger failed catches up when it works
again. A failure is reported once and retried; training continues.
"""

import hashlib
import importlib.util
import os
import shutil
import sys
import time
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig

from experiments.config.identity import flatten, plain
from experiments.runs.metrics import MetricsFile
from experiments.runs.run_dir import RunDir

RETRY_S = 60.0  # between attempts to reach a logger that failed


class TensorBoard(TensorBoardLogger):
    """Event files in ``tensorboard/`` of the run, written from the first row at every start."""

    SETTINGS: tuple[str, ...] = ()  # what a config may set; of no logger an address

    def __init__(self, run: RunDir, **settings: Any) -> None:
        shutil.rmtree(run.path / "tensorboard", ignore_errors=True)
        # a TensorBoard that is watching forgets what it has read from step 0 on
        super().__init__(run.path, "", "tensorboard", purge_step=0)

    def has(self, key: str, step: int) -> bool:
        return False

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        self.experiment.flush()


class WandB(WandbLogger):
    """A run of Weights & Biases, of the same id in every start.

    Offline, the newest folder in ``wandb/`` holds all of the run, and `wandb sync` finds no other:
    folders of earlier starts go to ``wandb/superseded/``. Online, W&B takes each step once: of one
    where a run was stopped before its validation it has the training row alone.
    """

    SETTINGS = ("project", "entity", "group", "job_type", "tags", "notes")

    def __init__(self, run: RunDir, **settings: Any) -> None:
        folder = run.path / "wandb"
        for earlier in sorted(folder.glob("offline-run-*")):
            (folder / "superseded").mkdir(exist_ok=True)
            earlier.rename(folder / "superseded" / earlier.name)
        again: Any = {"id": identity(run), "resume": "allow", "reinit": "create_new"}
        super().__init__(name=run.name, save_dir=run.path, **again, **settings)
        self.first_step = self.experiment.step  # online it is the one after the last that W&B has

    def has(self, key: str, step: int) -> bool:
        return step < self.first_step

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    def finalize(self, status: str) -> None:
        self.experiment.finish(exit_code=0 if status == "success" else 1)


class MLflow(MLFlowLogger):
    """A run of MLflow, found again by a tag.

    MLFLOW_TRACKING_URI says where it is; by default in mlflow.db beside the suites.
    """

    SETTINGS = ("experiment_name",)
    TAG = "rwkv_parity.identity"

    def __init__(self, run: RunDir, experiment_name: str) -> None:
        beside = run.path.resolve().parents[2] / "mlflow.db"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{beside}"
        tags = {self.TAG: identity(run)}
        super().__init__(str(experiment_name), run.name, uri, tags)
        client = self._mlflow_client
        self.last_steps: dict[str, int] = {}
        if found := client.get_experiment_by_name(str(experiment_name)):
            of_run = f"tags.`{self.TAG}` = '{identity(run)}'"
            for before in client.search_runs([found.experiment_id], of_run)[:1]:
                self._run_id = before.info.run_id
                client.update_run(self._run_id, status="RUNNING")
                for key in before.data.metrics:
                    history = client.get_metric_history(self._run_id, key)
                    self.last_steps[key] = max(metric.step for metric in history)

    def has(self, key: str, step: int) -> bool:
        return step <= self.last_steps.get(key, -1)


CLASSES: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


class Loggers(Logger):
    """All loggers of a run, to Lightning one. Only the process that calls `log_metrics` has any."""

    def __init__(self, run: RunDir, settings: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.run, self.settings = run, settings
        self.open: dict[str, Any] = {}
        self.retry_at = dict.fromkeys(settings, -1.0)
        self.failed: set[str] = set()

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: every logger gets the run's config when it is opened."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log a row that ``metrics.csv`` has already."""
        for name in self.settings:
            if time.monotonic() >= self.retry_at[name]:
                try:
                    if name in self.open:
                        send(self.open[name], metrics, step or 0)
                    else:
                        self.open[name] = self.opened(name)
                except Exception as error:  # whatever a service throws
                    self.report(name, error)

    def opened(self, name: str) -> Any:
        """A logger that has all rows of the file."""
        logger = CLASSES[name](self.run, **self.settings[name])
        logger.log_hyperparams(flatten(plain(self.run.config)))
        for row in MetricsFile(self.run.metrics_file).rows():
            measured = {key: float(value) for key, value in row.items() if value}
            send(logger, measured, int(row["step"]))
        return logger

    def report(self, name: str, error: Exception) -> None:
        self.open.pop(name, None)
        self.retry_at[name] = time.monotonic() + RETRY_S
        if name not in self.failed:
            self.failed.add(name)
            print(
                f"warning: logger {name} failed ({' '.join(str(error).split())[:300]}): training "
                "continues, metrics.csv has everything, and the logger is retried",
                file=sys.stderr,
                flush=True,
            )

    def finalize(self, status: str) -> None:
        """End; a logger that failed is tried a last time, if the run is done and so has time."""
        if status == "success" and self.failed:
            self.retry_at.update(dict.fromkeys(self.failed - self.open.keys(), -1.0))
            self.log_metrics({}, 0)
        for name, logger in list(self.open.items()):
            try:
                logger.finalize(status)
            except Exception as error:
                self.report(name, error)


def send(logger: Any, row: dict[str, float], step: int) -> None:
    """Log what a logger lacks of a row."""
    if values := {key: value for key, value in row.items() if not logger.has(key, step)}:
        logger.log_metrics(values, step)


def make_loggers(cfg: DictConfig, run: RunDir) -> Loggers | None:
    """The loggers that a run's config names, not opened yet; None if it names none.

    Raises:
        ValueError: for one that does not exist, or a setting that it does not have.
        ModuleNotFoundError: if its package is not installed.
    """
    settings = plain(cfg.execution.logger)
    for name, given in settings.items():
        if name not in CLASSES:
            raise ValueError(f"logger {name!r} is unknown: choose {', '.join(CLASSES)}")
        if unknown := sorted(given.keys() - set(CLASSES[name].SETTINGS)):
            known = ", ".join(CLASSES[name].SETTINGS) or "none"
            raise ValueError(f"logger.{name} has no setting {unknown[0]!r}; it has: {known}")
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"logger={name} needs: pip install -e '.[{name}]'")
    return Loggers(run, settings) if settings else None


def identity(run: RunDir) -> str:
    """The run's id for services that keep many: of this directory's name and first start."""
    first = f"{run.name}/{run.manifest.get('created')}"
    return hashlib.sha256(first.encode()).hexdigest()[:12]
