"""bench=generate: what trained runs cost at a context length, prefill and decode apart.

The figures go into each run's bench/generate.json, next to its results.
"""

import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.measure import (
    Report,
    Row,
    check_counts,
    in_fresh_process,
    interleaved,
    return_freed_memory,
)
from experiments.runs.run_dir import RunDir, find_runs, open_external
from experiments.runs.trained_model import load_model
from experiments.system.files import write_json
from experiments.system.machine import (
    clock,
    peak_memory_bytes,
    reset_peak_memory,
    usable_device,
)
from models.generation import Sampling, prefill, sample
from models.language_model import LanguageModel, State

OUTPUT = "generate.json"  # in a run's bench/
CHECKPOINT = "last"  # every run has it at the same budget
FIRST = 16  # the shortest length measured; each next one is so many times longer:
FACTOR = 4
DECODED = 16  # tokens generated at each length; their median counts

Costs = list[tuple[float, list[float]]]  # at each length: prefill seconds, those of each token


def generate(
    run: str | list[str] | None,
    suite: str | None,
    max_tokens: int,
    chunk_len: int,
    repeats: int,
    device: str,
    dtype: str,
    runs_root: str,
) -> Report:
    """Cost of reading 16, 64, 256, ... tokens with each run, and of generating after them.

    Raises:
        ValueError: unless exactly one of run and suite is given; for a bad count, dtype or device.
        FileNotFoundError: if no run directory is there.
        RunFailed: if measuring the memory was killed; what was measured before is kept.
    """
    if (run is None) == (suite is None):
        raise ValueError("give the runs to measure: run=DIR (or a glob), or suite=NAME")
    check_counts(max_tokens=max_tokens, chunk_len=chunk_len, repeats=repeats)
    if max_tokens < FIRST:
        raise ValueError(f"max_tokens is {max_tokens}: the first length measured is {FIRST}")
    pattern = run if run is not None else str(Path(runs_root) / str(suite) / "*" / "*")
    found = [open_external(one.path) for one in find_runs(pattern)]
    finished = [one for one in found if one.finished]
    protocol = {
        "batch_size": 1,
        "n_threads": torch.get_num_threads(),
        "dtype": dtype,  # what matrices are kept in, whatever a run was trained in
        "device": usable_device(device),
        "chunk_len": chunk_len,
        "repeats": repeats,
        "checkpoint": CHECKPOINT,
    }
    rows = measure(finished, lengths(max_tokens), protocol)
    notes = [
        f"{len(finished)} measured, {len(found) - len(finished)} left out (not finished).",
        f"Prefill reads a context of n_tokens in chunks of {chunk_len}; decode is a token after "
        "it, median. State bytes are computed; the peak is resident memory beyond the weights.",
        "A model whose context ends is measured past it, opened with a longer one: what it writes "
        "there is poor, its cost right.",
    ]
    return Report({f"Generating with batch 1, {dtype}": rows} if rows else {}, notes)


def lengths(max_tokens: int) -> list[int]:
    """16, 64, 256, ... up to max_tokens."""
    marks = [FIRST]
    while marks[-1] * FACTOR <= max_tokens:
        marks.append(marks[-1] * FACTOR)
    return marks


def measure(runs: list[RunDir], marks: list[int], protocol: dict[str, Any]) -> list[Row]:
    """Measure the runs in turn and write the file of each after the last of its repeats.

    Returns:
        The rows of all files, each with the name of its run.
    """
    costs: dict[Path, list[Costs]] = {run.path: [] for run in runs}
    measured: dict[str, list[Row]] = {}

    def candidate(run: RunDir) -> None:
        # loaded each time: holding every model of a suite at once may not be possible
        model = open_model(run, marks[-1], protocol)
        list(walk(model, marks[:1], protocol["chunk_len"]))  # warm-up
        costs[run.path].append(list(walk(model, marks, protocol["chunk_len"])))
        if len(costs[run.path]) == protocol["repeats"]:
            peaks = in_fresh_process(peaks_of, run.path, marks, protocol)
            rows = cost_rows(model, marks, costs[run.path], peaks)
            of_run = {"ctx_len": run.config.ctx_len, "ctx_len_measured": model.max_ctx}
            write_json(run.benchmarks / OUTPUT, {"protocol": protocol | of_run, "rows": rows})
            measured[run.name] = [{"run": run.name} | row for row in rows]

    candidates = {run.name: partial(candidate, run) for run in runs}
    interleaved(candidates, protocol["repeats"], warmup=0)
    return [row for run in runs for row in measured[run.name]]


def cost_rows(
    model: LanguageModel, marks: list[int], costs: list[Costs], peaks: list[int] | None
) -> list[Row]:
    """Medians over repeats (and over tokens decoded), computed state bytes, measured peaks."""
    return [
        {
            "n_tokens": n,
            "prefill_s": statistics.median(repeat[i][0] for repeat in costs),
            "decode_s": statistics.median(s for repeat in costs for s in repeat[i][1]),
            "state_bytes": model.state_bytes(1, n),
            "peak_mem_bytes": peaks[i] if peaks else None,
        }
        for i, n in enumerate(marks)
    ]


def open_model(run: RunDir, n_tokens: int, protocol: dict[str, Any]) -> LanguageModel:
    """A run's model, with a context that holds n_tokens and those generated after them."""
    n = n_tokens + DECODED  # no weight depends on the context
    return load_model(run, CHECKPOINT, protocol["device"], protocol["dtype"], ctx_len=n)


@torch.inference_mode()
def walk(
    model: LanguageModel, marks: list[int], chunk_len: int
) -> Iterator[tuple[float, list[float]]]:
    """At each length: seconds to read so many tokens, and of each token generated after them.

    Lengths beyond a chunk continue from the state of the one before, where that ended with a chunk.
    """
    device = model.emb.weight.device
    random = torch.Generator().manual_seed(0)
    text = torch.randint(model.vocab_size, (1, marks[-1]), generator=random).to(device)
    state, n_read, prefill_s = model.init_state(1), 0, 0.0
    for n in marks:
        if n_read % chunk_len:
            state, n_read, prefill_s = model.init_state(1), 0, 0.0
        start = clock(device)
        x, state = prefill(model, text[:, n_read:n], state, chunk_len)
        token = sample(model.head(x), Sampling())
        prefill_s += clock(device) - start
        n_read = n
        yield prefill_s, decode(model, token, state)


def decode(model: LanguageModel, token: Tensor, state: State) -> list[float]:
    """Seconds of each of the tokens that follow `token` (1,)."""
    seconds = []
    for _ in range(DECODED):
        start = clock(token.device)
        x, state = prefill(model, token[:, None], state)
        token = sample(model.head(x), Sampling())
        seconds.append(clock(token.device) - start)
    return seconds


def peaks_of(path: Path, marks: list[int], protocol: dict[str, Any]) -> list[int] | None:
    """Peak bytes beyond the weights up to each length, of the process this is called in.

    None where the system does not tell a peak.
    """
    torch.set_num_threads(protocol["n_threads"])
    return_freed_memory()
    model = open_model(RunDir(path), marks[-1], protocol)
    list(walk(model, marks[:1], protocol["chunk_len"]))  # libraries load what they need
    return_freed_memory()  # that of loading
    device = torch.device(protocol["device"])
    if not reset_peak_memory(device):
        return None
    before = peak_memory_bytes(device)
    return [peak_memory_bytes(device) - before for _ in walk(model, marks, protocol["chunk_len"])]
