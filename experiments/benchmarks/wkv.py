"""bench=wkv: the WKV operator alone, each backend, beside two passes of exp and a copy.

B batch, T time, C channels.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from experiments.benchmarks import self_test
from experiments.benchmarks.measure import Report, Row, check_counts, interleaved, steady
from experiments.system.machine import clock, usable_device
from models.ops.wkv import live_backend, wkv

Shape = tuple[int, int, int]
# Arrays of (B, T, C) that are read or written: k, v, y; and in the backward pass k, v, gy, gk, gv.
ARRAYS = {"forward": 3, "both": 3 + 5}
NOTES = [
    "Inputs are normal, w from the paper's initialisation. Columns are medians, ratios medians "
    "over rounds; candidates take turns in one process. `both` is forward and backward.",
    "GB/s counts every array once: k, v, y forward, and k, v, gy, gk, gv backward. The copy rate, "
    "measured in turn with them on arrays of the same size, counts what it reads and writes. "
    "`two exp`: the time of two passes of torch.exp over as many elements.",
    "Errors are the worst of outputs and gradients, relative RMS against float64.",
]


def wkv_op(device: str, shapes: list[Shape], repeats: int) -> Report:
    """Speed of the live backend at some (B, T, C), and speed and errors of all backends."""
    check_counts(repeats=repeats)
    device = usable_device(device)
    report = Report(notes=list(NOTES))
    with steady(report):
        title = f"WKV on {device}, backend {live_backend(device)}"
        report.tables[title] = speed(device, shapes, repeats)
        title = f"Every backend, ms at {tuple(shapes[0])} float32"
        report.tables[title] = every_backend(device, shapes[0], max(1, repeats // 3))
    return report


def calls(
    shape: Shape, dtype: torch.dtype, device: str, backend: str = "auto"
) -> dict[str, Callable[[], None]]:
    """The op forward, and forward and backward, in a form that can be timed."""
    C = shape[2]
    random = torch.Generator().manual_seed(0)
    ramp = torch.arange(C) / max(C - 1, 1)
    w, u = -torch.exp(-5 + 8 * ramp**0.7), torch.randn(C, generator=random)
    k, v, gy = (torch.randn(*shape, generator=random).to(device, dtype) for _ in range(3))
    w, u, k, v = leaves = [x.to(device).requires_grad_() for x in (w, u, k, v)]

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
        candidates = calls(shape, dtype, device)
        candidates["two exp"] = finished(partial(two_exp, x), device)
        candidates["copy"] = finished(partial(torch.empty_like(narrow).copy_, narrow), device)
        seconds = interleaved(candidates, repeats, warmup=2)
        n_bytes = narrow.numel() * narrow.element_size()
        row: Row = {"B, T, C": str(tuple(shape)), "dtype": str(dtype).removeprefix("torch.")}
        for name, n in ARRAYS.items():
            took = seconds.median(name)
            row |= {f"{name}_ms": took * 1e3, f"{name} ns/element": took / x.numel() * 1e9}
            row |= {f"{name} GB/s": n * n_bytes / took / 1e9}
            row |= {f"{name} / copy rate": n / 2 * seconds.ratio("copy", name)}
            row |= {f"{name} / two exp": seconds.ratio(name, "two exp")}
        rows.append(row)
    return rows


def two_exp(x: Tensor) -> None:
    """What any WKV must at least do to every element, one pass each."""
    torch.exp(x)
    torch.exp(x)


def every_backend(device: str, shape: Shape, repeats: int) -> list[Row]:
    """Each backend: why it is not here, or its errors by dtype and its time."""
    rows = []
    for tried in self_test.backends(torch.device(device), tuple(self_test.TOLERANCES)):
        row: Row = {"backend": tried.name, "not here": tried.missing or tried.broken}
        for dtype, error in tried.errors.items():
            row[f"error {str(dtype).removeprefix('torch.')}"] = error
        if tried.errors:
            seconds = interleaved(calls(shape, torch.float32, device, tried.name), repeats)
            row |= {f"{name}_ms": seconds.median(name) * 1e3 for name in seconds}
        rows.append(row)
    return rows
