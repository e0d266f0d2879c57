"""Leases: of killed, suspended and far holders."""

import errno
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import filelock._util
import pytest
from filelock import Timeout

from experiments.system import locks
from experiments.system.locks import RunLocked, holder, holding, lease

HOLD = """
import sys, time
from pathlib import Path
from experiments.system import locks
file, locks.LEASE_S = Path(sys.argv[1]), float(sys.argv[2])
locks.BEAT_S = 0.1
with locks.holding(file, working=True):
    print("held", flush=True)
    while True:
        time.sleep(0.02)
        file.with_name("saved").touch()
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


def test_a_process_with_the_number_of_a_dead_holder_is_not_it(file: Path) -> None:
    with holding(file):
        text = file.read_text()
    file.write_text(re.sub(r"start=\d+", "start=1", text))
    assert holder(file) is None
    with holding(file):
        pass


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


@pytest.mark.parametrize("left", ["held", "released"])
def test_a_suspended_holder_that_was_overtaken_ends_before_it_saves(
    file: Path, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.1)
    monkeypatch.setattr(locks, "LEASE_S", 1.0)
    child = hold_elsewhere(file, 1.0)
    try:
        child.send_signal(signal.SIGSTOP)
        ours = lease(file)
        ours.acquire(timeout=20)
        if left == "released":  # the other has trained the run to its end
            ours.release()
        file.with_name("saved").unlink(missing_ok=True)
        child.send_signal(signal.SIGCONT)
        _, err = child.communicate(timeout=20)
        ours.release()
    finally:
        child.kill()
    assert child.returncode == 1
    assert "was taken over by another process" in err
    assert not file.with_name("saved").exists()


def test_a_holder_that_was_overtaken_while_its_machine_slept_ends(file: Path) -> None:
    """No signal tells it: its heartbeat finds out."""
    child = hold_elsewhere(file)
    try:
        file.unlink()
        assert child.wait(timeout=20) == 1
    finally:
        child.kill()
        child.communicate()


def test_a_dead_lease_is_taken_once_on_a_file_system_that_cannot_exchange_names(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS, for one: `filelock` leaves a dead holder's file there for ever."""
    monkeypatch.setattr(filelock._util, "_rename_call", lambda: (lambda *_: errno.EINVAL, 2))
    child = hold_elsewhere(file)
    child.kill()
    child.communicate(timeout=20)
    with pytest.raises(Timeout):
        lease(file).acquire(timeout=0.2)
    start, held = threading.Barrier(8), list[int]()

    def contend(number: int) -> None:
        start.wait()
        with suppress(RunLocked), holding(file):
            held.append(number)
            time.sleep(1)

    threads = [threading.Thread(target=contend, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1


def test_a_folder_that_was_removed_ends_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    folder = tmp_path / "run"
    folder.mkdir()
    with holding(folder / ".lock", working=True):
        (folder / ".lock").unlink()
        folder.rmdir()
        time.sleep(0.3)
