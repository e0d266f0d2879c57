"""bench=generate: what generating text costs, measured on trained runs, next to their results."""

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from experiments.bench_measure import Report, Row, check_counts, interleaved, read_rows
from experiments.run_dir import RunDir, find_runs, load_model, write_json
from models.generation import generate as generate_ids
from models.language_model import LanguageModel

FIRST = 16  # the shortest length measured; the next ones double
PROMPT = [[0]]  # batch 1, one token: the cost does not depend on which


def generate(
    run: str | list[str] | None,
    suite: str | None,
    max_tokens: int,
    repeats: int,
    device: str,
    force: bool,
    runs_root: str,
) -> Report:
    """Seconds to generate 16, 32, ... tokens with each run, into its bench/generate.json.

    Raises:
        ValueError: unless exactly one of run and suite is given, or if max_tokens is too small.
        FileNotFoundError: if no run directory is there.
    """
    if (run is None) == (suite is None):
        raise ValueError("give the runs to measure: run=DIR (or a glob), or suite=NAME")
    check_counts(max_tokens=max_tokens, repeats=repeats)
    if max_tokens < FIRST:
        raise ValueError(f"max_tokens is {max_tokens}: the first length measured is {FIRST}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = find_runs(run if run is not None else str(Path(runs_root) / str(suite) / "*" / "*"))
    finished = [one for one in found if one.finished]
    wanted = [one for one in finished if force or not output(one).is_file()]
    measure(wanted, lengths(max_tokens), repeats, device)
    rows = [table_row(one, read_rows(output(one))) for one in finished]
    notes = [
        f"{len(wanted)} measured, {len(finished) - len(wanted)} measured before, "
        f"{len(found) - len(finished)} left out (not finished).",
        "Seconds are cumulative medians; state bytes are computed. A GPT is measured past its "
        "trained context, opened with a longer one: what it writes there is poor, its cost right.",
    ]
    return Report({"Generating with batch 1, float32": rows} if rows else {}, notes)


def output(run: RunDir) -> Path:
    """Where a run keeps its generation cost."""
    return run.path / "bench" / "generate.json"


def lengths(max_tokens: int) -> list[int]:
    """16, 32, 64, ... up to max_tokens."""
    return [FIRST << i for i in range((max_tokens // FIRST).bit_length())]


def measure(runs: list[RunDir], marks: list[int], repeats: int, device: str) -> None:
    """Measure the runs in turn and write the file of each."""
    seconds: dict[Path, list[list[float]]] = {run.path: [] for run in runs}

    def candidate(run: RunDir) -> float:
        # loaded each time: holding every model of a suite at once may not be possible
        model = open_model(run, marks[-1], device)
        timed_generation(model, marks[:1])  # warm-up
        seconds[run.path].append(timed_generation(model, marks))
        return seconds[run.path][-1][-1]

    interleaved({run.name: partial(candidate, run) for run in runs}, repeats, warmup=0)
    for run in runs:
        model = open_model(run, marks[-1], device)
        protocol = {
            "batch_size": 1,
            "n_threads": torch.get_num_threads(),
            "dtype": str(model.emb.weight.dtype).removeprefix("torch."),
            "device": device,
            "prompt_tokens": len(PROMPT[0]),
            "repeats": repeats,
            "ctx_len": run.config.ctx_len,
            "ctx_len_measured": model.max_ctx,
        }
        rows = [
            {
                "n_tokens": n,
                "seconds": statistics.median(repeat[i] for repeat in seconds[run.path]),
                "state_bytes": model.state_bytes(1, n),
                "peak_mem_bytes": None,  # not to be told apart from the process's other memory
            }
            for i, n in enumerate(marks)
        ]
        write_json(output(run), {"protocol": protocol, "rows": rows})


def open_model(run: RunDir, n_tokens: int, device: str) -> LanguageModel:
    """A run's model, able to hold n_tokens: where max_ctx is less, with a longer one."""
    model = load_model(run, device=device)
    if model.max_ctx is None or model.max_ctx >= n_tokens:
        return model
    longer = instantiate(run.config.model.net, ctx_len=n_tokens)
    longer.load_state_dict(model.state_dict())  # positions are rotary: nothing to grow
    return longer.to(device).eval()


def timed_generation(model: LanguageModel, marks: list[int]) -> list[float]:
    """Seconds from the start until so many tokens were generated, for each mark."""
    seconds: list[float] = []

    def stop(row: int, ids: list[int]) -> bool:
        if len(ids) in marks[:-1]:
            seconds.append(time.perf_counter() - start)
        return False

    start = time.perf_counter()
    generate_ids(model, PROMPT, marks[-1], stop=stop)
    return [*seconds, time.perf_counter() - start]


def table_row(run: RunDir, rows: list[dict[str, Any]]) -> Row:
    """A run's cost at its shortest and its longest length."""
    first, last = rows[0], rows[-1]
    row: Row = {"run": run.name}
    for at in (first, last):
        row[f"seconds@{at['n_tokens']}"] = at["seconds"]
    n_new = last["n_tokens"] - first["n_tokens"]
    row["tokens_per_s"] = n_new / (last["seconds"] - first["seconds"]) if n_new else None
    return row | {"state_bytes": last["state_bytes"]}
