"""bench=wkv: the WKV operator alone, beside two passes of exp, a copy, and Hugging Face's loop.

B batch, T time, C channels.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from experiments.benchmarks import self_test
from experiments.benchmarks.measure import (
    Report,
    Row,
    check_counts,
    interleaved,
    peak_memory,
    steady,
)
from experiments.system.machine import clock, usable_device
from models.ops import cpu
from models.ops.wkv import live_backend, wkv

Shape = tuple[int, int, int]
FORWARD_ARRAYS, BACKWARD_ARRAYS = 3, 5  # of (B, T, C): k, v, y; and k, v, gy, gk, gv
NOTES = [
    "Inputs are normal, w from the paper's initialisation. Columns are medians, ratios medians "
    "over rounds; candidates take turns in one process. `both` is forward and backward.",
    "GB/s counts every array once: k, v, y forward, and k, v, gy, gk, gv backward. The copy rate, "
    "measured in turn with them on arrays of the same size, counts what it reads and writes. "
    "`two exp`: the time of two passes of torch.exp over as many elements.",
    "Errors are the worst of outputs and gradients, relative RMS against float64.",
]


def wkv_op(device: str, shapes: list[Shape], lengths: list[int], repeats: int) -> Report:
    """Speed of the live backend and of the others, errors and memory."""
    check_counts(repeats=repeats)
    device = usable_device(device)
    report = Report(notes=list(NOTES))
    with steady(report):
        title = f"WKV on {device}, backend {live_backend(device)}"
        report.tables[title] = speed(device, shapes, repeats)
        title = "Time per element at equal B x T x C, float32"
        report.tables[title] = per_element(device, lengths, repeats)
        title = f"Every backend, both_ms at {tuple(shapes[0])} float32"
        report.tables[title] = every_backend(device, shapes[0], max(1, repeats // 3))
        if device == "cpu":
            report.tables["Two threads"] = [two_threads(shapes, repeats)]
            if find_spec("transformers") is not None:
                report.tables["Hugging Face's loop"] = beside_hugging_face(shapes[0], repeats)
    if device == "cpu":
        largest = max(shapes, key=lambda s: s[0] * s[1] * s[2])
        report.tables["Peak memory of backward, without its inputs"] = [memory(largest)]
    return report


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """w, u (C,) float32; k, v and gy (B, T, C) of dtype."""
    C = shape[2]
    g = torch.Generator().manual_seed(0)
    ramp = torch.arange(C) / max(C - 1, 1)
    w = -torch.exp(-5 + 8 * ramp**0.7)
    arrays = [torch.randn(*shape, generator=g).to(dtype) for _ in range(3)]
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

    def waiting() -> None:
        call()
        clock(torch.device(device))

    return waiting


def speed(device: str, shapes: list[Shape], repeats: int) -> list[Row]:
    """A row for each shape, the first in all dtypes."""
    cases = [(shapes[0], dtype) for dtype in self_test.TOLERANCES]
    cases += [(shape, torch.float32) for shape in shapes[1:]]
    rows = []
    for shape, dtype in cases:
        x = torch.randn(*shape, device=device)
        narrow = x.to(dtype)
        target = torch.empty_like(narrow)
        candidates = calls(shape, dtype, device)
        candidates["two exp"] = finished(partial(two_exp, x), device)
        candidates["copy"] = finished(partial(target.copy_, narrow), device)
        seconds = interleaved(candidates, repeats, warmup=2)
        n_bytes = narrow.numel() * narrow.element_size()
        row: Row = {"B, T, C": str(tuple(shape)), "dtype": str(dtype).removeprefix("torch.")}
        arrays = {"forward": FORWARD_ARRAYS, "both": FORWARD_ARRAYS + BACKWARD_ARRAYS}
        for name, n in arrays.items():
            row[f"{name}_ms"] = seconds.median(name) * 1e3
            row[f"{name} GB/s"] = n * n_bytes / seconds.median(name) / 1e9
            row[f"{name} / copy rate"] = n / 2 * seconds.ratio("copy", name)
            row[f"{name} / two exp"] = seconds.ratio(name, "two exp")
        rows.append(row)
    return rows


def two_exp(x: Tensor) -> None:
    """What any WKV must at least do to every element, one pass each."""
    torch.exp(x)
    torch.exp(x)


def per_element(device: str, lengths: list[int], repeats: int) -> list[Row]:
    """Nanoseconds an element over T, with as many elements in all; and over the shortest T's."""
    C, total = 256, max(lengths)
    candidates = {
        (name, T): call
        for T in lengths
        for name, call in calls((total // T, T, C), torch.float32, device).items()
    }
    seconds = interleaved(candidates, repeats)
    rows = []
    for T in lengths:
        row: Row = {"B, T, C": str((total // T, T, C))}
        for name in ("forward", "both"):
            row[f"{name} ns"] = seconds.median((name, T)) / (total * C) * 1e9
            row[f"{name} / first"] = seconds.ratio((name, T), (name, lengths[0]))
        rows.append(row)
    return rows


def beside_hugging_face(shape: Shape, repeats: int) -> list[Row]:
    """How many times as fast as the loop over T of transformers."""
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    w, u, k, v, gy = inputs(shape, torch.float32, "cpu")
    leaves = [x.clone().requires_grad_() for x in ((-w).log(), u, k, v)]
    candidates = calls(shape, torch.float32, "cpu")

    def loop() -> None:
        with torch.no_grad():
            rwkv_linear_attention_cpu(*leaves)

    def loop_both() -> None:
        torch.autograd.grad(rwkv_linear_attention_cpu(*leaves)[0], leaves, gy)

    candidates |= {"loop forward": loop, "loop both": loop_both}
    seconds = interleaved(candidates, max(2, repeats // 2))
    return [
        {"passes": name, "loop_ms": seconds.median(f"loop {name}") * 1e3,
         "loop / ours": seconds.ratio(f"loop {name}", name)}
        for name in ("forward", "both")
    ]  # fmt: skip


def two_threads(shapes: list[Shape], repeats: int) -> Row:
    """Seconds of one thread over those of two, forward and backward, where B x C is least."""
    shape = min(shapes, key=lambda s: (s[0] * s[2], -s[1]))
    both = calls(shape, torch.float32, "cpu")["both"]
    n_threads = torch.get_num_threads()

    def with_threads(n: int) -> None:
        torch.set_num_threads(n)
        both()

    try:
        seconds = interleaved({n: partial(with_threads, n) for n in (1, 2)}, repeats)
    finally:
        torch.set_num_threads(n_threads)
    return {"B, T, C": str(tuple(shape)), "one / two threads": seconds.ratio(1, 2)}


def every_backend(device: str, shape: Shape, repeats: int) -> list[Row]:
    """Each backend: why it is not here, or its errors by dtype and its time."""
    rows = []
    for tried in self_test.backends(torch.device(device), tuple(self_test.TOLERANCES)):
        row: Row = {"backend": tried.name, "not here": tried.missing or tried.broken}
        if tried.errors:
            names = {dtype: str(dtype).removeprefix("torch.") for dtype in tried.errors}
            row |= {f"error {names[dtype]}": error for dtype, error in tried.errors.items()}
            candidates = calls(shape, torch.float32, device, tried.name)
            seconds = interleaved(candidates, repeats)
            row |= {f"{name}_ms": seconds.median(name) * 1e3 for name in seconds}
        rows.append(row)
    return rows


def memory(shape: Shape) -> Row:
    """Peak bytes that backward adds to its inputs, in arrays of (B, T, C) float32."""
    size = 4 * shape[0] * shape[1] * shape[2]
    toy = (2, 256, 128)  # enough for every thread to have started
    peak = peak_memory(backward_call, {"shape": toy}, {"shape": tuple(shape)})
    arrays = None if peak is None else peak / size - 3  # k, v and gy are its inputs
    return {"B, T, C": str(tuple(shape)), "arrays of that size": arrays}


def backward_call(shape: Shape) -> Callable[[], None]:
    """The backward pass alone, of the fused backend on a CPU or, without it, of autograd."""
    w, u, k, v, gy = inputs(shape, torch.float32, "cpu")
    if cpu.missing() is not None:
        return calls(shape, torch.float32, "cpu")["both"]
    g_last = torch.zeros(shape[0], 3, shape[2])

    def backward() -> None:
        cpu.backward(w, u, k, v, None, gy, g_last)

    return backward
