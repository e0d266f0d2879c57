"""Two launches of one sweep of twelve trials, which are killed, and so are their trials."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TRIALS = ("model=rwkv4,gpt", "size=pico", "seed=range(6)")


class Storm:
    """A suite under two launchers.

    Args:
        folder: where the suite and its log are.
        fit: the script that trains a trial.
        overrides: of conf/train.yaml.
    """

    def __init__(self, folder: Path, fit: Path, *overrides: str) -> None:
        self.suite, self.log = folder / "runs" / "s", folder / "log"
        self.log.touch()
        self.given = [
            *TRIALS,
            "suite=s",
            f"paths.runs={folder / 'runs'}",
            "trainer=cpu",
            *overrides,
        ]
        command = [sys.executable, str(fit)]
        self.code = (
            "from experiments import train; from experiments.sweeps import trial; "
            f"trial.COMMAND = {command!r}; train.main()"
        )

    def start(self, *overrides: str) -> subprocess.Popen[bytes]:
        """Launch the sweep."""
        environment = {"FAKE_LOG": str(self.log), "FAKE_DEEDS": '{"": 0.6}', "OMP_NUM_THREADS": "1"}
        with open(self.log.with_name("output"), "ab") as output:
            return subprocess.Popen(
                [sys.executable, "-c", self.code, "-m", *self.given, *overrides],
                cwd=ROOT,
                env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=output,
            )

    def events(self, kind: str) -> list[tuple[str, int]]:
        """Runs and process ids of the log's lines of one kind."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [(run, int(pid)) for event, run, pid in lines if event == kind]

    def training(self, within_s: float) -> list[int]:
        """Process ids of the trials in training, as soon as there are any."""
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            if trials := [pid for _, pid in self.events("start") if alive(pid)]:
                return trials
            time.sleep(0.02)
        return []

    def blow(self, n_kills: int, pause_s: float) -> Counter[str]:
        """Keep two launches running and kill a launcher or a trial now and then, until that was
        done `n_kills` times; then let one launch end. Returns what was killed how often."""
        draw, counts = random.Random(n_kills), Counter[str]()
        launchers = [self.start(), self.start("jobs=2")]
        try:
            while counts.total() < n_kills:
                time.sleep(draw.uniform(0, pause_s))
                for i, launcher in enumerate(launchers):
                    if launcher.poll() is not None and counts.total() < n_kills:
                        launchers[i] = self.start("jobs=2") if i else self.start()
                number = draw.choice(SIGNALS)
                if draw.random() < 0.6:
                    if trials := self.training(within_s=20 * pause_s):
                        with suppress(ProcessLookupError):
                            os.kill(draw.choice(trials), number)
                        counts[f"trial {number.name}"] += 1
                elif (one := draw.choice(launchers)).poll() is None:
                    one.send_signal(number)
                    counts[f"launcher {number.name}"] += 1
                if len(list(self.suite.glob("*/*/result.json"))) == 12:
                    break
            for launcher in launchers:
                launcher.wait(timeout=1800)
            last = self.start("jobs=2")
            assert last.wait(timeout=1800) == 0, self.log.with_name("output").read_text()[-3000:]
        finally:
            for launcher in launchers:
                launcher.kill()
        return counts

    def check(self) -> None:
        """Every trial has a result, none was trained by two at once, or again when it was done."""
        assert len(list(self.suite.glob("*/*/config.yaml"))) == 12
        assert len(list(self.suite.glob("*/*/result.json"))) == 12
        assert not self.events("twice")
        assert not self.events("again")
        done = Counter(run for run, _ in self.events("done"))
        assert not done or max(done.values()) == 1
        assert not list(self.suite.glob("*/*/error.txt"))
        assert not list(self.suite.glob("*/*/.config.yaml.*"))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def storm(tmp_path: Path) -> Callable[..., Storm]:
    """Make a `Storm` in the test's folder, with its trials frozen."""

    def make(fit: Path, *overrides: str) -> Storm:
        made = Storm(tmp_path, fit, *overrides)
        assert made.start("dry_run=true").wait(timeout=300) == 0
        return made

    return make
