"""Compiles C++ sources into shared libraries, once for each source, compiler and kind of CPU.

A library is written under a temporary name and renamed: processes that race each end up with a
whole one, and a killed process leaves nothing behind that others would wait for.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("c++", "g++", "clang++")
# without traps and errno a choice between two values needs no branch, so loops become vector code
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd")
_LINK_FLAGS = ("-fPIC", "-shared", "-pthread")


class BuildError(Exception):
    """A library cannot be built; the message says in one line why."""


def load_library(source: str) -> ctypes.CDLL:
    """Load csrc/<source>, compiled before into the user's cache, or now.

    Raises BuildError when there is no C++ compiler, or when it fails.
    """
    path = SOURCES / source
    command, identity = _native_compiler()
    texts = b"".join(file.read_bytes() for file in (path, *sorted(SOURCES.glob("*.h"))))
    key = hashlib.sha256(texts + identity).hexdigest()[:16]
    name = f"{path.stem}-{key}.so"
    try:
        target = _cache_folder() / name
        if target.exists():
            try:
                return ctypes.CDLL(str(target))
            except OSError:  # damaged, say by a full disk: made anew for all who come
                target.unlink()
        _compile(command, path, target)
        return ctypes.CDLL(str(target))
    except OSError:  # a home that is read-only, forbids execution, or has another C library's files
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / name
            _compile(command, path, target)
            try:
                return ctypes.CDLL(str(target))
            except OSError as error:
                raise BuildError(f"{source} was compiled but cannot be loaded: {error}") from error


def _cache_folder() -> Path:
    try:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # no home
        raise OSError(str(error)) from error
    folder = parent / "rwkv_parity"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _native_compiler() -> tuple[list[str], bytes]:
    """The compile command for this machine and what identifies compiler, flags and CPU."""
    compiler = _compiler()
    for native in (["-march=native"], ["-mcpu=native"], []):  # x86 and ARM spell it differently
        command = [*compiler, *_FLAGS, *native, *_LINK_FLAGS]
        # the predefined macros name the compiler's version and every instruction set in use
        probe = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
        if probe.returncode == 0:
            return command, " ".join(command).encode() + probe.stdout
    raise BuildError(f"{shlex.join(compiler)} does not compile C++17: {_first_line(probe.stderr)}")


def _compiler() -> list[str]:
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise BuildError(f"the C++ compiler CXX={asked[0]} is not there")
        return asked
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(f"no C++ compiler: none of {', '.join(COMPILERS)} in PATH, and CXX is not set")


def _compile(command: list[str], source: Path, target: Path) -> None:
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        done = _run([*command, "-o", temporary, str(source)])
        if done.returncode != 0:
            raise BuildError(f"{command[0]} fails on {source.name}: {_first_line(done.stderr)}")
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not start: {error}") from error


def _first_line(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")
