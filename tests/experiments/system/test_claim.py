"""Claims: one holder at a time, on one machine and between machines, whatever the clocks say."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments.system import locks as claim
from experiments.system.locks import Claim, RunLocked, holder, newest

HOLD = """
import sys, time
from pathlib import Path
from experiments.system import locks as claim
claim.BEAT_S = 0.05
with claim.Claim.take(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
ROOT = Path(__file__).resolve().parents[3]


def hold_elsewhere(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the claim of a folder."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_S", 0.05)
    monkeypatch.setattr(claim, "DEAD_S", 0.5)
    monkeypatch.setattr(claim, "_watched", {})


def foreign_claim(folder: Path, number: int = 1) -> Path:
    """A claim that a process of another machine has left."""
    path = folder / f".claim.{number}"
    content = {"host": "far", "machine": "far/1", "pid": 7, "since": "then", "released": False}
    path.write_text(json.dumps(content))
    return path


def test_a_claim_is_free_the_moment_its_holder_is_killed(tmp_path: Path) -> None:
    child = hold_elsewhere(tmp_path)
    try:
        with pytest.raises(RunLocked, match=rf"another process is training .*process {child.pid}"):
            Claim.take(tmp_path)
        seen = holder(tmp_path)
        assert seen is not None
        assert seen.pid == child.pid
    finally:
        child.kill()
        child.communicate(timeout=20)
    assert holder(tmp_path) is None
    with Claim.take(tmp_path) as taken:
        assert taken.number == 2
        assert [p.name for p in tmp_path.glob(".claim.*")] == [".claim.2"]


def test_numbers_are_never_given_again(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        with Claim.take(tmp_path) as taken:
            assert taken.number == number
            with pytest.raises(RunLocked):
                Claim.take(tmp_path)
        last = newest(tmp_path)
        assert last is not None
        assert last.released
    assert [p.name for p in tmp_path.glob(".claim.*")] == [".claim.3"]


@pytest.mark.usefixtures("fast")
def test_another_machines_claim_counts_until_it_was_watched_to_be_dead(tmp_path: Path) -> None:
    foreign_claim(tmp_path)
    start = time.monotonic()
    with pytest.raises(RunLocked, match="far, process 7, since then"):
        Claim.take(tmp_path)
    while time.monotonic() - start < 10:
        try:
            Claim.take(tmp_path).release()
            break
        except RunLocked:
            time.sleep(0.02)
    assert time.monotonic() - start > claim.DEAD_S
    last = newest(tmp_path)
    assert last is not None
    assert last.number == 2


@pytest.mark.usefixtures("fast")
def test_waiting_tells_a_dead_machine_from_a_living_one(tmp_path: Path) -> None:
    path = foreign_claim(tmp_path)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            path.touch()

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(RunLocked):
            Claim.take(tmp_path, wait=True)
    finally:
        stop.set()
        beating.join()
    with Claim.take(tmp_path, wait=True) as taken:
        assert taken.number == 2


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("shift_s", [-7200, 7200])
def test_clocks_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift_s: float
) -> None:
    """Ours is set back or forward, and so is the file server's: alive stays alive, dead dead."""
    path = foreign_claim(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1e9 + shift_s)
    start = time.monotonic()
    beats = 0
    while time.monotonic() - start < 2 * claim.DEAD_S:  # touched all the time: never taken
        beats += 1
        os.utime(path, (1e9 + beats * shift_s, 1e9 + beats * shift_s))
        with pytest.raises(RunLocked):
            Claim.take(tmp_path)
        time.sleep(0.02)
    with Claim.take(tmp_path, wait=True) as taken:  # no longer touched
        assert taken.number == 2


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("content", [b"", b'{"host": "a', b"[1]", b"\xff\x00", b'{"x": 1}'])
def test_a_damaged_claim_is_waited_for_and_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".claim.1").write_bytes(content)
    with pytest.raises(RunLocked):
        Claim.take(tmp_path)
    with Claim.take(tmp_path, wait=True) as taken:
        assert taken.number == 2


def no_locks(*args: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.usefixtures("fast")
def test_without_locks_one_of_many_at_once_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    for i in range(20):
        folder = tmp_path / str(i)
        folder.mkdir()
        won: list[Claim] = []
        start = threading.Barrier(6)

        def race(folder: Path = folder, won: list[Claim] = won, start=start) -> None:  # type: ignore[no-untyped-def]
            start.wait()
            try:
                won.append(Claim.take(folder))
            except RunLocked:
                return

        threads = [threading.Thread(target=race) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        for held in won:
            with pytest.raises(RunLocked):
                Claim.take(folder)
            held.release()
        Claim.take(folder, wait=True).release()


def test_a_holder_whose_run_was_taken_over_ends_at_once(tmp_path: Path) -> None:
    child = hold_elsewhere(tmp_path)
    foreign_claim(tmp_path, number=2)
    _, errors = child.communicate(timeout=20)
    assert child.returncode == 1
    assert errors.startswith(f"error: {tmp_path} was taken over by far, process 7")


def test_a_removed_folder_and_a_full_disk_do_not_end_a_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(claim, "BEAT_S", 0.01)
    with Claim.take(tmp_path / "a") as held:
        held.path.unlink()
        (tmp_path / "a" / ".lock").unlink()
        (tmp_path / "a").rmdir()
        time.sleep(0.1)
    monkeypatch.setattr(os, "write", no_locks)
    with pytest.raises(OSError, match="No locks"):
        Claim.take(tmp_path)
    assert not list(tmp_path.glob(".claim.*"))


def test_a_child_inherits_a_claim_and_keeps_it_when_its_giver_lets_go(tmp_path: Path) -> None:
    given = Claim.take(tmp_path, training=False)
    assert given.lock is not None
    code = HOLD.replace("Claim.take(Path(sys.argv[1]))", "Claim.inherited(Path(sys.argv[1]))")
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, **given.environment()},
        pass_fds=[given.lock],
        text=True,
    )
    given.close_lock()
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(RunLocked, match=f"process {child.pid}"):
        Claim.take(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=20)
    Claim.take(tmp_path).release()
    given.release()
    child.stdout.close()
