"""Measuring fairly (candidates in turn, medians, memory in a process of its own) and reporting."""

import ctypes
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from tabulate import tabulate
from tqdm import tqdm

from experiments.config.checks import Number, check_values
from experiments.config.entry import RunFailed
from experiments.system.machine import peak_memory_bytes, reset_peak_memory

# of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4

Row = dict[str, Any]
Call = Callable[[], Any]


class Timings(dict[Any, list[float]]):
    """Seconds of each candidate, a number a round."""

    def median(self, name: Any) -> float:
        """Of one candidate's seconds."""
        return statistics.median(self[name])

    def ratio(self, numerator: Any, denominator: Any) -> float:
        """Median over rounds of one candidate's seconds over another's in the same round."""
        rounds = zip(self[numerator], self[denominator], strict=True)
        return statistics.median(a / b for a, b in rounds)


def interleaved(candidates: Mapping[Any, Call], repeats: int, warmup: int = 1) -> Timings:
    """Time ``repeats`` calls of each candidate, after ``warmup`` calls that do not count.

    Every round calls each once, forwards and backwards in turn, so that a machine that slows down
    slows all of them down. A candidate that returns a float has timed itself.
    """
    seconds = Timings({name: [] for name in candidates})
    n_calls = (warmup + repeats) * len(candidates)
    with tqdm(total=n_calls, disable=not sys.stderr.isatty(), leave=False) as bar:
        for number in range(-warmup, repeats):
            names = list(candidates)
            for name in names if number % 2 == 0 else reversed(names):
                bar.set_postfix_str(str(name))
                start = time.perf_counter()
                returned = candidates[name]()
                elapsed = time.perf_counter() - start
                if number >= 0:
                    seconds[name].append(returned if isinstance(returned, float) else elapsed)
                bar.update()
    return seconds


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a process that has imported its module and computed nothing.

    Raises:
        RunFailed: if that process was killed, as one that runs out of memory is.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise RunFailed("measuring memory was killed, out of memory? Lower the sizes") from None


def return_freed_memory() -> None:
    """From now on glibc returns freed blocks to the system at once, so that none is used twice."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
        libc.malloc_trim(0)


def peak_memory(build: Callable[..., Call], toy: Row, full: Row) -> int | None:
    """Peak resident bytes of ``build(**full)`` and of two calls of what it returns.

    Measured in a fresh process, above what that process holds after a call at the ``toy`` size:
    libraries are not counted; weights, gradients, optimizer state and scratch memory are. None
    where the system does not tell a peak.
    """
    return in_fresh_process(_growth, build, toy, full, torch.get_num_threads())


def _growth(build: Callable[..., Call], toy: Row, full: Row, n_threads: int) -> int | None:
    torch.set_num_threads(n_threads)
    return_freed_memory()
    build(**toy)()
    cpu = torch.device("cpu")
    if not reset_peak_memory(cpu):
        return None
    before = peak_memory_bytes(cpu)
    call = build(**full)
    call()
    call()
    return peak_memory_bytes(cpu) - before


@dataclass
class Report:
    """What a benchmark found: titled tables of plain values, and what a reader must know."""

    tables: dict[str, list[Row]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For a terminal."""
        parts = []
        for title, rows in self.tables.items():
            keys = list(dict.fromkeys(key for row in rows for key in row))
            shown = [[as_text(key, row.get(key)) for key in keys] for row in rows]
            is_text = [all(isinstance(row.get(key), str) for row in rows) for key in keys]
            align = ["left" if left else "right" for left in is_text]
            table = tabulate(shown, headers=keys, disable_numparse=True, colalign=align)
            parts.append(f"{title}\n{table}")
        return "\n\n".join([*parts, "\n".join(self.notes)]).rstrip()


def as_text(key: str, value: Any) -> str:
    """A value for a table: bytes with a unit, large numbers whole, others with three digits."""
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


def check_counts(**counts: Any) -> None:
    """Raise ValueError for the first that is not a whole number of at least 1."""
    check_values(counts, dict.fromkeys(counts, Number(1, whole=True)))


@contextmanager
def steady(report: Report) -> Iterator[None]:
    """Within it glibc keeps freed memory; after it the report says how busy the machine was.

    With glibc's defaults each new array above 32 MB costs page faults that take longer than the
    work on it.
    """
    libc = ctypes.CDLL(None)
    has_options = hasattr(libc, "mallopt")
    if has_options:
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
    before = busy_seconds()
    try:
        yield
    finally:
        if has_options:  # glibc's defaults
            libc.mallopt(M_MMAP_MAX, 65536)
            libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
    ours, others = (after - then for after, then in zip(busy_seconds(), before, strict=True))
    report.notes.append(
        f"Other processes used {max(others, 0) / ours:.2f} CPU seconds for each of ours: above "
        "0.05 or so distrust every figure, as threads that wait for a held-up one suffer most."
    )


def busy_seconds() -> tuple[float, float]:
    """CPU seconds so far of this process and its children, and of all other processes."""
    process, machine = psutil.Process().cpu_times(), psutil.cpu_times()
    ours = process.user + process.system + process.children_user + process.children_system
    return ours, machine.user + machine.nice + machine.system - ours
