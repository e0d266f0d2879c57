"""Stories: train, kill, resume, refuse, fail; through the real trainer on a small text."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.callbacks import RunLog
from experiments.checkpoint_files import AtomicCheckpointIO
from experiments.config import plain
from experiments.entry import CONF_DIR, RunFailed, one_line
from experiments.fit import attempt, fit
from experiments.metrics import MetricsFile, summarise
from experiments.run_dir import RunDir, write_json
from experiments.trained_model import load_model, read_checkpoint
from models.language_model import LanguageModel

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["data=text", "debug=smoke", "trainer=cpu", "model.net.n_layer=2"]
FAMILIES = ["rwkv4_nano", "gpt_nano"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    return path


def freeze_in(runs: Path, text: Path, *overrides: str) -> RunDir:
    given = [
        *SMALL,
        f"data.source.paths={text}",
        "data.val_tokens=500",
        f"paths.runs={runs}",
        f"paths.data={text.parent / 'data'}",
        *overrides,
    ]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return RunDir.freeze(compose("train", overrides=given), overrides)


@pytest.fixture
def freeze(tmp_path: Path, text: Path) -> Callable[..., RunDir]:
    def make(*overrides: str, runs: str = "runs") -> RunDir:
        return freeze_in(tmp_path / runs, text, *overrides)

    return make


def rows(run: RunDir) -> list[dict[str, str]]:
    """metrics.csv without what a clock or a memory meter decides."""
    table = MetricsFile(run.path / "metrics.csv").rows()
    return [
        {k: v for k, v in row.items() if not k.startswith("perf/") and k != "time_s"}
        for row in table
    ]


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return read_checkpoint(run.checkpoint("last"))["state_dict"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], 1e-3, 1e-4) for k in a)


@pytest.mark.parametrize("model", FAMILIES)
def test_a_run_leaves_what_it_should(freeze: Callable[..., RunDir], model: str) -> None:
    run = freeze(f"model={model}")
    attempt(run)
    result, manifest = run.result, run.manifest
    assert result is not None
    assert result["step"] == 20
    assert result["tokens"] == 20 * 4 * 64 == 5120
    assert result["flops"] == 5120 * manifest["flops_per_token"]
    assert result["val/loss"] < 5.0  # a uniform guess over 256 bytes costs 5.55 nats
    assert result["best"]["val/loss"] <= result["val/loss"]
    assert result["val/bpb"] == pytest.approx(result["val/loss"] / 0.693147, rel=0.02)
    table = rows(run)
    assert [int(r["step"]) for r in table if r["val/loss"]] == [10, 20]
    assert [int(r["step"]) for r in table if r["train/loss"]] == list(range(1, 21))
    lr = [float(r["lr"]) for r in table if r["lr"]]
    assert lr[0] == run.config.optim.peak_lr  # one step of warm-up, then down to a tenth
    assert 0.1 * lr[0] < lr[-1] < 0.12 * lr[0]
    net = load_model(run, "best")
    assert manifest["parameters"]["total"] == sum(p.numel() for p in net.parameters())
    assert not net.training
    assert manifest["data"]["xz_bpb"] > 0
    assert not (run.path / "error.txt").exists()


@pytest.mark.parametrize("model", FAMILIES)
def test_both_families_see_the_same_batches(
    freeze: Callable[..., RunDir], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids that reach a model, whatever it is, are those of the data module alone."""
    from experiments.data.data_module import TokenDataModule
    from experiments.data.prepare import prepare
    from experiments.data.token_data import TokenData
    from models import gpt, rwkv4  # noqa: F401  # before their classes are looked for

    run = freeze(f"model={model}", "micro_batch_size=2", "budget_tokens=1024")
    seen: list[torch.Tensor] = []
    features = LanguageModel.__subclasses__()
    for cls in features:
        original = cls.features

        def spy(self, ids, state=None, original=original):  # type: ignore[no-untyped-def]
            if self.training:
                seen.append(ids.clone())
            return original(self, ids, state)

        monkeypatch.setattr(cls, "features", spy)
    fit(run)
    data = TokenData.open(prepare(run.config.data))
    expected = iter(TokenDataModule(data, 64, 4, 4, seed=0).train_dataloader())
    for step in range(4):
        torch.testing.assert_close(torch.cat(seen[2 * step : 2 * step + 2]), next(expected)[0])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[[str], RunDir]:
    """Each family's run of 20 steps, never stopped, validated after 10 and 20."""
    done: dict[str, RunDir] = {}

    def get(model: str) -> RunDir:
        if model not in done:
            torch.manual_seed(0)
            runs = tmp_path_factory.mktemp("undisturbed")
            done[model] = freeze_in(
                runs, text, f"model={model}", "micro_batch_size=2", "log_every=4"
            )
            fit(done[model])
        return done[model]

    return get


# a validation is due after 10 and 20; the micro-batch may change between the two starts
@pytest.mark.parametrize(
    ("model", "stop_at", "then"),
    [
        ("rwkv4_nano", 13, 2),
        ("gpt_nano", 13, 2),
        ("rwkv4_nano", 10, 2),
        ("gpt_nano", 20, 2),
        ("rwkv4_nano", 13, 4),
        ("rwkv4_nano", 10, 1),
    ],
)
def test_a_stopped_run_ends_as_if_never_stopped(
    freeze: Callable[..., RunDir],
    undisturbed: Callable[[str], RunDir],
    model: str,
    stop_at: int,
    then: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = undisturbed(model)
    parted = freeze(f"model={model}", "micro_batch_size=2", "log_every=4")
    original = RunLog.on_train_batch_end

    def stop(self, trainer, *args):  # type: ignore[no-untyped-def]
        original(self, trainer, *args)
        if trainer.global_step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "on_train_batch_end", stop)
        with pytest.raises(SystemExit) as left:
            fit(parted)
    assert left.value.code == 128 + signal.SIGTERM
    assert read_checkpoint(parted.checkpoint("last"))["global_step"] == stop_at
    assert not parted.finished
    parted = freeze(f"model={model}", f"micro_batch_size={then}", "log_every=4")
    fit(parted)
    if then == 2:
        assert same(weights(whole), weights(parted))
        assert rows(whole) == rows(parted)
    else:  # the same sums in another order
        assert close(weights(whole), weights(parted))
        assert [row["step"] for row in rows(whole)] == [row["step"] for row in rows(parted)]
    assert whole.result is not None
    assert parted.result is not None
    assert parted.result["best"]["step"] == whole.result["best"]["step"]
    best = read_checkpoint(parted.checkpoint("best"))
    assert best["global_step"] == parted.result["best"]["step"]


@pytest.mark.parametrize("model", FAMILIES)
def test_a_run_killed_right_after_any_save_ends_as_if_never_killed(
    freeze: Callable[..., RunDir],
    undisturbed: Callable[[str], RunDir],
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Saves whenever it can, dies after the third one, five times over."""
    run = freeze(f"model={model}", "micro_batch_size=2", "log_every=4", "checkpoint_every_min=1e-9")
    original = AtomicCheckpointIO.save_checkpoint

    class Killed(BaseException):
        pass

    for _ in range(5):
        saves = []

        def save(self, *args, saves=saves, **kwargs):  # type: ignore[no-untyped-def]
            original(self, *args, **kwargs)
            saves.append(1)
            if len(saves) == 3:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
            with pytest.raises(Killed):
                fit(run)
    fit(run)
    assert same(weights(undisturbed(model)), weights(run))
    assert rows(undisturbed(model)) == rows(run)


def test_other_data_than_it_was_started_on_is_refused(freeze: Callable[..., RunDir]) -> None:
    run = freeze()
    fit(run)
    (run.path / "result.json").unlink()
    manifest = run.manifest
    manifest["data"]["fingerprint"] = "another"
    write_json(run.path / "manifest.json", manifest)
    with pytest.raises(RunFailed, match="trained on other data"):
        attempt(run)


def test_a_run_in_training_is_left_alone(freeze: Callable[..., RunDir]) -> None:
    run = freeze()
    with run.claim():
        freeze()  # the same config: there is nothing to write
        other = {**plain(run.config), "ctx_len": 32}
        with pytest.raises(ValueError, match=r"another process .* with another config \(ctx_len"):
            RunDir.store(run.path, other)
        with pytest.raises(RunFailed, match="another process"):
            attempt(RunDir(run.path))
    assert sorted(p.name for p in run.path.iterdir()) == [".claim.1", ".lock", "config.yaml"]


def test_accumulation_equals_one_batch(freeze: Callable[..., RunDir]) -> None:
    one, four = freeze(runs="one"), freeze("micro_batch_size=1", runs="four")
    fit(one)
    fit(four)
    assert close(weights(one), weights(four))
    assert four.path.name == one.path.name  # a matter of execution, not of the result


def test_a_finished_run_trains_no_further(freeze: Callable[..., RunDir]) -> None:
    run = freeze()
    fit(run)
    before = weights(run)
    (run.path / "result.json").unlink()  # killed just before the last word
    attempt(RunDir(run.path))
    assert same(before, weights(run))
    assert run.finished


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget_tokens=255"], "less than one step"),
        (["ctx_len=100000", "budget_tokens=1e9"], "ctx_len"),
        (["batch_size=0"], "batch_size is 0"),
        (["micro_batch_size=3"], "not a multiple of micro_batch_size 3"),
        (["precision=8"], "choose 32-true, bf16-mixed"),
        (["loss=fast"], "choose full, chunked"),
        (["optim.peak_lr=-1"], r"optim\.peak_lr"),
        (["model.net.vocab_size=100"], "vocabulary of 100 is not that of the data, 256"),
        (["model.net.vocab_size=50304"], "vocabulary of 50304 is not that of the data, 256"),
        (["optim.grad_clip=-1"], r"optim\.grad_clip is -1"),
        (["optim.betas=0.9"], r"optim\.betas is 0\.9"),
        (["budget_tokens=abc"], "budget_tokens is 'abc'"),
        (["checkpoint_every_min=0"], "checkpoint_every_min is 0"),
        (["n_threads=-1"], "n_threads is -1"),
        (["trainer=gpu"], "GPU|gpu|CUDA|cuda"),
        (["model=gpt_nano", "model.net.n_head=5"], "n_head must divide n_embd"),
        (["data.source.paths=/nowhere.txt"], "nowhere"),
        (["model=gpt_nano", "model.net.ctx_len=32"], "longer than the model's 32"),
    ],
)
def test_bad_input_is_one_clear_line(
    freeze: Callable[..., RunDir], overrides: list[str], message: str
) -> None:
    run = freeze(*overrides)
    with pytest.raises((ValueError, OSError), match=message) as error:
        attempt(run)
    assert "\n" not in one_line(error.value)
    assert not run.has_training
    assert not (run.path / "metrics.csv").exists()


def test_half_precision_needs_a_gpu(freeze: Callable[..., RunDir]) -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        fit(freeze("precision=16-mixed"))


@pytest.mark.parametrize("model", FAMILIES)
def test_bf16_and_chunked_and_checkpointing_train_alike(
    freeze: Callable[..., RunDir], model: str
) -> None:
    plain = freeze(f"model={model}", runs="plain")
    fit(plain)
    assert plain.result is not None
    for n, extra in enumerate(
        ["precision=bf16-mixed", "loss=chunked", "++model.net.grad_checkpoint=true"]
    ):
        other = freeze(f"model={model}", extra, runs=str(n))
        fit(other)
        assert other.result is not None
        assert other.result["val/loss"] == pytest.approx(plain.result["val/loss"], rel=0.03)


def test_the_wkv_backend_is_a_key(freeze: Callable[..., RunDir]) -> None:
    torch_rung = freeze("model=rwkv4_nano", "model.net.wkv_backend=torch")
    fit(torch_rung)
    assert torch_rung.manifest["wkv_backend"] == "torch"
    assert "wkv_backend" not in torch_rung.path.name  # how, not what
    for name, message in (("cuda", "'cuda' cannot be had: "), ("nosuch", "backend 'nosuch': use")):
        other = freeze("model=rwkv4_nano", f"model.net.wkv_backend={name}", runs=name)
        with pytest.raises(ValueError, match=message) as error:
            attempt(other)
        assert "\n" not in str(error.value)
        assert not other.manifest  # nothing was trained


def test_other_loggers_get_the_same_rows(freeze: Callable[..., RunDir]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = freeze("logger=tensorboard")
    fit(run)
    events = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    for name in ("train/loss", "val/loss", "perf/tokens_per_s"):
        logged = [(e.step, pytest.approx(e.value, rel=1e-5)) for e in events.Scalars(name)]
        assert logged == MetricsFile(run.path / "metrics.csv").column(name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_in_place_trains_alike(freeze: Callable[..., RunDir]) -> None:
    plain = freeze("model=rwkv4_nano", "model.net.n_layer=1", runs="plain")
    compiled = freeze("model=rwkv4_nano", "model.net.n_layer=1", "compile=true", runs="compiled")
    fit(plain)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fit(compiled)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # it was not passed over
    assert weights(plain).keys() == weights(compiled).keys()
    assert plain.result is not None
    assert compiled.result is not None
    assert compiled.result["val/loss"] == pytest.approx(plain.result["val/loss"], rel=1e-3)


def test_a_loss_that_turns_nan_stops_and_keeps_the_last_good_checkpoint(
    freeze: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = freeze("checkpoint_every_min=1e-9", "log_every=7")
    from experiments.lit_lm import LitLM

    original = LitLM.training_step

    def poisoned(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        loss = original(self, batch, batch_idx)
        if self.global_step == 11:  # the twelfth step
            self.micro_losses[-1] = loss.detach() * float("nan")
            return loss * float("nan")
        return loss

    monkeypatch.setattr(LitLM, "training_step", poisoned)
    with pytest.raises(RunFailed, match=r"nan at step 12; checkpoint of step 11 kept; lower optim"):
        attempt(run)
    state = read_checkpoint(run.checkpoint("last"))
    assert state["global_step"] == 11
    assert all(v.isfinite().all() for v in state["state_dict"].values())
    assert "nan at step 12" in (run.path / "error.txt").read_text()
    assert not run.finished


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"a": torch.ones(4)}, path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"cannot save .*last\.ckpt"):
            io.save_checkpoint({"a": torch.ones(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)
    assert read_checkpoint(path)["a"].tolist() == [1, 1, 1, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checksums.json", "last.ckpt"]


def test_a_damaged_checkpoint_is_one_line(freeze: Callable[..., RunDir]) -> None:
    run = freeze()
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints" / "last.ckpt").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        fit(run)


def test_metrics_rewind_drops_what_is_trained_again_and_a_cut_line(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.rewind(0)
    for step in range(1, 6):
        metrics.append({"step": step, "tokens": step, "train/loss": 1 / step})
    with open(metrics.path, "a") as file:
        file.write("6,6,0.1,1e-")
    assert [row["step"] for row in metrics.rows()] == list("12345")
    metrics.rewind(3)
    metrics.append({"step": 4, "tokens": 4, "val/loss": 2.0})
    with open(metrics.path, newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == list("1234")
    assert metrics.column("train/loss")[-1] == (3, pytest.approx(1 / 3))
    assert table[-1]["val/loss"] == "2"


def test_summary_of_a_run_by_hand(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.rewind(0)
    speeds = {"perf/mfu": 0.5, "perf/peak_mem_bytes": 7}
    for step, speed in ((1, 10.0), (2, 30.0), (3, 20.0)):
        metrics.append(
            {"step": step, "tokens": 8 * step, "train/loss": 9.0 - step, "perf/tokens_per_s": speed}
            | speeds
        )
    metrics.append({"step": 2, "tokens": 16, "val/loss": 1.0, "val/bpb": 1.5, "time_s": 2.0})
    metrics.append({"step": 3, "tokens": 24, "val/loss": 2.0, "val/bpb": 3.0, "time_s": 4.0})
    assert summarise(metrics, flops_per_token=100) == {
        "step": 3,
        "tokens": 24,
        "flops": 2400,
        "time_s": 4.0,
        "train/loss": 6.0,
        "val/loss": 2.0,
        "val/bpb": 3.0,
        "best": {"step": 2, "val/loss": 1.0, "val/bpb": 1.5},
        "perf/tokens_per_s": 20.0,
        "perf/mfu": 0.5,
        "perf/peak_mem_bytes": 7,
    }


def test_tokens_per_second_by_a_fake_clock(
    freeze: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock moves 2 s a training step and 100 s a validation, which must not count."""
    now = [0.0]
    monkeypatch.setattr(
        "experiments.callbacks.time",
        SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: 0.0),
    )
    from experiments.lit_lm import LitLM

    step, validate = LitLM.training_step, LitLM.validation_step

    def slow_step(self, *args):  # type: ignore[no-untyped-def]
        now[0] += 2
        return step(self, *args)

    def slow_validation(self, *args):  # type: ignore[no-untyped-def]
        now[0] += 100
        return validate(self, *args)

    monkeypatch.setattr(LitLM, "training_step", slow_step)
    monkeypatch.setattr(LitLM, "validation_step", slow_validation)
    run = freeze("log_every=5")
    fit(run)
    speeds = MetricsFile(run.path / "metrics.csv").column("perf/tokens_per_s")
    assert [s for _, s in speeds] == [4 * 64 / 2] * 4
    assert run.result is not None
    assert run.result["time_s"] == 40


def command(tmp_path: Path, text: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "experiments.train",
        *SMALL,
        f"data.source.paths={text}",
        "data.val_tokens=500",
        f"paths.runs={tmp_path / 'runs'}",
        f"paths.data={tmp_path / 'data'}",
        "n_threads=1",
        *overrides,
    ]


@pytest.mark.slow
def test_sweep_skips_what_is_done_and_lists_what_failed(tmp_path: Path, text: Path) -> None:
    sweep = command(tmp_path, text, "model=rwkv4_nano,gpt_nano", "ctx_len=64,100000", "-m")
    done = subprocess.run(sweep, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2  # how many failed
    assert "2 trained, 0 finished before, 2 failed" in done.stdout
    assert done.stderr.count("failed: ") == 2
    assert "Traceback" not in done.stderr
    results = sorted((tmp_path / "runs" / "debug").glob("*/*/result.json"))
    assert len(results) == 2
    assert not list((tmp_path / "runs").glob("*/*/*100000*"))  # bad input leaves nothing
    before = [path.stat().st_mtime_ns for path in results]
    again = subprocess.run(
        command(tmp_path, text, "model=rwkv4_nano,gpt_nano", "ctx_len=64", "-m"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert "0 trained, 2 finished before, 0 failed" in again.stdout
    assert before == [path.stat().st_mtime_ns for path in results]


@pytest.mark.slow
def test_kill_minus_nine_then_the_same_command(tmp_path: Path, text: Path) -> None:
    overrides = ["model=rwkv4_nano", "budget_tokens=51200", "checkpoint_every_min=0.000001"]
    args = command(tmp_path, text, *overrides)
    child = subprocess.Popen(args, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    metrics: list[Path] = []
    while not metrics or metrics[0].read_text().count("\n") < 20:
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.05)
        metrics = list((tmp_path / "runs").glob("*/*/*/metrics.csv"))
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    again = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    killed = RunDir(metrics[0].parent)
    straight = subprocess.run(
        [a.replace(str(tmp_path / "runs"), str(tmp_path / "straight")) for a in args], cwd=ROOT
    )
    assert straight.returncode == 0
    other = RunDir(next((tmp_path / "straight").glob("*/*/*")))
    assert rows(killed) == rows(other)
    assert same(weights(killed), weights(other))


@pytest.mark.slow
def test_command_line_errors_are_one_line(tmp_path: Path, text: Path) -> None:
    for overrides in (
        ["modell=x"],
        ["model=rwkv5"],
        ["nosuch=1"],
        ["budget_tokens=1"],
        ["backprop=truncated"],
        ["model.net.wkv_backend=cuda"],  # not on a CPU
        ["model.net.wkv_backend=cpu", "model=gpt_nano"],
    ):
        done = subprocess.run(
            command(tmp_path, text, *overrides), cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2, (overrides, done.stderr)
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs" / "debug").exists() or not list(
        (tmp_path / "runs" / "debug").glob("*/*")
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("chunk_len", ["null", "24"])
def test_two_processes_train_like_one(
    tmp_path: Path, text: Path, model: str, chunk_len: str
) -> None:
    one = command(tmp_path / "one", text, f"model={model}")
    two = command(
        tmp_path / "two",
        text,
        f"model={model}",
        "micro_batch_size=2",
        f"chunk_len={chunk_len}",
        "trainer.devices=2",
        "trainer.strategy=ddp",
    )
    for args in (one, two):
        done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    runs = [RunDir(next((tmp_path / n / "runs").glob("*/*/*"))) for n in ("one", "two")]
    assert runs[0].path.name == runs[1].path.name
    assert [json.loads(json.dumps(r.manifest["device"]["n_devices"])) for r in runs] == [1, 2]
    a, b = (r.result for r in runs)
    assert a is not None
    assert b is not None
    assert b["val/loss"] == pytest.approx(a["val/loss"], rel=1e-3)
    assert b["tokens"] == a["tokens"]
