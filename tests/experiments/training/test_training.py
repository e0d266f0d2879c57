"""What a run computes, records and refuses; through the real trainer on a small text."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.config.entry import one_line
from experiments.runs.run_dir import RunDir
from experiments.runs.trained_model import load_model
from experiments.training.fit import attempt, fit
from models.language_model import LanguageModel

from ...small_runs import FAMILIES, close, rows, weights


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
    from models import gpt, rwkv4  # noqa: F401  # before their classes are looked for

    run = freeze(f"model={model}", "execution.micro_batch_size=2", "budget_tokens=1024")
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
    data = prepare(run.config.data, run.config.paths.data)
    expected = iter(TokenDataModule(data, 64, 4, 4, seed=0).train_dataloader())
    for step in range(4):
        torch.testing.assert_close(torch.cat(seen[2 * step : 2 * step + 2]), next(expected)[0])


def test_accumulation_equals_one_batch(freeze: Callable[..., RunDir]) -> None:
    one, four = freeze(runs="one"), freeze("execution.micro_batch_size=1", runs="four")
    fit(one)
    fit(four)
    assert close(weights(one), weights(four))
    assert four.path.name == one.path.name  # a matter of execution, not of the result


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget_tokens=255"], "less than one step"),
        (["ctx_len=100000", "budget_tokens=1e9"], "ctx_len"),
        (["batch_size=0"], "batch_size is 0"),
        (["execution.micro_batch_size=3"], "not a multiple of micro_batch_size 3"),
        (["precision=8"], "one of 32-true, bf16-mixed"),
        (["execution.loss=fast"], "one of full, chunked"),
        (["optim.peak_lr=-1"], r"optim\.peak_lr"),
        (["model.net.vocab_size=100"], "vocabulary of 100 is not that of the data, 256"),
        (["model.net.vocab_size=50304"], "vocabulary of 50304 is not that of the data, 256"),
        (["optim.grad_clip=-1"], r"optim\.grad_clip is -1"),
        (["optim.betas=0.9"], r"optim\.betas is 0\.9"),
        (["budget_tokens=abc"], "budget_tokens is 'abc'"),
        (["execution.checkpoint_every_min=0"], "checkpoint_every_min is 0"),
        (["execution.n_threads=-1"], "n_threads is -1"),
        (["trainer=gpu"], "GPU|gpu|CUDA|cuda"),
        (["model=gpt", "model.net.n_head=5"], "n_head must divide n_embd"),
        (["data.source.paths=/nowhere.txt"], "nowhere"),
        (["model=gpt", "model.net.ctx_len=32"], "longer than the model's 32"),
    ],
)
def test_bad_input_is_one_clear_line(
    freeze: Callable[..., RunDir], tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message) as error:
        attempt(freeze(*overrides))
    assert "\n" not in one_line(error.value)
    assert not list(tmp_path.rglob("metrics.csv"))


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
        ["precision=bf16-mixed", "execution.loss=chunked", "execution.grad_checkpoint=true"]
    ):
        other = freeze(f"model={model}", extra, runs=str(n))
        fit(other)
        assert other.result is not None
        assert other.result["val/loss"] == pytest.approx(plain.result["val/loss"], rel=0.03)


def test_the_wkv_backend_is_a_key(freeze: Callable[..., RunDir]) -> None:
    torch_rung = freeze("execution.backend=torch")
    fit(torch_rung)
    assert torch_rung.manifest["backend"] == "torch"
    assert "wkv_backend" not in torch_rung.path.name  # how, not what
    for name, message in (("cuda", "'cuda' cannot be had: "), ("nosuch", "backend 'nosuch': use")):
        other = freeze(f"execution.backend={name}", runs=name)
        with pytest.raises(ValueError, match=message) as error:
            attempt(other)
        assert "\n" not in str(error.value)
        assert not other.manifest  # nothing was trained


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_in_place_trains_alike(freeze: Callable[..., RunDir]) -> None:
    plain = freeze("size.n_layer=1", runs="plain")
    compiled = freeze("size.n_layer=1", "execution.compile=true", runs="compiled")
    fit(plain)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fit(compiled)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # it was not passed over
    assert weights(plain).keys() == weights(compiled).keys()
    assert plain.result is not None
    assert compiled.result is not None
    assert compiled.result["val/loss"] == pytest.approx(plain.result["val/loss"], rel=1e-3)
