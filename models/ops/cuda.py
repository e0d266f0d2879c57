"""The fused WKV on a GPU: csrc/wkv_cuda.cu, compiled by NVRTC at first use and kept in the cache.

Needs the package cuda-core (extra `cuda`), and no CUDA toolkit or host compiler: NVRTC comes with
PyTorch's CUDA builds. Kernels run on PyTorch's current stream, so they can be captured in a graph.

B batch, T time, C channels.
"""

from ctypes import c_int64
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.ops.build import BuildError, load_cubin

if TYPE_CHECKING:
    from cuda.core import ObjectCode

# what wkv_cuda.cu calls them, and the steps of its CHUNK
_TYPES = {
    torch.float32: ("float", 64),
    torch.float16: ("wkv::Half", 64),
    torch.bfloat16: ("wkv::BFloat16", 64),
    torch.float64: ("double", 32),
}
_LANES, _SPANS, _WARPS, _ROWS = 32, 8, 8, 4  # the constants of wkv_cuda.cu
MAX_STEP_BATCH = 8  # rows up to which time_mix_step reads weights no more often than a matmul would


def missing(device: torch.device | str = "cuda") -> str | None:
    """Why the fused backend cannot be had on device, in a line without a full stop, or None."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"it runs on NVIDIA GPUs, not on tensors of device {device.type!r}"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    index = torch.cuda.current_device() if device.index is None else device.index
    module = _module(torch.float32, index)
    return module if isinstance(module, str) else None


@cache
def _module(dtype: torch.dtype, index: int) -> "ObjectCode | str":
    """The kernels for one element type on GPU `index`, or why they cannot be had."""
    try:
        from cuda.core import Device, ObjectCode
    except ImportError as error:
        return f"the package cuda-core is not there ({error}): pip install -e '.[cuda]'"
    major, minor = torch.cuda.get_device_capability(index)
    try:
        cubin = load_cubin("wkv_cuda.cu", f"sm_{major}{minor}", {"WKV_IO": _TYPES[dtype][0]})
        Device(index).set_current()
        return ObjectCode.from_cubin(cubin)
    except BuildError as error:
        return str(error)
    except Exception as error:  # the driver's: of another CUDA version, say
        return f"the driver does not take the kernels: {' '.join(str(error).split())}"


@cache
def _kernel(name: str, dtype: torch.dtype, index: int) -> Any:
    module = _module(dtype, index)
    if isinstance(module, str):
        raise RuntimeError(f"WKV on cuda:{index} in {dtype}: {module}")
    return module.get_kernel(name)


def _launch(
    name: str, like: Tensor, grid: tuple[int, int], block: tuple[int, int], arguments: list[int]
) -> None:
    """Run a kernel for the dtype and on the device of `like`; every argument is 64 bits wide."""
    from cuda.core import Device, LaunchConfig, launch

    index = like.get_device()
    kernel = _kernel(name, like.dtype, index)
    with torch.cuda.device(index):
        Device(index).set_current()  # a thread of autograd's may have no context yet
        stream = torch.cuda.current_stream(index)
        launch(stream, LaunchConfig(grid=grid, block=block), kernel, *map(c_int64, arguments))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Call:
    """Sizes and launch geometry of one call of the op, shared by its kernels."""

    def __init__(self, k: Tensor, arrays: list[Tensor]) -> None:
        self.like = k
        self.B, self.T, self.C = k.shape
        chunk = _TYPES[k.dtype][1]
        self.n_chunks = -(-self.T // chunk)
        self.blocks = self.B * -(-self.C // _LANES)
        # two blocks a multiprocessor hide the latency of memory; what more segments cost is
        # reading k and v once more
        n_processors = _multiprocessors(k.device)
        wanted = 1 if self.blocks >= n_processors else -(-2 * n_processors // self.blocks)
        chunks_each = -(-self.n_chunks // min(wanted, self.n_chunks, 65535))
        self.n_segments = -(-self.n_chunks // chunks_each)
        self.segment = chunks_each * chunk
        pack = 16 // k.element_size()
        self.aligned = self.C % pack == 0 and all(x.data_ptr() % 16 == 0 for x in arrays)

    def over_segments(self, name: str, *arrays: Tensor | None) -> None:
        """A block a segment and tile of channels."""
        sizes = [self.T, self.C, self.segment, int(self.aligned)]
        grid = (self.blocks, self.n_segments)
        _launch(name, self.like, grid, (_LANES, _SPANS), sizes + _pointers(arrays))

    def over_channels(self, name: str, *arrays: Tensor | None) -> None:
        """A thread a batch row and channel."""
        sizes = [self.B, self.T, self.C, self.segment]
        threads = _LANES * _SPANS
        grid = (-(-self.B * self.C // threads), 1)
        _launch(name, self.like, grid, (threads, 1), sizes + _pointers(arrays))

    def states(self, w: Tensor, n: int) -> Tensor:
        """Room for n states (4, C) for each batch row."""
        return w.new_empty(self.B, n, 4, self.C)


def _pointers(arrays: tuple[Tensor | None, ...]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in arrays]


def forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (B, T, C) in the dtype of k, the last state (B, 3, C); arguments as `wkv`, contiguous."""
    y, last = k.new_empty(k.shape), w.new_empty(k.shape[0], 3, k.shape[2])
    call = _Call(k, [k, v, y])
    ends = None
    if call.n_segments > 1:
        ends = call.states(w, call.n_segments + 1)
        call.over_segments("wkv_reduce", w, k, v, ends, None)
        call.over_channels("wkv_combine", w, state, ends)
    call.over_segments("wkv_forward", w, u, k, v, state, ends, y, last)
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
    gk, gv, g_first = k.new_empty(k.shape), k.new_empty(k.shape), g_last.new_empty(g_last.shape)
    call = _Call(k, [k, v, gy, gk, gv])
    n = call.n_segments
    ends, borders = call.states(w, n + 1), call.states(w, call.n_chunks)
    call.over_segments("wkv_reduce", w, k, v, ends, borders)
    call.over_channels("wkv_combine", w, state, ends)
    adjoints = None
    if n > 1:
        adjoints = call.states(w, n + 1)
        call.over_segments("wkv_backward_reduce", w, u, k, v, gy, ends, borders, adjoints)
        call.over_channels("wkv_backward_combine", w, ends, g_last, adjoints)
    gw, gu = w.new_empty(call.B, n, call.C), w.new_empty(call.B, n, call.C)
    call.over_segments(
        "wkv_backward", w, u, k, v, gy, ends, borders, g_last, adjoints, gw, gu, gk, gv, g_first
    )
    return gw.sum((0, 1)), gu.sum((0, 1)), gk, gv, g_first


def time_mix_step(
    x: Tensor,
    previous: Tensor,
    mixes: list[Tensor],
    weights: list[Tensor],
    w: Tensor,
    u: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token through the time-mix up to its output projection, in one kernel, undifferentiated.

    x and previous (B, C), mixes of k, v, r (C elements each) and their weights (C, C) share one
    dtype; w, u (C,) and state (B, 3, C) are float32. Returns the gated average (B, C) in that dtype
    and the next state.
    """
    x, previous, state = x.contiguous(), previous.contiguous(), state.contiguous()
    matrices = [p.contiguous() for p in (*mixes, *weights)]
    w, u = w.contiguous(), u.contiguous()
    B, C = x.shape
    out, after = x.new_empty(B, C), state.new_empty(B, 3, C)
    packed = (x, previous, *matrices)
    aligned = C % (16 // x.element_size()) == 0 and all(a.data_ptr() % 16 == 0 for a in packed)
    arguments = [B, C, int(aligned), *_pointers((*packed, w, u, state, out, after))]
    grid = (-(-C // _WARPS), -(-B // _ROWS))
    _launch("wkv_time_mix_step", x, grid, (32, _WARPS), arguments)
    return out, after
