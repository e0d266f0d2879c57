"""bench=wkv: the WKV op alone, beside two passes of exp, a copy, and Hugging Face's loop.

B batch, T time, C channels.
"""

import ctypes
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import psutil
import torch
from torch import Tensor

from experiments.benchmarks.measure import (
    Report,
    Row,
    bar,
    check_counts,
    interleaved,
    paired_ratio,
    peak_memory,
)
from models.ops.wkv import BACKENDS, live_backend, wkv

Shape = tuple[int, int, int]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
FORWARD_ARRAYS, BACKWARD_ARRAYS = 3, 5  # of (B, T, C): k, v, y; and k, v, gy, gk, gv
NEEDS = {
    "cuda": "an NVIDIA GPU and the extra [cuda]",
    "cpu": "a C++ compiler",
    "torch": "nothing",
    "reference": "nothing",
}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
NOTES = [
    "Inputs are normal, w from the paper's initialisation. Columns are medians, ratios medians "
    "over rounds; candidates take turns in one process. `both` is forward and backward.",
    "GB/s counts every array once: k, v, y forward, and k, v, gy, gk, gv backward. The copy rate, "
    "measured in turn with them on arrays of the same size, counts what it reads and writes.",
    "Freed memory is kept by the process, for all alike: with glibc's defaults each new array "
    "above 32 MB costs page faults that take longer than the work on it.",
]


def wkv_op(device: str, shapes: list[Shape], lengths: list[int], repeats: int) -> Report:
    """Speed of the rung that is live, the other rungs beside it, errors and memory."""
    check_counts(repeats=repeats)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if device not in ("auto", *devices):
        raise ValueError(
            f"device is {device!r}: use auto or, of those here, {' or '.join(devices)}"
        )
    where = devices[0] if device == "auto" else device
    shapes = [(B, T, C) for B, T, C in shapes]
    on_cpu = torch.device(where).type == "cpu"
    report = Report(notes=list(NOTES))
    before = busy_seconds()
    with freed_memory_kept():
        rows, bars = speed(where, shapes, repeats)
        report.tables[f"WKV on {where}, backend {live_backend(where)}"] = rows
        flat, flat_bar = flatness(where, lengths, repeats)
        report.tables["Time per element at equal B x T x C, float32"] = flat
        bars.append(flat_bar)
        if on_cpu:
            bars += [*beside_hugging_face(shapes[0], repeats), thread_gain(shapes, repeats)]
        rungs, error_bars = every_rung(where, shapes[0], max(1, repeats // 3))
        B, T, C = shapes[0]
        report.tables[f"Every rung, ms at ({B}, {T}, {C}) float32"] = rungs
        bars += error_bars
    if on_cpu:
        bars.append(memory(max(shapes, key=lambda s: s[0] * s[1] * s[2])))
    report.tables["Against what is wanted (of the default shapes)"] = bars
    own, others = (now - then for now, then in zip(busy_seconds(), before, strict=True))
    report.notes.append(
        f"Other processes used {max(others, 0) / own:.2f} CPU seconds for each of ours: above 0.05 "
        "or so no ratio here can be trusted, as threads that wait for a held-up one suffer most."
    )
    return report


def busy_seconds() -> tuple[float, float]:
    """CPU seconds so far of this process and its children, and of all other processes."""
    mine, machine = psutil.Process().cpu_times(), psutil.cpu_times()
    own = mine.user + mine.system + mine.children_user + mine.children_system
    return own, machine.user + machine.nice + machine.system - own


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """w, u (C,) float32; k, v and gy (B, T, C) of dtype."""
    C = shape[2]
    g = torch.Generator().manual_seed(0)
    ramp = torch.arange(C) / max(C - 1, 1)
    w = -torch.exp(-5 + 8 * ramp**0.7)
    arrays = [torch.randn(shape, generator=g).to(dtype) for _ in range(3)]
    return [x.to(device) for x in (w, torch.randn(C, generator=g), *arrays)]


def calls(
    shape: Shape, dtype: torch.dtype, device: str, backend: str = "auto"
) -> dict[str, Callable[[], None]]:
    """The op forward, and forward and backward, in a form that can be timed."""
    w, u, k, v, gy = inputs(shape, dtype, device)
    leaves = [x.requires_grad_() for x in (w, u, k, v)]

    def forward() -> None:
        with torch.no_grad():
            wkv(w, u, k, v, backend=backend)

    def both() -> None:
        torch.autograd.grad(wkv(w, u, k, v, backend=backend)[0], leaves, gy)

    return {"forward": finished(forward, device), "both": finished(both, device)}


def finished(call: Callable[[], object], device: str) -> Callable[[], None]:
    """The call, done when it returns."""

    def waited() -> None:
        call()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    return waited


def speed(device: str, shapes: list[Shape], repeats: int) -> tuple[list[Row], list[Row]]:
    """A row for each shape, the first in all dtypes, and the bars of the first."""
    cases = [(shapes[0], dtype) for dtype in DTYPES]
    cases += [(shape, torch.float32) for shape in shapes[1:]]
    rows, bars = [], []
    for shape, dtype in cases:
        x = torch.randn(shape, device=device)
        narrow = x.to(dtype)
        target = torch.empty_like(narrow)
        candidates = calls(shape, dtype, device)
        candidates["two_exp"] = finished(partial(two_exp, x), device)
        candidates["copy"] = finished(partial(target.copy_, narrow), device)
        seconds = interleaved(candidates, repeats, warmup=2)
        size = narrow.numel() * narrow.element_size()
        rate = 2 * size / statistics.median(seconds["copy"])
        row: Row = {"B, T, C": str(shape), "dtype": str(dtype).removeprefix("torch.")}
        ratios = {}
        for name, arrays in (
            ("forward", FORWARD_ARRAYS),
            ("both", FORWARD_ARRAYS + BACKWARD_ARRAYS),
        ):
            took = statistics.median(seconds[name])
            ratios[name] = paired_ratio(seconds[name], seconds["two_exp"])
            row |= {f"{name}_ms": took * 1e3, f"{name} GB/s": arrays * size / took / 1e9}
            row |= {f"{name} / copy rate": arrays * size / took / rate}
            row |= {f"{name} / two exp": ratios[name]}
        rows.append(row)
        if shape == shapes[0] and dtype == torch.float32:
            bars = [
                bar("forward / two passes of exp", ratios["forward"], 0.8, at_most=True),
                bar("forward+backward / two passes of exp", ratios["both"], 3, at_most=True),
            ]
    return rows, bars


def two_exp(x: Tensor) -> None:
    """What any WKV must at least do to every element, one pass each."""
    torch.exp(x)
    torch.exp(x)


def flatness(device: str, lengths: list[int], repeats: int) -> tuple[list[Row], Row]:
    """Nanoseconds an element over T, with as many elements in all."""
    C, total = 256, max(lengths)
    candidates: dict[str, Callable[[], None]] = {}
    for T in lengths:
        parts = calls((total // T, T, C), torch.float32, device)
        candidates |= {f"{name}/{T}": call for name, call in parts.items()}
    seconds = interleaved(candidates, repeats, warmup=1)
    per_element = {name: statistics.median(s) / (total * C) * 1e9 for name, s in seconds.items()}
    rows: list[Row] = [
        {"B, T, C": str((total // T, T, C)), "forward ns": per_element[f"forward/{T}"],
         "both ns": per_element[f"both/{T}"]}
        for T in lengths
    ]  # fmt: skip
    first = min(lengths)
    worst = max(
        paired_ratio(seconds[f"{name}/{T}"], seconds[f"{name}/{first}"])
        for name in ("forward", "both")
        for T in lengths
    )
    return rows, bar(f"slowest time an element / that at T = {first}", worst, 1.15, at_most=True)


def beside_hugging_face(shape: Shape, repeats: int) -> list[Row]:
    """How many times as fast as the loop over T of transformers."""
    what = "Hugging Face's loop on a CPU / ours"
    wanted = {"forward": 20, "both": 30}
    if find_spec("transformers") is None:
        return [bar(f"{what}, {name}", None, least) for name, least in wanted.items()]
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    w, u, k, v, gy = inputs(shape, torch.float32, "cpu")
    leaves = [x.clone().requires_grad_() for x in ((-w).log(), u, k, v)]
    candidates = calls(shape, torch.float32, "cpu")

    def loop() -> None:
        with torch.no_grad():
            rwkv_linear_attention_cpu((-w).log(), u, k, v)

    def loop_both() -> None:
        torch.autograd.grad(rwkv_linear_attention_cpu(*leaves)[0], leaves, gy)

    candidates |= {"loop forward": loop, "loop both": loop_both}
    seconds = interleaved(candidates, max(2, repeats // 2), warmup=1)
    return [
        bar(f"{what}, {name}", paired_ratio(seconds[f"loop {name}"], seconds[name]), least)
        for name, least in wanted.items()
    ]


def thread_gain(shapes: list[Shape], repeats: int) -> Row:
    """Seconds of one thread over those of two, forward and backward, where B x C is least."""
    shape = min(shapes, key=lambda s: (s[0] * s[2], -s[1]))
    both = calls(shape, torch.float32, "cpu")["both"]
    kept = torch.get_num_threads()

    def with_threads(n: int) -> None:
        torch.set_num_threads(n)
        both()

    try:
        seconds = interleaved({str(n): partial(with_threads, n) for n in (1, 2)}, repeats, warmup=1)
    finally:
        torch.set_num_threads(kept)
    gain = paired_ratio(seconds["1"], seconds["2"])
    return bar(f"one thread / two threads at {shape}, forward+backward", gain, 1.6)


def every_rung(device: str, shape: Shape, repeats: int) -> tuple[list[Row], list[Row]]:
    """Each rung: what it needs, its worst error by dtype, its time; and bars of the errors."""
    rows, worst = [], dict.fromkeys(DTYPES, 0.0)
    for backend in BACKENDS[1:]:
        row: Row = {"rung": backend, "needs": NEEDS[backend]}
        try:
            live_backend(device, backend)
        except ValueError as error:
            rows.append(row | {"not here": str(error).split(": ", 1)[-1]})
            continue
        for dtype in DTYPES:
            found = worst_error(backend, dtype, device)
            row[f"error {str(dtype).removeprefix('torch.')}"] = found
            if backend == live_backend(device):
                worst[dtype] = found
        seconds = interleaved(calls(shape, torch.float32, device, backend), repeats, warmup=1)
        row |= {f"{name}_ms": statistics.median(s) * 1e3 for name, s in seconds.items()}
        rows.append(row)
    columns = dict.fromkeys(key for row in rows for key in row)
    name = live_backend(device)
    bars = [
        bar(f"relative RMS error of {name}, {dtype}", worst[dtype], bound, at_most=True)
        for dtype, bound in BOUNDS.items()
    ]
    return [{key: row.get(key) for key in columns} for row in rows], bars


def worst_error(backend: str, dtype: torch.dtype, device: str) -> float:
    """Largest relative RMS error of y, the state and all five gradients, against float64."""
    w, u, k, v, gy = inputs((2, 500, 96), dtype, device)
    state = torch.stack((v[:, 0], torch.ones_like(v[:, 0]), k[:, 0]), 1).to(w.dtype)

    def results(backend: str, wide: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
        dtypes = (wide, wide, dtype, dtype, wide)
        leaves = [
            x.detach().to(t).requires_grad_()
            for x, t in zip((w, u, k, v, state), dtypes, strict=True)
        ]
        y, last = wkv(leaves[0], leaves[1], leaves[2], leaves[3], leaves[4], backend)
        grads = torch.autograd.grad([y, last], leaves, [gy.to(dtype), torch.ones_like(last)])
        return [x.detach().double() for x in (y, last, *grads)]

    exact = results("reference", torch.float64, torch.float64)
    actual = results(backend, torch.float32, dtype)
    return max(float((a - e).norm() / e.norm()) for a, e in zip(actual, exact, strict=True))


def memory(shape: Shape) -> Row:
    """Peak bytes that backward adds to its inputs, in arrays of (B, T, C) float32."""
    size = 4 * shape[0] * shape[1] * shape[2]
    toy = (2, 256, 128)  # enough for every thread to have started
    peak = peak_memory(backward_call, {"shape": toy}, {"shape": shape})
    extra = None if peak is None else peak / size - 3  # k, v and gy
    what = f"backward's peak memory at {shape}, arrays of that size (gk, gv, 1/8 of states)"
    return bar(what, extra, 2.2, at_most=True)


def backward_call(shape: Shape) -> Callable[[], None]:
    """The backward pass alone, of the fused rung on a CPU or, without a compiler, of autograd."""
    from models.ops import cpu

    w, u, k, v, gy = inputs(shape, torch.float32, "cpu")
    if cpu.missing() is not None:
        return calls(shape, torch.float32, "cpu")["both"]
    g_last = torch.zeros(shape[0], 3, shape[2])

    def backward() -> None:
        cpu.backward(w, u, k, v, None, gy, g_last)

    return backward


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within it glibc neither maps large arrays one by one nor returns freed memory."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:  # glibc's defaults
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
