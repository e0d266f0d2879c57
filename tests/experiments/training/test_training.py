"""What a run computes, records and refuses; through the real trainer on a small text."""

import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from experiments.config.entry import one_line
from experiments.runs.run_dir import RunDir
from experiments.runs.trained_model import load_model
from experiments.training.fit import attempt, fit
from models.language_model import LanguageModel

from ...small_runs import FAMILIES, close, freeze_in, rows, weights


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
    assert len(seen) == 8
    data = prepare(run.config.data, run.config.paths.data)
    expected = iter(TokenDataModule(data, 64, 4, 4, seed=0).train_dataloader())
    for step in range(4):
        torch.testing.assert_close(torch.cat(seen[2 * step : 2 * step + 2]), next(expected)[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget_tokens=255"], "less than one step"),
        (["ctx_len=100000", "budget_tokens=1e9"], "ctx_len"),
        (["optim.betas=0.9"], r"optim\.betas is 0\.9"),
        (["execution.chunk_len=2.5"], r"chunk_len is 2\.5: it must be a whole number, 1 or more"),
        (["truncate=8", "execution.chunk_len=4"], "leave out execution.chunk_len=4"),
        (["execution.micro_batch_size=3"], "not a multiple of micro_batch_size=3"),
        (["execution.backend=cuda"], "'cuda' cannot be had: "),
        (["execution.backend=nosuch"], "backend 'nosuch': use"),
        (["model.net.vocab_size=100"], "vocabulary of 100 is not that of the data, 256"),
        (["trainer=gpu"], "GPU|gpu|CUDA|cuda"),
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


HOW = ["micro_batch_size=1", "chunk_len=24", "loss=chunked", "grad_checkpoint=true"]


@pytest.mark.parametrize(("model", "how"), [*product(FAMILIES, HOW), ("rwkv4", "backend=torch")])
def test_how_a_run_is_executed_changes_rounding_alone(
    freeze: Callable[..., RunDir], plain: Callable[[str], RunDir], model: str, how: str
) -> None:
    other = freeze(f"model={model}", f"execution.{how}")
    fit(other)
    assert other.path.name == plain(model).path.name
    if how == "backend=torch":
        assert other.manifest["backend"] == "torch"
    for a, b in zip(rows(plain(model)), rows(other), strict=True):
        assert float(b["train/loss"] or 0) == pytest.approx(float(a["train/loss"] or 0), rel=1e-4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[[str], RunDir]:
    """Each family's run with nothing chosen."""
    done: dict[str, RunDir] = {}

    def get(model: str) -> RunDir:
        if model not in done:
            done[model] = freeze_in(tmp_path_factory.mktemp("plain"), text, f"model={model}")
            fit(done[model])
        return done[model]

    return get


@pytest.mark.parametrize("model", FAMILIES)
def test_bfloat16_trains_alike(
    freeze: Callable[..., RunDir], plain: Callable[[str], RunDir], model: str
) -> None:
    low = freeze(f"model={model}", "precision=bf16-mixed")
    fit(low)
    assert low.result is not None
    expected = plain(model).result
    assert expected is not None
    assert low.result["val/loss"] == pytest.approx(expected["val/loss"], rel=0.03)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_in_place_trains_alike(freeze: Callable[..., RunDir]) -> None:
    few = ["size.n_layer=1", "budget_tokens=1024"]
    plain, compiled = freeze(*few), freeze(*few, "execution.compile=true", runs="compiled")
    fit(plain)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fit(compiled)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # it was not passed over
    assert close(weights(plain), weights(compiled))
