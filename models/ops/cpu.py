"""The kernels compiled for a CPU, through ctypes: WKV, products of few rows, one token's step.

B batch, T time, C channels.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.ops.build import BuildError, load_library

# the numbers that for_dtype in wkv_cpu.cpp, and linear_rows, know them by
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


@dataclass(frozen=True)
class Kernel:
    """A function of a compiled source.

    Attributes:
        source: the file, or its name within csrc.
        name: of the function.
        n_sizes, n_arrays: how many whole numbers and pointers it takes, between the number of a
            dtype and the number of threads.
    """

    source: str | Path
    name: str
    n_sizes: int
    n_arrays: int

    def missing(self) -> str | None:
        """Why it cannot be had, in a line without a full stop, or None when it can."""
        return missing(self.source)

    def __call__(self, dtype: torch.dtype, *arguments: Any) -> None:
        """Call it with sizes and addresses, on as many threads as PyTorch has.

        Raises:
            MemoryError: if memory ran out.
        """
        if _function(self)(_DTYPES[dtype], *arguments, torch.get_num_threads(), _openmp()):
            raise MemoryError(f"{self.name} ran out of memory")

    def over_layers(
        self,
        dtype: torch.dtype,
        sizes: tuple[int, ...],
        layers: list[int | None],
        *arrays: Tensor | None,
    ) -> None:
        """Call a step, its matrices of dtype, with the addresses of layers' contiguous arrays."""
        pointers = [None if x is None else x.data_ptr() for x in arrays]
        self(dtype, *sizes, (ctypes.c_void_p * len(layers))(*layers), *pointers)


FORWARD = Kernel("wkv_cpu.cpp", "wkv_forward", 3, 7)
BACKWARD = Kernel("wkv_cpu.cpp", "wkv_backward", 3, 12)
LINEAR = Kernel("linear_cpu.cpp", "linear_rows", 3, 4)


def missing(source: str | Path = "wkv_cpu.cpp") -> str | None:
    """Why a compiled source cannot be had, in a line without a full stop, or None when it can."""
    library = _library(source)
    return library if isinstance(library, str) else None


@cache
def _library(source: str | Path) -> ctypes.CDLL | str:
    try:
        return load_library(source)
    except BuildError as error:
        return str(error)


@cache
def _function(kernel: Kernel) -> Callable[..., int]:
    library = _library(kernel.source)
    if isinstance(library, str):
        raise RuntimeError(library)
    function = getattr(library, kernel.name)
    sizes, arrays = [ctypes.c_int64] * kernel.n_sizes, [ctypes.c_void_p] * kernel.n_arrays
    function.argtypes = [ctypes.c_int, *sizes, *arrays, ctypes.c_int64, ctypes.c_void_p]
    return function


@cache
def _openmp() -> int | None:
    # PyTorch's OpenMP runtime is loaded and global by now; without one the C++ starts threads
    try:
        fork = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        return None
    return ctypes.cast(fork, ctypes.c_void_p).value


def _call(kernel: Kernel, k: Tensor, *arrays: Tensor | None) -> None:
    pointers = [None if x is None else x.data_ptr() for x in arrays]
    kernel(k.dtype, *k.shape, *pointers)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., I) and bias (O,) float32, weight (O, I) float32, float16 or bfloat16 -> (..., O).

    All are contiguous; the result is float32.
    """
    n_out, n_in = weight.shape
    y = x.new_empty((*x.shape[:-1], n_out))
    arrays = x.data_ptr(), weight.data_ptr(), bias if bias is None else bias.data_ptr()
    LINEAR(weight.dtype, x.numel() // n_in, n_in, n_out, *arrays, y.data_ptr())
    return y


def forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (B, T, C) in the dtype of k, the last state (B, 3, C); arguments as `wkv`, contiguous."""
    B, _, C = k.shape
    y, last = k.new_empty(k.shape), w.new_empty(B, 3, C)
    _call(FORWARD, k, w, u, k, v, state, y, last)
    return y, last


def backward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    gy: Tensor,
    g_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w, u, k, v and state (also when that is None), each in its input's dtype.

    All arguments are contiguous.
    """
    B, _, C = k.shape
    gw, gu, g_first = w.new_empty(B, C), w.new_empty(B, C), w.new_empty(B, 3, C)
    gk, gv = k.new_empty(k.shape), k.new_empty(k.shape)
    _call(
        BACKWARD, k, w, u, k, v, state, gy, g_last, gw, gu, gk, gv, g_first
    )  # fmt: skip
    return gw.sum(0), gu.sum(0), gk, gv, g_first
