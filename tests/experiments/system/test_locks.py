"""Leases: of killed, suspended and far holders."""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments.system import locks
from experiments.system.locks import RunLocked, holder, holding

HOLD = """
import sys, time
from pathlib import Path
from experiments.system import locks
locks.BEAT_S, locks.LEASE_S = 0.1, float(sys.argv[2])
with locks.holding(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
print("released", flush=True)
"""
ROOT = Path(__file__).resolve().parents[3]


def hold_elsewhere(file: Path, lease_s: float = 100.0) -> subprocess.Popen[str]:
    """A process that holds a lease."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file), str(lease_s)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


def far_lease(file: Path, lease_s: float) -> None:
    """What a process of another machine has left."""
    file.write_text(
        f"filelock/2\npid=7\nhost=far\nmode=lease\ntoken=ab\nduration={lease_s!r}\nstart=1\n"
    )


def test_a_lease_is_free_the_moment_its_holder_is_killed(file: Path) -> None:
    child = hold_elsewhere(file)
    try:
        who = rf"another process is at .*\({platform.node()}, process {child.pid}\)"
        with pytest.raises(RunLocked, match=who), holding(file):
            pass
        seen = holder(file)
        assert seen is not None
        assert seen.pid == child.pid
    finally:
        child.kill()
        child.communicate(timeout=20)
    assert holder(file) is None
    with holding(file):
        seen = holder(file)
        assert seen is not None
        assert seen.pid == os.getpid()
    assert holder(file) is None


def test_another_machines_lease_counts_until_it_was_watched_to_be_dead(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.1)
    monkeypatch.setattr(locks, "LEASE_S", 1.0)
    far_lease(file, 1.0)
    with pytest.raises(RunLocked, match="far, process 7"), holding(file):
        pass
    os.utime(file, (0, 0))  # a clock that is wrong by decades
    start = time.monotonic()
    with holding(file, wait=True):
        assert time.monotonic() - start > 0.9


def test_a_living_lease_of_another_machine_is_not_waited_for(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.1)
    monkeypatch.setattr(locks, "LEASE_S", 3.0)
    far_lease(file, 3.0)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(file)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        start = time.monotonic()
        with pytest.raises(RunLocked), holding(file, wait=True):
            pass
        assert time.monotonic() - start < 2.5
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
def test_a_suspended_holder_that_was_overtaken_ends_at_once(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.1)
    monkeypatch.setattr(locks, "LEASE_S", 1.0)
    child = hold_elsewhere(file, 1.0)
    try:
        child.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 20
        ours = locks.lease(file)
        ours.acquire(timeout=20)
        assert time.monotonic() < deadline
        child.send_signal(signal.SIGCONT)
        out, err = child.communicate(timeout=20)
        ours.release()
    finally:
        child.kill()
    assert child.returncode == 1
    assert "was taken over by another process" in err
    assert "released" not in out


def test_a_folder_that_was_removed_ends_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    folder = tmp_path / "run"
    folder.mkdir()
    with holding(folder / ".lock"):
        (folder / ".lock").unlink()
        folder.rmdir()
        time.sleep(0.3)
