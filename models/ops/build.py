"""Compiles the kernels in csrc/, once for each source, compiler and kind of CPU or GPU.

A binary is written under a temporary name and renamed: processes that race each end up with a
whole one, and a killed process leaves nothing behind that others would wait for.
"""

import contextlib
import ctypes
import hashlib
import io
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("c++", "g++", "clang++")
# without traps and errno a choice between two values needs no branch, so loops become vector code
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd")
_LINK_FLAGS = ("-fPIC", "-shared", "-pthread")


class BuildError(Exception):
    """A library cannot be built; the message says in one line why."""


def load_library(source: str | Path) -> ctypes.CDLL:
    """Load csrc/<source>, or a file elsewhere, compiled before into the user's cache, or now.

    Raises BuildError when there is no C++ compiler, or when it fails.
    """
    path = SOURCES / source  # a whole path stays what it is
    command, identity = _native_compiler()
    key = _key(path, identity)
    try:
        target = _cache_folder() / f"{path.parent.name}-{path.stem}-{key}.so"
        if target.exists():
            try:
                return ctypes.CDLL(str(target))
            except OSError:  # damaged, say by a full disk: made again for all who come
                target.unlink()
        _compile(command, path, target)
        return ctypes.CDLL(str(target))
    except OSError:  # a home that is read-only, forbids execution, or has another C library's files
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / f"{path.stem}.so"
            _compile(command, path, target)
            try:
                return ctypes.CDLL(str(target))
            except OSError as error:
                raise BuildError(f"{source} was compiled but cannot be loaded: {error}") from error


def load_cubin(source: str, arch: str, macros: dict[str, str]) -> bytes:
    """csrc/<source> as machine code of a GPU, `arch` as "sm_90": from the user's cache, or now.

    Needs cuda-core, and no GPU. Raises BuildError when NVRTC is not there, or when it fails.
    """
    path = SOURCES / source
    options: dict[str, Any] = {"arch": arch, "define_macro": list(macros.items())}
    key = _key(path, f"{options} {_nvrtc_version()}".encode())
    try:
        target = _cache_folder() / f"{path.stem}-{key}.cubin"
        if target.exists():
            digest, _, code = target.read_bytes().partition(b"\n")
            if digest == hashlib.sha256(code).hexdigest().encode():
                return code
    except OSError:
        return compile_cubin(path, options)[0]
    code = compile_cubin(path, options)[0]
    with contextlib.suppress(OSError):  # not kept, then: seconds lost at the next start
        _write(target, hashlib.sha256(code).hexdigest().encode() + b"\n" + code)
    return code


def compile_cubin(path: Path, options: dict[str, Any]) -> tuple[bytes, str]:
    """The machine code of a CUDA source, and what the compiler says of each kernel's registers."""
    from cuda.core import Program, ProgramOptions

    log = io.StringIO()
    try:
        program = Program(
            path.read_text(encoding="utf-8"),
            "c++",
            ProgramOptions(
                name=path.name,
                std="c++17",
                include_path=str(path.parent),
                ptxas_options=["-v"],
                **options,
            ),
        )
        return bytes(program.compile("cubin", logs=log).code), log.getvalue()
    except Exception as error:  # NVRTC's, or that its library is not there
        message = _first_line(f"{error}\n{log.getvalue()}".encode())
        raise BuildError(f"NVRTC fails on {path.name} for {options['arch']}: {message}") from error


def _nvrtc_version() -> str:
    try:
        from cuda.bindings import nvrtc

        return str(nvrtc.nvrtcVersion())
    except Exception as error:  # cuda-bindings raises a bare RuntimeError without the library
        raise BuildError(f"NVRTC cannot be had: {_first_line(str(error).encode())}") from error


def _key(path: Path, identity: bytes) -> str:
    """Of a source, the headers beside it, and what else decides what comes out."""
    texts = b"".join(file.read_bytes() for file in (path, *sorted(SOURCES.glob("*.h"))))
    return hashlib.sha256(texts + identity).hexdigest()[:16]


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
    with _replacing(target) as temporary:
        done = _run([*command, f"-I{SOURCES}", "-o", temporary, str(source)])
        if done.returncode != 0:
            raise BuildError(f"{command[0]} fails on {source.name}: {_first_line(done.stderr)}")


def _write(target: Path, content: bytes) -> None:
    with _replacing(target) as temporary:
        Path(temporary).write_bytes(content)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[str]:
    """A temporary name beside target, which takes its place if nothing goes wrong."""
    handle, temporary = tempfile.mkstemp(suffix=target.suffix, dir=target.parent)
    os.close(handle)
    try:
        yield temporary
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
