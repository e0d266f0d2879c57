"""bench=generate: what it writes into run directories, and when it does not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_method
from omegaconf import OmegaConf

from experiments.benchmarks import generate as bench_generate
from experiments.benchmarks.generate import generate, lengths, open_model, peak_memory, walk
from experiments.benchmarks.measure import Report
from experiments.config.entry import CONF_DIR
from experiments.runs.run_dir import RunDir
from experiments.runs.trained_model import load_model
from experiments.system.files import write_json
from models.gpt.model import GPT
from models.language_model import State

RWKV_NET = {
    "_target_": "models.rwkv4.model.RWKV4",
    "vocab_size": 256,
    "n_layer": 2,
    "n_embd": 8,
    "ctx_len": 32,
}
GPT_NET = RWKV_NET | {"_target_": "models.gpt.model.GPT", "n_head": 2, "rotary_pct": 0.5}


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
        "run": None, "suite": "suite", "max_tokens": 64, "chunk_len": 32, "repeats": 2,
        "device": "cpu", "dtype": "float32", "force": False, "runs_root": str(root),
    }  # fmt: skip
    return generate(**(settings | changes))


@pytest.fixture(autouse=True)
def no_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring of memory starts a process: only where a test asks for it."""
    if "slow" not in request.keywords:
        peaks = [100, 200, 300, 400]
        monkeypatch.setattr(bench_generate, "peak_memory", lambda run, marks, protocol: peaks)


def test_generate_writes_the_cost_into_each_run(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "rwkv", RWKV_NET), make_run(tmp_path, "gpt", GPT_NET)]
    unfinished = make_run(tmp_path, "unfinished", RWKV_NET)
    (unfinished.path / "result.json").unlink()
    report = measured(tmp_path)
    for run in runs:
        content = json.loads((run.path / "bench" / "generate.json").read_text())
        assert content["protocol"] == {
            "batch_size": 1, "n_threads": 1, "dtype": "float32", "device": "cpu",
            "chunk_len": 32, "repeats": 2, "checkpoint": "last", "ctx_len": 32,
            "ctx_len_measured": None if run is runs[0] else 64 + 16,
        }  # fmt: skip
        rows = content["rows"]
        assert [row["n_tokens"] for row in rows] == [16, 64]
        assert all(row["prefill_s"] > 0 and row["decode_s"] > 0 for row in rows)
        assert [row["peak_mem_bytes"] for row in rows] == [100, 200]
        assert [row["state_bytes"] for row in rows] == [
            load_model(run, "last").state_bytes(1, n) for n in (16, 64)
        ]
    assert not (unfinished.path / "bench").exists()
    assert report.notes[0] == "2 measured, 0 measured before, 1 left out (not finished)."


def test_generate_measures_again_only_when_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, "rwkv", RWKV_NET)
    measured(tmp_path)
    old = bench_generate.output(run).read_text()
    rounds = iter([(1.0, [1.0, 2.0, 9.0]), (3.0, [4.0, 5.0, 6.0])])

    def fake(model: Any, marks: list[int], chunk_len: int) -> list:
        return [] if marks == [16] else [(0.5, [0.1]), next(rounds)]

    monkeypatch.setattr(bench_generate, "walk", fake)
    assert measured(tmp_path).notes[0].startswith("0 measured, 1 measured before")
    assert bench_generate.output(run).read_text() == old
    (table,) = measured(tmp_path, force=True).tables.values()
    assert bench_generate.output(run).read_text() != old
    state = {"state_bytes": 2 * 5 * 8 * 4}
    assert table == [
        {"run": run.name, "n_tokens": 16, "prefill_tokens_per_s": 16 / 0.5,
         "decode_ms_per_token": 100.0, **state, "peak_mem_bytes": 100},
        {"run": run.name, "n_tokens": 64, "prefill_tokens_per_s": 64 / 2.0,
         "decode_ms_per_token": 4500.0, **state, "peak_mem_bytes": 200},
    ]  # fmt: skip


@pytest.mark.parametrize("net", [RWKV_NET, GPT_NET], ids=["rwkv", "gpt"])
def test_a_walk_reads_in_whole_chunks_and_decodes_at_each_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, net: dict[str, Any]
) -> None:
    protocol = {"device": "cpu", "dtype": "float32"}
    model = open_model(make_run(tmp_path, "run", net), 256, protocol)
    lengths_read: list[list[int]] = []
    features = model.features

    def spy(ids: torch.Tensor, state: State | None = None) -> tuple:
        lengths_read[-1].append(ids.shape[1])
        return features(ids, state)

    monkeypatch.setattr(model, "features", spy)
    going = walk(model, [16, 64, 128, 256], 32)
    costs = []
    for _ in range(4):
        lengths_read.append([])
        costs.append(next(going))
    # 16 ended within a chunk, so 64 starts anew; 64 did not, so what follows goes on from there
    assert lengths_read == [
        [16] + [1] * 16, [32] * 2 + [1] * 16, [32] * 2 + [1] * 16, [32] * 4 + [1] * 16
    ]  # fmt: skip
    assert costs[1][0] < costs[2][0] < costs[3][0]  # cumulative
    assert [len(tokens) for _, tokens in costs] == [16] * 4


def test_generate_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run=DIR"):
        measured(tmp_path, suite=None)
    with pytest.raises(ValueError, match="max_tokens is 8"):
        measured(tmp_path, max_tokens=8)
    with pytest.raises(ValueError, match="chunk_len is 0"):
        measured(tmp_path, chunk_len=0)
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got 'int8'"):
        measured(tmp_path, dtype="int8")
    with pytest.raises(FileNotFoundError, match="no run directory"):
        measured(tmp_path)


@pytest.mark.parametrize(
    ("changes", "n_threads"),
    [({"max_tokens": 16}, 1), ({"repeats": 1}, 1), ({"dtype": "bfloat16"}, 1), ({}, 2)],
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


@pytest.mark.parametrize(
    ("most", "expected"), [(16, [16]), (100, [16, 64]), (65536, [16 * 4**i for i in range(7)])]
)
def test_lengths_quadruple(most: int, expected: list[int]) -> None:
    assert lengths(most) == expected


def test_a_gpt_opens_past_its_context_with_the_same_weights(tmp_path: Path) -> None:
    run = make_run(tmp_path, "gpt", GPT_NET)
    protocol = {"device": "cpu", "dtype": "float32"}
    longer = open_model(run, 48, protocol)
    assert isinstance(longer, GPT)
    assert longer.max_ctx == 48 + 16
    assert not longer.training
    ids = torch.randint(256, (1, 32))
    assert torch.equal(longer(ids)[0], load_model(run, "last")(ids)[0])
    assert open_model(run, 8, protocol).max_ctx == 32
    assert run.config.ctx_len == run.config.model.net.ctx_len == 32  # the run's own is left alone


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is Linux's to tell")
def test_memory_grows_with_a_gpts_cache_and_not_with_rwkvs_state(tmp_path: Path) -> None:
    wide = {"n_embd": 128}
    runs = [make_run(tmp_path, "rwkv", RWKV_NET | wide), make_run(tmp_path, "gpt", GPT_NET | wide)]
    protocol = {"device": "cpu", "dtype": "float32", "chunk_len": 64, "n_threads": 1}
    rwkv, gpt = (peak_memory(run, [256, 4096], protocol) for run in runs)
    assert rwkv is not None
    assert gpt is not None
    cache = load_model(runs[1], "last").state_bytes(1, 4096)  # 8 MiB
    assert rwkv[1] < rwkv[0] + 2**20 < cache / 2
    assert cache < gpt[1] < 4 * cache


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
