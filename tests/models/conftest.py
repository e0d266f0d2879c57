"""A GPU for the tests: `emulated_gpu` runs all of wkv_cuda.cu, launches included, on the CPU."""

import ctypes
import itertools
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.ops import build, cpu, cuda

EMULATION = Path(__file__).parent / "emulation"


@pytest.fixture(scope="session")
def wkv_grid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], ctypes.CDLL]:
    """The kernels for one element type, compiled by the host's compiler with grid.h."""
    folder = tmp_path_factory.mktemp("wkv_grid")
    libraries: dict[torch.dtype, ctypes.CDLL] = {}

    def library(dtype: torch.dtype) -> ctypes.CDLL:
        if dtype not in libraries:
            # a test of the tests puts a broken copy there
            sources = os.environ.get("WKV_CUDA_SOURCES", build.SOURCES)
            name = cuda._TYPES[dtype][0]
            target = folder / f"{name.split(':')[-1]}.so"
            command = [*build._compiler(), "-std=c++17", "-O2", "-fno-math-errno", "-shared"]
            command += ["-fPIC", f"-DWKV_IO={name}", f"-I{EMULATION}", f"-I{sources}"]
            subprocess.run(
                [*command, "-o", str(target), str(EMULATION / "wkv_grid.cpp")], check=True
            )
            libraries[dtype] = ctypes.CDLL(str(target))
            libraries[dtype].launch.argtypes = [
                ctypes.c_char_p, *[ctypes.c_uint] * 4, ctypes.c_void_p, ctypes.c_size_t,
                ctypes.c_uint,
            ]  # fmt: skip
        return libraries[dtype]

    return library


@pytest.fixture
def emulated_gpu(
    wkv_grid: Callable[[torch.dtype], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """While it lasts, backend="cpu" runs models/ops/cuda.py on the emulated grid.

    Returns the names of the kernels launched so far. The GPU has few multiprocessors, so that small
    inputs are cut into one, two or many segments of time, as their sizes have it.
    """
    launched: list[str] = []
    seeds = itertools.count()

    def launch(
        name: str, like: Tensor, grid: tuple[int, int], block: tuple[int, int], arguments: list[int]
    ) -> None:
        assert grid[0] < 2**31
        assert grid[1] < 2**16
        numbers = (ctypes.c_longlong * len(arguments))(*arguments)
        status = wkv_grid(like.dtype).launch(
            name.encode(), *grid, *block, numbers, len(arguments), next(seeds)
        )
        assert status == 0, f"{name} does not take {len(arguments)} arguments"
        launched.append(name)

    monkeypatch.setattr(cuda, "_launch", launch)
    monkeypatch.setattr(cuda, "_multiprocessors", lambda device: 4)
    monkeypatch.setattr(cpu, "forward", cuda.forward)
    monkeypatch.setattr(cpu, "backward", cuda.backward)
    monkeypatch.setattr(cpu, "missing", lambda: None)
    return launched
