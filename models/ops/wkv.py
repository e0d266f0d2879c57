"""The WKV operator of RWKV-4 (Peng et al., 2023, eq. 16): a decaying, weighted average over time.

    y_t = (sum_{i<t} e^{(t-1-i)w + k_i} v_i + e^{u + k_t} v_t) / (the same sum without v)

A ladder of implementations, each tested against the one before: `wkv_reference` (a loop over T),
`torch` (`scan.py`: parallel over T, no compiler), `cpu` (`cpu.py`: C++, built at first use) and
`cuda` (`cuda.py`: compiled by NVRTC at first use).

B batch, T time, C channels.
"""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from models.ops import cpu, cuda
from models.ops.scan import EMPTY, wkv_scan

BACKENDS = ("auto", "cuda", "cpu", "torch", "reference")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def wkv(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Average v (B, T, C) with weights from k (B, T, C), decay w (C,) < 0 and bonus u (C,).

    k and v are float32, float16 or bfloat16; w, u and state are float32 (float64 throughout works
    too). state (B, 3, C) is numerator, denominator and running maximum of the exponent after the
    steps seen so far; None is the empty one, (0, 0, -1e38). Returns y (B, T, C) in the dtype of k
    and the state after the last step. All five inputs are differentiable. backend is "auto",
    "cuda", "cpu", "torch" or "reference". Raises ValueError for shapes and dtypes that do not fit,
    and for a backend that cannot be had.
    """
    _check(w, u, k, v, state)
    live = live_backend(k.device, backend)
    if live in ("cuda", "cpu"):
        if type(k) is Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            kernel = cuda.forward if live == "cuda" else cpu.forward
            return kernel(*_contiguous(w, u, k, v, state))  # a step should not pay for dispatch
        return _wkv(w, u, k, v, state)
    if live == "reference":
        return wkv_reference(w, u, k, v, state)
    return wkv_scan(w, u, k, v, state)


@torch.compiler.assume_constant_result
def live_backend(device: torch.device | str, backend: str = "auto") -> str:
    """Name the backend ("cuda", "cpu", "torch" or "reference") that `wkv` would run on device.

    "auto" is the fused backend of the device, "cuda" or "cpu", where it can be had, else "torch",
    with one warning on these two devices. Raises ValueError when the backend asked for cannot be
    had.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown WKV backend {backend!r}: use one of {', '.join(BACKENDS)}")
    if backend in ("torch", "reference"):
        return backend
    kind = torch.device(device).type
    chosen = kind if backend == "auto" else backend
    if chosen not in ("cuda", "cpu"):
        return "torch"
    if chosen == "cpu" != kind:
        raise ValueError(f"the WKV backend 'cpu' does not run on device {kind!r}: use auto")
    reason = cpu.missing() if chosen == "cpu" else cuda.missing(device)
    if reason is None:
        return chosen
    if backend != "auto":
        raise ValueError(f"the WKV backend {chosen!r} cannot be had: {reason}")
    _warn_once(reason)
    return "torch"


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"WKV runs on the slower 'torch' backend: {reason}; see python -m experiments.doctor",
        stacklevel=4,
    )


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    """The tensors as the kernels read them; None stays."""
    return [None if x is None else x.contiguous() for x in tensors]


@torch.library.custom_op("rwkv_parity::wkv", mutates_args=(), device_types="cpu")
def _wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    return cpu.forward(*_contiguous(w, u, k, v, state))


@torch.library.custom_op("rwkv_parity::wkv_backward", mutates_args=(), device_types="cpu")
def _wkv_backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None, gy: Tensor, g_last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return cpu.backward(*_contiguous(w, u, k, v, state, gy, g_last))


_wkv.register_kernel("cuda")(lambda *inputs: cuda.forward(*_contiguous(*inputs)))
_wkv_backward.register_kernel("cuda")(lambda *inputs: cuda.backward(*_contiguous(*inputs)))


@_wkv.register_fake
def _(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, C = k.shape
    return k.new_empty(B, T, C), w.new_empty(B, 3, C)


@_wkv_backward.register_fake
def _(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None, gy: Tensor, g_last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, T, C = k.shape
    gk, gv = k.new_empty(B, T, C), k.new_empty(B, T, C)
    return w.new_empty(C), w.new_empty(C), gk, gv, w.new_empty(B, 3, C)


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gy: Tensor, g_last: Tensor) -> tuple[Tensor | None, ...]:
    w, u, k, v, state = ctx.saved_tensors
    *gradients, g_state = _wkv_backward(w, u, k, v, state, gy, g_last)
    return *gradients, None if state is None else g_state


_wkv.register_autograd(_differentiate, setup_context=_save)


def can_step(x: Tensor, weight: Tensor, backend: str = "auto") -> bool:
    """Whether `time_mix_step` takes x (B, 1, C) with projections of weight's dtype."""
    return (
        x.is_cuda
        and x.shape[0] <= cuda.MAX_STEP_BATCH
        and x.dtype == weight.dtype
        and not torch.is_grad_enabled()
        and live_backend(x.device, backend) == "cuda"
    )


time_mix_step = torch.library.custom_op(
    "rwkv_parity::time_mix_step", cuda.time_mix_step, mutates_args=(), device_types="cuda"
)
time_mix_step.register_fake(
    lambda x, previous, mixes, weights, w, u, state: (torch.empty_like(x), torch.empty_like(state))
)


def wkv_reference(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as the paper states it, one step at a time; arguments and results as `wkv`."""
    if state is None:
        a = b = torch.zeros_like(k[:, 0], dtype=w.dtype)
        p = torch.full_like(a, EMPTY)
    else:
        a, b, p = state.unbind(1)
    ys = []
    for k_t, v_t in zip(k.to(w.dtype).unbind(1), v.to(w.dtype).unbind(1), strict=True):
        top = torch.maximum(p, u + k_t)
        past, now = torch.exp(p - top), torch.exp(u + k_t - top)
        ys.append((past * a + now * v_t) / (past * b + now))
        top = torch.maximum(p + w, k_t)
        past, now = torch.exp(p + w - top), torch.exp(k_t - top)
        a, b, p = past * a + now * v_t, past * b + now, top
    return torch.stack(ys, dim=1).to(k.dtype), torch.stack((a, b, p), dim=1)


def _check(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> None:
    if k.dim() != 3 or 0 in k.shape or k.shape != v.shape:
        raise ValueError(
            f"wkv: k and v must share one shape (B, T, C) without a zero, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.dtype != v.dtype or k.dtype not in _DTYPES:
        raise ValueError(
            f"wkv: k and v must share one dtype of float32, float16 or bfloat16, "
            f"got {k.dtype} and {v.dtype}"
        )
    B, _, C = k.shape
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {"w": (w, (C,)), "u": (u, (C,))}
    if state is not None:
        expected["state"] = (state, (B, 3, C))
    for name, (x, shape) in expected.items():
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(
                f"wkv: {name} must be {shape} of {dtype}, got {tuple(x.shape)} of {x.dtype}"
            )
        if x.device != k.device:
            raise ValueError(f"wkv: {name} is on {x.device} but k is on {k.device}")
