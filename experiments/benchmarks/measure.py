"""Measuring fairly (candidates in turn, medians, memory in a process of its own) and showing it."""

import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.config.entry import RunFailed

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h

Row = dict[str, Any]


def interleaved(
    candidates: dict[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of ``repeats`` calls of each candidate, after ``warmup`` calls that do not count.

    Every round calls each once, forwards and backwards in turn, so that a machine that slows down
    slows all of them down. A candidate that returns a float has timed itself.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    n_calls = (warmup + repeats) * len(candidates)
    with tqdm(total=n_calls, disable=not sys.stderr.isatty(), leave=False) as bar:
        for number in range(-warmup, repeats):
            names = list(candidates)
            for name in names if number % 2 == 0 else reversed(names):
                bar.set_postfix_str(name)
                start = clock()
                own = candidates[name]()
                elapsed = own if isinstance(own, float) else clock() - start
                if number >= 0:
                    seconds[name].append(elapsed)
                bar.update()
    return seconds


def paired_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of one candidate's seconds over another's in the same round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def peak_memory(
    build: Callable[..., Callable[[], Any]], toy: Row, full: Row, n_calls: int = 2
) -> int | None:
    """Peak resident bytes of ``build(**full)`` and ``n_calls`` calls of what it returns.

    Measured in a fresh process, above what that process holds after a call at the ``toy`` size:
    libraries are not counted; weights, gradients, optimizer state and scratch memory are. Freed
    blocks return to the system at once, so that the figure repeats and leaves out what glibc's
    heap happens to hold back. None if the peak stayed below the start-up's own.

    Raises:
        RunFailed: if that process was killed, as one that runs out of memory is.
    """
    import torch

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        task = pool.submit(_grown, build, toy, full, n_calls, torch.get_num_threads())
        try:
            return task.result()
        except BrokenProcessPool:
            raise RunFailed(f"measuring the memory of {full} was killed: out of memory?") from None


def _grown(
    build: Callable[..., Callable[[], Any]], toy: Row, full: Row, n_calls: int, n_threads: int
) -> int | None:
    import psutil
    import torch

    from experiments.system.machine import peak_resident_bytes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
    torch.set_num_threads(n_threads)
    build(**toy)()
    before, start_up = psutil.Process().memory_info().rss, peak_resident_bytes()
    call = build(**full)
    for _ in range(n_calls):
        call()
    peak = peak_resident_bytes()
    return peak - before if peak > start_up else None


def check_counts(**counts: int) -> None:
    """Raise ValueError for the first that is not a whole number of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}: it must be a whole number of at least 1")


@dataclass
class Report:
    """What a benchmark found: titled tables of plain values, and what a reader must know."""

    tables: dict[str, list[Row]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For a terminal."""
        from tabulate import tabulate

        parts = []
        for title, rows in self.tables.items():
            shown = [{key: cell(key, value) for key, value in row.items()} for row in rows]
            right = [
                "left" if all(isinstance(row.get(key), str) for row in rows) else "right"
                for key in (rows[0] if rows else {})
            ]
            table = tabulate(shown, headers="keys", disable_numparse=True, colalign=right)
            parts.append(f"{title}\n{table}")
        return "\n\n".join([*parts, "\n".join(self.notes)]).rstrip()


def cell(key: str, value: Any) -> str:
    """A value as text: bytes with a unit, large numbers whole, others with three digits."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if key.endswith("_bytes"):
        power = min(max(value.bit_length() - 1, 0) // 10, 3)
        return f"{value / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def bar(what: str, measured: float | None, wanted: float, at_most: bool = False) -> Row:
    """A row that holds a figure against what is wanted of it."""
    met = None if measured is None else measured <= wanted if at_most else measured >= wanted
    sign = "<=" if at_most else ">="
    return {"what": what, "measured": measured, "wanted": f"{sign} {wanted:g}", "met": met}


def machine() -> Row:
    """Where the figures are from: processor, threads, PyTorch."""
    import torch

    from experiments.system.machine import device_name

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    return {
        "cpu": device_name(cpu),
        "n_threads": torch.get_num_threads(),
        "gpu": device_name(gpu) if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def read_rows(path: Path) -> list[Row]:
    """The ``rows`` of a benchmark's JSON file; ValueError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: set force=true to measure again") from None
