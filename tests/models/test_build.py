"""The compiled library: cached by content, whole under races, and its absence told in one line."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.ops import build
from models.ops.build import BuildError, load_library

NO_COMPILER = """
import warnings
import torch
from models.ops.wkv import live_backend, wkv, wkv_reference

torch.manual_seed(0)
w, u, k, v = -torch.rand(5), torch.randn(5), torch.randn(2, 9, 5), torch.randn(2, 9, 5)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        torch.testing.assert_close(wkv(w, u, k, v), wkv_reference(w, u, k, v))
print(live_backend("cpu"))
print(*(x.message for x in caught), sep="\\n")
try:
    wkv(w, u, k, v, backend="cpu")
except ValueError as error:
    print(error)
"""


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small source in place of csrc, and an empty cache; returns the cache's folder."""
    if not any(map(build.shutil.which, build.COMPILERS)):
        pytest.skip("no C++ compiler")
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "answer.h").write_text("constexpr int ANSWER = 42;\n")
    (sources / "answer.cpp").write_text(
        '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'
    )
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rwkv_parity"


def test_built_once_for_each_content(answer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_library("answer.cpp").answer() == 42
    (library,) = answer.iterdir()
    stamp = library.stat().st_mtime_ns
    assert load_library("answer.cpp").answer() == 42
    assert library.stat().st_mtime_ns == stamp
    (build.SOURCES / "answer.h").write_text("constexpr int ANSWER = 43;\n")
    assert load_library("answer.cpp").answer() == 43
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DOTHER"))
    load_library("answer.cpp")
    assert len(list(answer.iterdir())) == 3


def test_processes_race(answer: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)

    def work() -> None:
        barrier.wait()
        os._exit(load_library("answer.cpp").answer())

    racers = [context.Process(target=work) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [42] * 4
    assert len(list(answer.iterdir())) == 1


def test_damaged_library_is_made_anew_once(answer: Path) -> None:
    # built by another process: a library that this one has open would not be read again
    other = multiprocessing.get_context("fork").Process(target=load_library, args=("answer.cpp",))
    other.start()
    other.join()
    (library,) = answer.iterdir()
    library.write_bytes(b"\x7fELF")
    assert load_library("answer.cpp").answer() == 42
    assert list(answer.iterdir()) == [library]
    stamp = library.stat().st_mtime_ns
    assert library.stat().st_size > 1000
    assert load_library("answer.cpp").answer() == 42
    assert library.stat().st_mtime_ns == stamp


def test_cache_where_nothing_may_be_executed(answer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = build.ctypes.CDLL

    def forbid(name: str) -> object:
        if Path(name).parent == answer:
            raise OSError("failed to map segment from shared object")
        return real(name)

    monkeypatch.setattr(build.ctypes, "CDLL", forbid)
    assert load_library("answer.cpp").answer() == 42


def test_what_is_wrong_in_one_line(answer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (build.SOURCES / "broken.cpp").write_text("int main() { return nothing; }\n")
    with pytest.raises(BuildError, match=r"fails on broken.cpp: .*error:.*nothing.*") as caught:
        load_library("broken.cpp")
    assert "\n" not in str(caught.value)
    assert not list(answer.iterdir())
    monkeypatch.setenv("CXX", "/nowhere/c++ -O1")
    with pytest.raises(BuildError, match="CXX=/nowhere/c\\+\\+ is not there"):
        load_library("answer.cpp")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError, match=r"false does not compile C\+\+17"):
        load_library("answer.cpp")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: none of c"):
        load_library("answer.cpp")


@pytest.mark.slow
@pytest.mark.parametrize("cxx", ["/nowhere/c++", None])
def test_without_a_compiler(cxx: str | None, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": "", "XDG_CACHE_HOME": str(tmp_path), "CXX": cxx or ""}
    done = subprocess.run(
        [sys.executable, "-c", NO_COMPILER],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    backend, warning, error = done.stdout.strip().splitlines()
    assert backend == "torch"
    reason = f"CXX={cxx} is not there" if cxx else "no C++ compiler"
    assert "slower 'torch' backend" in warning
    assert reason in warning
    assert "'cpu' cannot be had" in error
    assert reason in error


@pytest.mark.slow
def test_real_source_has_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not any(map(build.shutil.which, build.COMPILERS)):
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-Wall", "-Wextra", "-Werror"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library("wkv_cpu.cpp")
