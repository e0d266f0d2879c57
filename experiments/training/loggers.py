"""Loggers beside ``metrics.csv``: TensorBoard, Weights & Biases, MLflow.

Each follows the file: it is given every row that it does not have yet, so a resumed run goes on
under the same identity, what was lost in a crash is filled in, and one that failed is brought up to
date as soon as it works again. None of them can end the training.
"""

import csv
import fcntl
import hashlib
import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import DictConfig

from experiments.config.identity import flatten, plain
from experiments.runs.metrics import COLUMNS
from experiments.runs.run_dir import RunDir

RETRY_S = 60.0  # least time between attempts to reach a logger that failed


class Service(Protocol):
    """What one logger must do. Any of it may raise anything."""

    def open(self) -> None:
        """Begin, or go on, under the identity of the run; the whole file is logged after it."""

    def log(self, step: int, values: dict[str, float], wall: float) -> None:
        """Take a row; twice the same step is once for training and once for validation.

        wall is the time of the row in seconds since 1970, without the pauses between starts.
        """

    def close(self, exit_code: int) -> None:
        """End, or pause, with the exit code that the process is going to have."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run, written anew from metrics.csv by every start."""

    PACKAGE, KEYS = "tensorboard", ()

    def __init__(self, run: RunDir, settings: dict[str, Any]) -> None:
        self.run = run

    def open(self) -> None:
        shutil.rmtree(self.run.path / "tensorboard", ignore_errors=True)
        # a TensorBoard that is watching forgets what it has read from step 0 on
        self.logger = TensorBoardLogger(self.run.path, "", "tensorboard", purge_step=0)
        self.logger.log_hyperparams(plain(self.run.config))

    def log(self, step: int, values: dict[str, float], wall: float) -> None:
        writer = self.logger.experiment
        for key, value in values.items():
            writer.add_scalar(key, value, step, walltime=wall)
        writer.flush()

    def close(self, exit_code: int) -> None:
        self.logger.experiment.close()


class WandB:
    """A run of Weights & Biases, of the same id in every start.

    Offline, the newest folder in ``wandb/`` holds all of the run, and `wandb sync` finds no other:
    folders of earlier starts go to ``wandb/superseded/``. Online, W&B takes each step once: of one
    where a run was stopped before its validation it has the training row alone.
    """

    PACKAGE, KEYS = "wandb", ("project", "entity", "group", "job_type", "tags", "notes")

    def __init__(self, run: RunDir, settings: dict[str, Any]) -> None:
        self.run, self.settings = run, settings

    def open(self) -> None:
        import wandb

        folder = self.run.path / "wandb"
        for earlier in sorted(folder.glob("offline-run-*")):
            (folder / "superseded").mkdir(exist_ok=True)
            earlier.rename(folder / "superseded" / earlier.name)
        self.experiment = wandb.init(
            dir=str(self.run.path),
            id=identity(self.run),
            name=self.run.name,
            resume="allow",
            reinit="create_new",
            config=plain(self.run.config),
            **self.settings,
        )
        self.first_step = self.experiment.step  # online it is the one after the last that W&B has

    def log(self, step: int, values: dict[str, float], wall: float) -> None:
        if step >= self.first_step:
            self.experiment.log(values, step=step)

    def close(self, exit_code: int) -> None:
        self.experiment.finish(exit_code=exit_code)


class MLflow:
    """A run of MLflow, found again by a tag; it takes each value once.

    MLFLOW_TRACKING_URI says where it is; by default in mlflow.db beside the suites.
    """

    PACKAGE, KEYS = "mlflow", ("experiment_name",)
    TAG = "rwkv_parity.identity"

    def __init__(self, run: RunDir, settings: dict[str, Any]) -> None:
        self.run, self.name = run, str(settings["experiment_name"])

    def open(self) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        runs = self.run.path.resolve().parents[2]
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs / 'mlflow.db'}"
        # runs that start together would make the data base, or the experiment, twice
        with open(runs / ".mlflow.lock", "a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.client = MlflowClient(uri)
            found = self.client.get_experiment_by_name(self.name)
            experiment = found.experiment_id if found else self.client.create_experiment(self.name)
        tag = identity(self.run)
        before = self.client.search_runs([experiment], f"tags.`{self.TAG}` = '{tag}'")
        if before:
            self.id = before[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            made = self.client.create_run(experiment, tags={self.TAG: tag}, run_name=self.run.name)
            self.id = made.info.run_id
        known = before[0].data.params if before else {}
        params = flatten(plain(self.run.config))
        new = [Param(k, str(v)[:500]) for k, v in params.items() if k not in known]
        for first in range(0, len(new), 100):  # it takes no more at once
            self.client.log_batch(self.id, params=new[first : first + 100])
        self.last_steps: dict[str, int] = {}
        for key in before[0].data.metrics if before else ():
            history = self.client.get_metric_history(self.id, key)
            self.last_steps[key] = max(metric.step for metric in history)

    def log(self, step: int, values: dict[str, float], wall: float) -> None:
        from mlflow.entities import Metric

        new = [
            Metric(key, value, int(wall * 1000), step)
            for key, value in values.items()
            if step > self.last_steps.get(key, -1)
        ]
        if new:
            self.client.log_batch(self.id, metrics=new)
        self.last_steps |= {metric.key: step for metric in new}

    def close(self, exit_code: int) -> None:
        stopped = exit_code not in (0, 1)
        status = "KILLED" if stopped else "FAILED" if exit_code else "FINISHED"
        self.client.set_terminated(self.id, status)


SERVICES: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


class Follower:
    """Brings one service up to date with metrics.csv, now or, if it fails, later."""

    def __init__(self, name: str, service: Service, metrics: Path) -> None:
        self.name, self.service, self.metrics = name, service, metrics
        self.offset: int | None = None  # bytes of metrics.csv that the service has; None: closed
        self.retry_at = -1.0
        self.told = False

    def follow(self) -> None:
        """Log the rows that came since the last time."""
        start = time.monotonic()
        if start < self.retry_at:
            return
        try:
            if self.offset is None:
                self.service.open()
                self.offset = 0
            rows, end = rows_from(self.metrics, self.offset)
            if self.offset == 0 and rows:
                self.zero = time.time() - rows[-1]["time_s"]
            for row in rows:
                step, wall = int(row.pop("step")), self.zero + row["time_s"]
                self.service.log(step, row, wall)
            self.offset = end
        except Exception as error:  # whatever a service throws: training and the others go on
            self.failed(error, time.monotonic() - start)

    def failed(self, error: Exception, took_s: float) -> None:
        self.offset = None
        self.retry_at = time.monotonic() + max(RETRY_S, 20 * took_s)
        if not self.told:
            print(
                f"warning: logger {self.name} failed ({' '.join(str(error).split())[:300]}): "
                "training goes on, metrics.csv has everything, and the logger is tried again",
                file=sys.stderr,
                flush=True,
            )
            self.told = True

    def close(self, exit_code: int) -> None:
        """Log what is left and end; after a failure only if the run is done, and so has time."""
        if exit_code == 0:
            self.retry_at = -1.0
        self.follow()
        if self.offset is not None:
            try:
                self.service.close(exit_code)
            except Exception as error:
                self.failed(error, 0.0)


class Loggers(Logger):
    """All loggers of a run, to Lightning one. Only the process that calls `log_metrics` has any."""

    def __init__(self, followers: list[Follower]) -> None:
        super().__init__()
        self.followers = followers
        self.has_begun = False

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: every service logs the run's config by itself."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Bring every service up to date; the rows are read from metrics.csv."""
        self.has_begun = True
        for follower in self.followers:
            follower.follow()

    def finalize(self, status: str) -> None:
        """End, with Lightning's "success" or "failed"; being told to stop is neither."""
        error = sys.exception()
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        for follower in self.followers if self.has_begun else ():
            follower.close(0 if status == "success" else code)


def make_loggers(cfg: DictConfig, run: RunDir) -> Loggers | None:
    """The loggers that a run's config names, not begun yet; None if it names none.

    Raises:
        ValueError: for one that does not exist, or a setting that it does not have.
        ModuleNotFoundError: if its package is not installed.
    """
    followers = []
    for name, settings in plain(cfg.execution.logger).items():
        if name not in SERVICES:
            raise ValueError(f"logger {name!r} is unknown: choose {', '.join(SERVICES)}")
        service = SERVICES[name]
        unknown = sorted(settings.keys() - set(service.KEYS))
        if unknown:
            known = ", ".join(service.KEYS) or "none"
            raise ValueError(f"logger.{name} has no setting {unknown[0]!r}; it has: {known}")
        if importlib.util.find_spec(service.PACKAGE) is None:
            raise ModuleNotFoundError(f"logger={name} needs: pip install -e '.[{name}]'")
        followers.append(Follower(name, service(run, settings), run.path / "metrics.csv"))
    return Loggers(followers) if followers else None


def identity(run: RunDir) -> str:
    """The run's id for services that keep many: of this directory's name and first start."""
    first = f"{run.name}/{run.manifest.get('created')}"
    return hashlib.sha256(first.encode()).hexdigest()[:12]


def rows_from(metrics: Path, offset: int) -> tuple[list[dict[str, float]], int]:
    """The whole rows of metrics.csv from a byte on, without empty cells, and the byte they end at.

    An ``offset`` of 0 passes over the line of names.
    """
    with open(metrics, "rb") as file:
        file.seek(offset)
        text = file.read()
    text = text[: text.rfind(b"\n") + 1]
    lines = text.decode().splitlines()[1 if offset == 0 else 0 :]
    rows = csv.DictReader(lines, COLUMNS)
    return [{k: float(v) for k, v in row.items() if v} for row in rows], offset + len(text)
