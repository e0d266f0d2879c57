"""Every bench at toy size: it runs for every family, its tables hold what they say, its byte and
FLOP counts are exact."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import initialize_config_dir

from experiments.benchmarks import loss as bench_loss
from experiments.benchmarks import models, self_test
from experiments.benchmarks import sweep as bench_sweep
from experiments.benchmarks import train as bench_train
from experiments.benchmarks.checkpoint import checkpoint
from experiments.benchmarks.decode import check_agreement, decode, of_ours, weight_bytes
from experiments.benchmarks.models import at_size, hugging_face, with_random_weights
from experiments.benchmarks.overhead import Loops, overhead
from experiments.benchmarks.train import Candidate, empty, step_flops, train, training_step
from experiments.benchmarks.wkv import wkv_op
from experiments.config.entry import CONF_DIR, RunFailed
from experiments.runs.metrics import MetricsFile
from models.families import families
from models.language_model import count_parameters

from ...random_runs import FAMILIES

SIZE = {"name": "toy", "reference": "rwkv4", "n_layer": 2, "n_embd": 16, "n_head": 2}
LABELS = [family.label for family in families().values()]


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured in fresh processes, which take seconds to start; one test does."""

    def peak(build: Callable[..., Any], toy: dict[str, Any], full: dict[str, Any]) -> int:
        build(**toy)()
        return 7

    monkeypatch.setattr(bench_train, "peak_memory", peak)
    monkeypatch.setattr(bench_loss, "peak_memory", peak)
    monkeypatch.setattr(bench_train, "MATMUL_SIZES", (8, 16))


@pytest.mark.slow
def test_train_measures_every_family_and_its_external_twin() -> None:
    report = train(SIZE, vocab_size=64, ctx_len=8, batch_size=2, repeats=1)
    rows, ratios, limits = report.tables.values()
    twins = [f"Hugging Face's {label}" for label in LABELS]
    assert [row["model"] for row in rows] == LABELS + LABELS + twins
    for row in rows:
        assert row["tokens_per_s"] * row["step_s"] == pytest.approx(2 * 8)
        assert row["peak_mem_bytes"] == 7
    best = next(row["GFLOP/s"] for row in limits if row["precision"] == "32-true")
    assert rows[0]["of limit"] == pytest.approx(rows[0]["GFLOP/s"] / best)
    n = len(LABELS)
    assert len(ratios) == n * (n - 1) // 2 + 2 * n * (2 * n - 1) // 2
    assert report.text()


def test_families_and_their_twins_have_the_same_size() -> None:
    small = {**SIZE, "n_layer": 6, "n_embd": 256, "n_head": 8}
    totals = []
    for family, arguments in at_size(small, 4096, 512).items():
        model = empty(family, arguments)
        totals.append(count_parameters(model)["total"])
        with torch.device("meta"):
            external = hugging_face(model)
        assert external is not None
        assert sum(p.numel() for p in external.parameters()) == totals[-1]
    assert max(totals) == pytest.approx(min(totals), rel=1e-3)


def test_matmul_flops_of_a_step_by_hand() -> None:
    arguments = at_size(SIZE, 64, 8)["rwkv4"]
    # forward multiply-adds a token: head 64 x 16, two layers of 13 x 16^2; 16 tokens, 3 passes
    assert step_flops(empty("rwkv4", arguments), 2) == 3 * 16 * 2 * (64 * 16 + 2 * 13 * 16**2)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_trains(family: str, external: bool) -> None:
    precision = "32-true" if external else "bf16-mixed"
    step = training_step(Candidate(family, external, precision), None, 2)
    losses = [float(step()) for _ in range(20)]
    assert 3 < losses[0] < 6  # near ln 64
    assert losses[-1] < losses[0] - 0.01


def test_loss_compares_with_full() -> None:
    (rows,) = bench_loss.loss(**bench_loss.TOY, repeats=2).tables.values()
    kinds = [(row["precision"], row["loss"]) for row in rows]
    assert kinds == list(product(("32-true", "bf16-mixed"), ("full", "chunked")))
    assert [row["time over full"] for row in rows if row["loss"] == "full"] == [1, 1]
    assert all(row["seconds"] > 0 for row in rows)


@pytest.fixture
def overrides(tmp_path: Path) -> Iterator[list[str]]:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the hat. " * 400)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield [
            "size=pico", "data=text", f"data.source.paths={text}", "data.val_tokens=256",
            "ctx_len=16", "batch_size=2", f"paths.data={tmp_path}", "execution.log_every=2",
        ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_both_loops_do_the_same_maths(overrides: list[str], tmp_path: Path, family: str) -> None:
    given = [*overrides, f"model={family}", "optim=own"]
    loops = Loops(given, 5, str(tmp_path / "runs"))
    assert loops.lightning() > 0
    logged = loops.model
    log = MetricsFile(loops.run.metrics_file)
    assert [step for step, _ in log.column("train/loss")] == [2, 4, 5]
    assert loops.bare() > 0
    assert loops.model is not logged
    for bare, lightning in zip(loops.model.parameters(), logged.parameters(), strict=True):
        assert torch.equal(bare, lightning)


def test_overhead_is_a_ratio_to_the_bare_loop(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loops, "bare", lambda self: 2.0)
    monkeypatch.setattr(Loops, "lightning", lambda self: 2.06)
    (rows,) = overhead(overrides, n_steps=4, repeats=2).tables.values()
    assert [row["step_s"] for row in rows] == pytest.approx([1.0, 1.03])
    assert [row["time over bare"] for row in rows] == pytest.approx([1, 1.03])
    assert rows[0]["tokens_per_s"] == pytest.approx(2 * 16)
    with pytest.raises(ValueError, match="n_steps is 2"):
        overhead([], n_steps=2, repeats=1)


def test_wkv_measures_every_backend() -> None:
    speed, every = wkv_op("cpu", [(2, 8, 16), (1, 16, 4)], repeats=1).tables.values()
    assert [(row["B, T, C"], row["dtype"]) for row in speed] == [
        ("(2, 8, 16)", "float32"), ("(2, 8, 16)", "float16"), ("(2, 8, 16)", "bfloat16"),
        ("(1, 16, 4)", "float32"),
    ]  # fmt: skip
    for row in speed:
        n_bytes = 3 * 2 * 8 * 16 * (4 if row["dtype"] == "float32" else 2)
        if row["B, T, C"] == "(2, 8, 16)":
            assert row["forward GB/s"] * row["forward_ms"] * 1e6 == pytest.approx(n_bytes)
    assert [row["backend"] for row in every] == ["cuda", "cpu", "torch", "reference"]
    for row in every:
        assert row["not here"] or row["error float32"] <= self_test.TOLERANCES[torch.float32]


@pytest.mark.slow  # the other libraries take seconds to load
def test_decode_measures_what_is_installed() -> None:
    given: dict[str, Any] = {"vocab_size": 50, "lengths": [3, 20], "batch_size": 9}
    report = decode(SIZE, **given, n_tokens=2, stream_mb=1, repeats=1)
    rows, streams = report.tables.values()
    names = {row["model"] for row in rows}
    assert names == {*LABELS, *(f"Hugging Face's {label}" for label in LABELS), "rwkv package"}
    best = max(row["GB/s"] for row in streams) * 1e9
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_ms"] * 1e3)
        assert row["limit_ms"] == pytest.approx(row["read_bytes"] / best * 1e3)
        assert row["of limit"] == pytest.approx(row["limit_ms"] / row["step_ms"])
    assert {row["batch"] for row in rows} == {1, 9}


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_a_step(family: str) -> None:
    model = with_random_weights(family, at_size(SIZE, 50, 40)[family])
    total = sum(p.numel() for p in model.parameters())
    assert weight_bytes(model, model.emb) == 4 * (total - 50 * 16)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() != 2)
    assert of_ours(model, "bf16").weight_bytes == 2 * (total - 50 * 16) + 2 * vectors
    assert model.head.weight.dtype == torch.float32


def test_another_choice_of_tokens_is_noticed() -> None:
    family = FAMILIES[0]
    model = with_random_weights(family, at_size(SIZE, 50, 40)[family])
    ours, other = of_ours(model, "fp32"), of_ours(model, "fp32")
    with torch.inference_mode():
        check_agreement([ours, other], 4)
        step = ours.step
        other.step = lambda ids, state: ((step(ids, state)[0] + 1) % 50, state)
        with pytest.raises(RunFailed, match="where ours decodes"):
            check_agreement([ours, other], 4)


def test_without_the_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    model = with_random_weights(FAMILIES[0], at_size(SIZE, 50, 40)[FAMILIES[0]])
    assert hugging_face(model) is None


def test_what_a_save_costs(overrides: list[str], tmp_path: Path) -> None:
    given = " ".join(overrides)
    report = checkpoint([given, f"{given} size.n_layer=3"], str(tmp_path / "runs"), 1)
    rows, (seek,) = report.tables.values()
    # weights and two moments, float32, and little else
    assert rows[1]["file_bytes"] > rows[0]["file_bytes"] > 12 * 2 * 256 * 16
    for row in rows:
        assert min(row[key] for key in ("stands_s", "write_s", "copy_s", "check_s")) > 0
        assert row["share"] == pytest.approx((row["stands_s"] + row["write_cpu_s"]) / 300)
    assert 0 < seek["seconds"] < 1
    assert not list((tmp_path / "runs").iterdir())


def test_sweep_times_whole_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, ...]] = []

    def command(*overrides: str) -> None:
        given.append(overrides)
        folder = next(o.partition("=")[2] for o in overrides if o.startswith("paths.runs="))
        if "dry_run=true" in overrides:
            run = Path(folder) / "finished" / "m" / "seed=0"
            run.mkdir(parents=True)
            (run / "config.yaml").touch()

    monkeypatch.setattr(bench_sweep, "command", command)
    skipping, sharing = bench_sweep.measure(["model=m"], 7, 3, repeats=2).tables.values()
    assert skipping[0]["trials"] == 7
    assert [row["jobs"] for row in sharing] == [1, 2]
    assert "seed=range(7)" in given[0]
    jobs = [o for overrides in given for o in overrides if o.startswith("jobs=")]
    assert jobs == ["jobs=1", "jobs=2", "jobs=2", "jobs=1"]


@pytest.mark.slow
def test_a_sweep_that_fails_is_one_line() -> None:
    with pytest.raises(RunFailed, match="exit code 2: error: "):
        bench_sweep.command("nosuch=1")
