"""bench=generate: what it measures, and what it writes into run directories."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.benchmarks import generate as bench_generate
from experiments.benchmarks.generate import generate, lengths, open_model, peaks_of, walk
from experiments.benchmarks.measure import Report, in_fresh_process
from experiments.runs.trained_model import load_model
from models.language_model import State

from ...random_runs import FAMILIES, GROWING, random_run

PROTOCOL = {"device": "cpu", "dtype": "float32", "chunk_len": 64, "n_threads": 1}


def measured(root: Path, **changes: Any) -> Report:
    settings: dict[str, Any] = {
        "run": None, "suite": "suite", "max_tokens": 64, "chunk_len": 32, "repeats": 2,
        "device": "cpu", "dtype": "float32", "runs_root": str(root),
    }  # fmt: skip
    return generate(**(settings | changes))


@pytest.fixture
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring of memory starts a process."""
    monkeypatch.setattr(bench_generate, "in_fresh_process", lambda *args: [100, 200])


@pytest.mark.usefixtures("_no_processes")
def test_the_cost_is_written_into_each_run(tmp_path: Path) -> None:
    runs = [random_run(tmp_path, family, ctx_len=32) for family in FAMILIES]
    unfinished = random_run(tmp_path, FAMILIES[0], seed=1)
    unfinished.result_file.unlink()
    report = measured(tmp_path)
    for run, family in zip(runs, FAMILIES, strict=True):
        content = json.loads((run.path / "bench" / "generate.json").read_text())
        assert content["protocol"] == {
            "batch_size": 1, "n_threads": 1, "dtype": "float32", "device": "cpu",
            "chunk_len": 32, "repeats": 2, "checkpoint": "last", "ctx_len": 32,
            "ctx_len_measured": 64 + 16 if family in GROWING else None,
        }  # fmt: skip
        rows = content["rows"]
        assert [row["n_tokens"] for row in rows] == [16, 64]
        assert all(row["prefill_s"] > 0 and row["decode_s"] > 0 for row in rows)
        assert [row["peak_mem_bytes"] for row in rows] == [100, 200]
        sizes = [load_model(run, "last").state_bytes(1, n) for n in (16, 64)]
        assert [row["state_bytes"] for row in rows] == sizes
    assert not unfinished.benchmarks.exists()
    assert report.notes[0] == f"{len(runs)} measured, 1 left out (not finished)."
    (table,) = report.tables.values()
    assert [row["run"] for row in table] == [run.name for run in runs for _ in (16, 64)]


def test_medians_are_over_repeats_and_tokens(tmp_path: Path) -> None:
    model = load_model(random_run(tmp_path, FAMILIES[0]), "last")
    costs = [[(1.0, [1.0, 2.0, 9.0])], [(3.0, [4.0, 5.0, 6.0])]]
    (row,) = bench_generate.cost_rows(model, [16], costs, None)
    assert (row["prefill_s"], row["decode_s"], row["peak_mem_bytes"]) == (2.0, 4.5, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_reads_in_whole_chunks_and_decodes_at_each_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = open_model(random_run(tmp_path, family), 256, PROTOCOL)
    lengths_read: list[list[int]] = []
    features = model.features

    def spy(ids: torch.Tensor, state: State | None = None) -> tuple:
        lengths_read[-1].append(ids.shape[1])
        return features(ids, state)

    monkeypatch.setattr(model, "features", spy)
    steps = walk(model, [16, 64, 128, 256], 32)
    costs = []
    for _ in range(4):
        lengths_read.append([])
        costs.append(next(steps))
    # 16 ended within a chunk, so 64 starts again; 64 did not, so what follows continues from there
    assert lengths_read == [
        [16] + [1] * 16, [32] * 2 + [1] * 16, [32] * 2 + [1] * 16, [32] * 4 + [1] * 16
    ]  # fmt: skip
    assert costs[1][0] < costs[2][0] < costs[3][0]  # cumulative
    assert [len(tokens) for _, tokens in costs] == [16] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": None}, "run=DIR"),
        ({"max_tokens": 8}, "max_tokens is 8"),
        ({"chunk_len": 0}, "chunk_len is 0"),
        ({"dtype": "int8"}, "dtype must be one of .*, got 'int8'"),
        ({"device": "abacus"}, "device=abacus cannot be used here"),
        ({"suite": "none"}, "no run directory"),
    ],
)
def test_what_cannot_be_measured_is_said(tmp_path: Path, changes: dict, message: str) -> None:
    random_run(tmp_path, FAMILIES[0])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        measured(tmp_path, **changes)


@pytest.mark.usefixtures("_no_processes")
def test_what_was_measured_stays_when_a_later_run_fails(tmp_path: Path) -> None:
    runs = [random_run(tmp_path, FAMILIES[0], seed=seed) for seed in (0, 1)]
    runs[1].checkpoint("last").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        measured(tmp_path, repeats=1)
    assert (runs[0].benchmarks / "generate.json").is_file()


def test_lengths_quadruple() -> None:
    assert lengths(16) == [16]
    assert lengths(100) == [16, 64]
    assert lengths(65536) == [16 * 4**i for i in range(7)]


@pytest.mark.parametrize("family", GROWING)
def test_a_longer_context_has_the_same_weights(tmp_path: Path, family: str) -> None:
    run = random_run(tmp_path, family)
    longer = open_model(run, 100, PROTOCOL)
    assert longer.max_ctx == 100 + 16
    ids = torch.randint(256, (1, 64))
    assert torch.equal(longer(ids)[0], load_model(run, "last")(ids)[0])
    assert run.config.ctx_len == run.config.model.net.ctx_len == 64  # the run's is left alone


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is Linux's to tell")
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_grows_with_a_cache_alone(tmp_path: Path, family: str) -> None:
    run = random_run(tmp_path, family, n_embd=128)
    peaks = in_fresh_process(peaks_of, run.path, [1024, 4096], PROTOCOL)
    cache = load_model(run, "last").state_bytes(1, 4096)
    if family in GROWING:
        assert cache < peaks[1] < 4 * cache
    else:
        assert peaks[1] < 1.5 * peaks[0]
