"""bench=generate: what generating text costs, measured on trained runs, next to their results."""

import json
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

CHECKPOINT = "last"  # every run has it at the same budget
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

    A run is not measured again if its file has the same protocol and lengths, unless `force`.

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
    marks, protocol = lengths(max_tokens), asked_protocol(device, repeats)
    wanted = [one for one in finished if force or not is_measured(one, protocol, marks)]
    measure(wanted, marks, protocol)
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


def asked_protocol(device: str, repeats: int) -> dict[str, Any]:
    """How every run of a benchmark is measured."""
    return {
        "batch_size": 1,
        "n_threads": torch.get_num_threads(),
        "dtype": "float32",  # what weights are kept in, whatever a run was trained in
        "device": device,
        "prompt_tokens": len(PROMPT[0]),
        "repeats": repeats,
        "checkpoint": CHECKPOINT,
    }


def is_measured(run: RunDir, protocol: dict[str, Any], marks: list[int]) -> bool:
    """True if a run's file was made under this protocol and ends at the same length."""
    try:
        content = json.loads(output(run).read_text(encoding="utf-8"))
        same = all(content["protocol"][key] == value for key, value in protocol.items())
        return same and content["rows"][-1]["n_tokens"] == marks[-1]
    except (OSError, ValueError, LookupError, TypeError):
        return False  # none, or a damaged one


def measure(runs: list[RunDir], marks: list[int], protocol: dict[str, Any]) -> None:
    """Measure the runs in turn and write the file of each after the last of its repeats."""
    seconds: dict[Path, list[list[float]]] = {run.path: [] for run in runs}

    def candidate(run: RunDir) -> float:
        # loaded each time: holding every model of a suite at once may not be possible
        model = open_model(run, marks[-1], protocol["device"])
        timed_generation(model, marks[:1])  # warm-up
        mine = seconds[run.path]
        mine.append(timed_generation(model, marks))
        if len(mine) == protocol["repeats"]:
            of_run = {"ctx_len": run.config.ctx_len, "ctx_len_measured": model.max_ctx}
            content = {"protocol": protocol | of_run, "rows": cost_rows(model, marks, mine)}
            write_json(output(run), content)
        return mine[-1][-1]

    repeats = protocol["repeats"]
    interleaved({run.name: partial(candidate, run) for run in runs}, repeats, warmup=0)


def cost_rows(model: LanguageModel, marks: list[int], seconds: list[list[float]]) -> list[Row]:
    """Median seconds and computed state bytes at each mark."""
    return [
        {
            "n_tokens": n,
            "seconds": statistics.median(repeat[i] for repeat in seconds),
            "state_bytes": model.state_bytes(1, n),
            "peak_mem_bytes": None,  # not to be told apart from the process's other memory
        }
        for i, n in enumerate(marks)
    ]


def open_model(run: RunDir, n_tokens: int, device: str) -> LanguageModel:
    """A run's model, able to hold n_tokens: where max_ctx is less, with a longer one."""
    model = load_model(run, CHECKPOINT, device)
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
