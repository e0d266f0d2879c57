"""bench=generate: what it writes into run directories, and when it does not."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_method
from omegaconf import OmegaConf

from experiments import bench_generate
from experiments.bench_generate import generate, lengths, open_model, timed_generation
from experiments.bench_measure import Report
from experiments.entry import CONF_DIR
from experiments.run_dir import RunDir, load_model, write_json
from models.gpt import GPT

RWKV_NET = {
    "_target_": "models.rwkv4.RWKV4",
    "vocab_size": 256,
    "n_layer": 2,
    "n_embd": 8,
    "ctx_len": 32,
}
GPT_NET = RWKV_NET | {"_target_": "models.gpt.GPT", "n_head": 2, "rotary_pct": 0.5}


def make_run(root: Path, name: str, net: dict[str, Any]) -> RunDir:
    """A finished run directory with random weights."""
    path = root / "suite" / name / "seed=0"
    (path / "checkpoints").mkdir(parents=True)
    config = {"ctx_len": net["ctx_len"], "model": {"name": name, "net": net}}
    OmegaConf.save(OmegaConf.create(config), path / "config.yaml")
    model = get_method(net["_target_"])(**{k: v for k, v in net.items() if k != "_target_"})
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": weights}, path / "checkpoints" / "last.ckpt")
    write_json(path / "result.json", {})
    return RunDir(path)


def measured(root: Path, **changes: Any) -> Report:
    settings: dict[str, Any] = {
        "run": None, "suite": "suite", "max_tokens": 64, "repeats": 2, "device": "cpu",
        "force": False, "runs_root": str(root),
    }  # fmt: skip
    return generate(**(settings | changes))


def test_generate_writes_the_cost_into_each_run(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "rwkv", RWKV_NET), make_run(tmp_path, "gpt", GPT_NET)]
    unfinished = make_run(tmp_path, "unfinished", RWKV_NET)
    (unfinished.path / "result.json").unlink()
    report = measured(tmp_path)
    for run in runs:
        content = json.loads((run.path / "bench" / "generate.json").read_text())
        assert content["protocol"] == {
            "batch_size": 1, "n_threads": 1, "dtype": "float32", "device": "cpu",
            "prompt_tokens": 1, "repeats": 2, "checkpoint": "last", "ctx_len": 32,
            "ctx_len_measured": None if run is runs[0] else 64,
        }  # fmt: skip
        rows = content["rows"]
        assert [row["n_tokens"] for row in rows] == [16, 32, 64]
        assert sorted(row["seconds"] for row in rows) == [row["seconds"] for row in rows]
        assert [row["state_bytes"] for row in rows] == [
            load_model(run, "last").state_bytes(1, n) for n in (16, 32, 64)
        ]
    assert not (unfinished.path / "bench").exists()
    assert report.notes[0] == "2 measured, 0 measured before, 1 left out (not finished)."


def test_generate_measures_again_only_when_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, "rwkv", RWKV_NET)
    measured(tmp_path)
    old = bench_generate.output(run).read_text()
    monkeypatch.setattr(bench_generate, "timed_generation", lambda model, marks: [1.0, 2.0, 9.0])
    assert measured(tmp_path).notes[0].startswith("0 measured, 1 measured before")
    assert bench_generate.output(run).read_text() == old
    (table,) = measured(tmp_path, force=True).tables.values()
    assert bench_generate.output(run).read_text() != old
    assert table == [
        {"run": run.name, "seconds@16": 1.0, "seconds@64": 9.0, "tokens_per_s": 48 / 8,
         "state_bytes": 2 * 5 * 8 * 4}
    ]  # fmt: skip


def test_generate_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run=DIR"):
        measured(tmp_path, suite=None)
    with pytest.raises(ValueError, match="max_tokens is 8"):
        measured(tmp_path, max_tokens=8)
    with pytest.raises(FileNotFoundError, match="no run directory"):
        measured(tmp_path)


@pytest.mark.parametrize(
    ("changes", "n_threads"), [({"max_tokens": 32}, 1), ({"repeats": 1}, 1), ({}, 2)]
)
def test_generate_measures_again_what_was_measured_otherwise(
    tmp_path: Path, changes: dict[str, int], n_threads: int
) -> None:
    run = make_run(tmp_path, "rwkv", RWKV_NET)
    measured(tmp_path)
    torch.set_num_threads(n_threads)
    assert measured(tmp_path, **changes).notes[0].startswith("1 measured, 0 measured before")
    content = json.loads(bench_generate.output(run).read_text())
    assert content["protocol"]["n_threads"] == n_threads
    assert content["rows"][-1]["n_tokens"] == changes.get("max_tokens", 64)
    assert measured(tmp_path, **changes).notes[0].startswith("0 measured, 1 measured before")


def test_generate_measures_again_what_is_damaged(tmp_path: Path) -> None:
    run = make_run(tmp_path, "rwkv", RWKV_NET)
    (run.path / "bench").mkdir()
    for text in ("{", "[]", '{"protocol": {}, "rows": []}'):
        bench_generate.output(run).write_text(text)
        assert measured(tmp_path).notes[0].startswith("1 measured")


def test_what_was_measured_stays_when_a_later_run_fails(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name, RWKV_NET) for name in ("a", "b")]
    (runs[1].path / "checkpoints" / "last.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        measured(tmp_path, repeats=1)
    assert bench_generate.output(runs[0]).is_file()


@pytest.mark.parametrize(("most", "expected"), [(16, [16]), (100, [16, 32, 64])])
def test_lengths_double(most: int, expected: list[int]) -> None:
    assert lengths(most) == expected


def test_a_gpt_opens_past_its_context_with_the_same_weights(tmp_path: Path) -> None:
    run = make_run(tmp_path, "gpt", GPT_NET)
    longer = open_model(run, 48, "cpu")
    assert isinstance(longer, GPT)
    assert longer.max_ctx == 48
    assert not longer.training
    ids = torch.randint(256, (1, 32))
    assert torch.equal(longer(ids)[0], load_model(run, "last")(ids)[0])
    assert open_model(run, 32, "cpu").max_ctx == 32


@pytest.mark.slow
def test_entry_prints_the_machine_and_writes_json(tmp_path: Path) -> None:
    run = make_run(tmp_path, "rwkv", RWKV_NET)
    out = tmp_path / "out.json"
    args = ["bench=generate", f"run='{run.path}'", "max_tokens=16", "repeats=1", "n_threads=1"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmark", *args, f"out={out}"],
        cwd=CONF_DIR.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "1 threads, torch " in done.stdout
    assert done.stderr == ""  # no progress bar where nobody watches
    content = json.loads(out.read_text())
    assert content["bench"] == "generate"
    assert content["machine"]["n_threads"] == 1
    assert content["settings"]["max_tokens"] == 16
    protocol = json.loads(bench_generate.output(run).read_text())["protocol"]
    assert protocol["n_threads"] == 1
    assert [row["run"] for rows in content["tables"].values() for row in rows] == [run.name]


def test_timed_generation_has_one_time_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0

    def fake(model: Any, prompts: Any, n: int, stop: Callable[[int, list[int]], bool]) -> None:
        nonlocal now
        new: list[int] = []
        for _ in range(n):
            now += 1
            new.append(0)
            assert not stop(0, new)

    monkeypatch.setattr(bench_generate, "generate_ids", fake)
    monkeypatch.setattr("time.perf_counter", lambda: now)
    assert timed_generation(None, [16, 32, 64]) == [16, 32, 64]  # type: ignore[arg-type]
