"""The kernels compiled for a CPU, through ctypes: WKV, products of few rows, one token's step.

B batch, T time, C channels.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from models.ops.build import BuildError, load_library

# the numbers that for_dtype in wkv_cpu.cpp, and linear_rows, know them by
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
# of each source, its functions with the numbers of sizes and of arrays they take
_FUNCTIONS = {
    "wkv_cpu.cpp": (("wkv_forward", 3, 7), ("wkv_backward", 3, 12)),
    "linear_cpu.cpp": (("linear_rows", 3, 4),),
    "step_cpu.cpp": (("rwkv4_step", 4, 8), ("gpt_step", 9, 5)),
}


def missing(source: str = "wkv_cpu.cpp") -> str | None:
    """Why a compiled source cannot be had, in a line without a full stop, or None when it can."""
    library = _library(source)
    return library if isinstance(library, str) else None


@cache
def _library(source: str) -> ctypes.CDLL | str:
    try:
        library = load_library(source)
    except BuildError as error:
        return str(error)
    for name, n_sizes, n_pointers in _FUNCTIONS[source]:
        sizes, pointers = [ctypes.c_int64] * n_sizes, [ctypes.c_void_p] * n_pointers
        getattr(library, name).argtypes = [
            ctypes.c_int, *sizes, *pointers, ctypes.c_int64, ctypes.c_void_p
        ]  # fmt: skip
    return library


@cache
def _openmp() -> int | None:
    # PyTorch's OpenMP runtime is loaded and global by now; without one the C++ starts threads
    try:
        fork = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        return None
    return ctypes.cast(fork, ctypes.c_void_p).value


@cache
def _function(source: str, name: str) -> Callable[..., int]:
    library = _library(source)
    if isinstance(library, str):
        raise RuntimeError(library)
    return getattr(library, name)


def _call(name: str, k: Tensor, *arrays: Tensor | None) -> None:
    pointers = [None if x is None else x.data_ptr() for x in arrays]
    status = _function("wkv_cpu.cpp", name)(
        _DTYPES[k.dtype], *k.shape, *pointers, torch.get_num_threads(), _openmp()
    )
    if status != 0:
        raise MemoryError(f"{name} ran out of memory at (B, T, C) = {tuple(k.shape)}")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., I) and bias (O,) float32, weight (O, I) float32, float16 or bfloat16 -> (..., O).

    All are contiguous; the result is float32.
    """
    n_out, n_in = weight.shape
    y = x.new_empty((*x.shape[:-1], n_out))
    arrays = x.data_ptr(), weight.data_ptr(), bias if bias is None else bias.data_ptr()
    _function("linear_cpu.cpp", "linear_rows")(
        _DTYPES[weight.dtype],
        x.numel() // n_in,
        n_in,
        n_out,
        *arrays,
        y.data_ptr(),
        torch.get_num_threads(),
        _openmp(),
    )
    return y


def step(
    name: str,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    layers: list[int | None],
    *arrays: Tensor | None,
) -> None:
    """Calls "rwkv4_step" or "gpt_step", matrices of dtype, with the addresses of layers' arrays.

    Everything is contiguous. Raises MemoryError.
    """
    pointers = [None if x is None else x.data_ptr() for x in arrays]
    status = _function("step_cpu.cpp", name)(
        _DTYPES[dtype],
        *sizes,
        (ctypes.c_void_p * len(layers))(*layers),
        *pointers,
        torch.get_num_threads(),
        _openmp(),
    )
    if status != 0:
        raise MemoryError(f"{name} ran out of memory")


def forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (B, T, C) in the dtype of k, the last state (B, 3, C); arguments as `wkv`, contiguous."""
    B, _, C = k.shape
    y, last = k.new_empty(k.shape), w.new_empty(B, 3, C)
    _call("wkv_forward", k, w, u, k, v, state, y, last)
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
        "wkv_backward", k, w, u, k, v, state, gy, g_last, gw, gu, gk, gv, g_first
    )  # fmt: skip
    return gw.sum(0), gu.sum(0), gk, gv, g_first
