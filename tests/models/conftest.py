"""A GPU for the tests: `emulated_gpu` runs all of wkv_cuda.cu, launches included, on the CPU."""

import ctypes
import itertools
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.ops import build, cpu, cuda

EMULATION = Path(__file__).parent / "emulation"


class EmulatedGPU:
    """Runs kernels of `sources` in the place of models/ops/cuda.py's launches.

    It has few multiprocessors, so that small inputs are cut into one or many segments of time, as
    their sizes have it. Every launch runs the threads of its blocks in another order.
    """

    n_processors = 4

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources = build.SOURCES
        self.launched: list[str] = []  # names of kernels
        self.libraries: dict[tuple[Path, torch.dtype], ctypes.CDLL] = {}
        self.seeds = itertools.count()

    def library(self, dtype: torch.dtype) -> ctypes.CDLL:
        """The kernels for one element type, compiled by the host's compiler with grid.h."""
        key = self.sources, dtype
        if key not in self.libraries:
            name = cuda._TYPES[dtype][0]
            target = self.folder / f"{len(self.libraries)}.so"
            command = [*build._compiler(), "-std=c++17", "-O2", "-fno-math-errno", "-shared"]
            command += ["-fPIC", f"-DWKV_IO={name}", f"-I{EMULATION}", f"-I{self.sources}"]
            command += ["-o", str(target), str(EMULATION / "wkv_grid.cpp")]
            subprocess.run(command, check=True)
            self.libraries[key] = ctypes.CDLL(str(target))
            self.libraries[key].launch.argtypes = [
                ctypes.c_char_p, *[ctypes.c_uint] * 4, ctypes.c_void_p, ctypes.c_size_t,
                ctypes.c_uint,
            ]  # fmt: skip
        return self.libraries[key]

    def launch(
        self,
        name: str,
        like: Tensor,
        grid: tuple[int, int],
        block: tuple[int, int],
        arguments: list[int],
    ) -> None:
        """In the place of `cuda._launch`."""
        assert grid[0] < 2**31
        assert grid[1] < 2**16
        numbers = (ctypes.c_longlong * len(arguments))(*arguments)
        status = self.library(like.dtype).launch(
            name.encode(), *grid, *block, numbers, len(arguments), next(self.seeds)
        )
        assert status == 0, f"{name} does not take {len(arguments)} arguments"
        self.launched.append(name)


@pytest.fixture(scope="session")
def _gpu(tmp_path_factory: pytest.TempPathFactory) -> EmulatedGPU:
    return EmulatedGPU(tmp_path_factory.mktemp("wkv_grid"))


@pytest.fixture
def emulated_gpu(_gpu: EmulatedGPU, monkeypatch: pytest.MonkeyPatch) -> EmulatedGPU:
    """While it lasts, backend="cpu" runs models/ops/cuda.py on the emulated GPU."""
    _gpu.sources, _gpu.launched = build.SOURCES, []
    monkeypatch.setattr(cuda, "_launch", _gpu.launch)
    monkeypatch.setattr(cuda, "_multiprocessors", lambda device: _gpu.n_processors)
    monkeypatch.setattr(cpu, "forward", cuda.forward)
    monkeypatch.setattr(cpu, "backward", cuda.backward)
    # what else is compiled for a CPU steps aside
    monkeypatch.setattr(
        cpu,
        "missing",
        lambda source="wkv_cpu.cpp": (
            None if source == "wkv_cpu.cpp" else "emulated: a GPU has none"
        ),
    )
    return _gpu
