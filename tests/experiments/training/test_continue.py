"""`continue_to`: a finished run is continued to a larger budget, in a directory of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from experiments.config.targets import make
from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.runs.metrics import MetricsFile
from experiments.runs.run_dir import RunDir
from experiments.training.fit import fit
from experiments.training.module import LitLM
from experiments.training.optimizer import Schedule

from ...small_runs import FAMILIES


def content(run: RunDir) -> dict[str, bytes]:
    return {
        str(path.relative_to(run.path)): path.read_bytes()
        for path in run.path.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("model", FAMILIES)
def test_a_finished_run_is_continued_to_a_larger_budget(
    freeze: Callable[..., RunDir], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [f"model={model}", "budget_tokens=4096"]  # 16 steps
    first = freeze(*command)
    with pytest.raises(ValueError, match="not finished: run the same command without continue_to"):
        fit(freeze(*command, "continue_to=8192"))
    fit(first)
    before = content(first)

    run = freeze(*command, "continue_to=8192")
    assert run.path.parent == first.path.parent
    assert run.path.name == "seed=0,budget_tokens=4096,continue_to=8192"
    seen: list[torch.Tensor] = []
    original = LitLM.training_step

    def spy(self: LitLM, batch: Any, batch_idx: int) -> torch.Tensor:
        seen.append(batch[0])
        if len(seen) == 8:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LitLM, "training_step", spy)
        with pytest.raises((KeyboardInterrupt, SystemExit)):  # before its first own save
            fit(run)
    fit(RunDir(run.path))
    assert content(first) == before

    result = run.result
    assert result is not None
    assert (result["step"], result["tokens"]) == (32, 8192)
    assert run.manifest["budget_tokens"] == 8192
    assert run.manifest["continued"] == {"run": first.name, "step": 16}
    table = MetricsFile(run.metrics_file).rows()
    n_before = len(MetricsFile(first.metrics_file).rows())
    assert table[:n_before] == MetricsFile(first.metrics_file).rows()
    steps = [int(row["step"]) for row in table if row["train/loss"]]
    assert steps == list(range(1, 33))
    schedule = make(run.config.schedule.function, Schedule)
    rates = {int(row["step"]): float(row["lr"]) for row in table if row["lr"]}
    peak = run.config.optim.peak_lr
    for step in range(17, 33):  # of the new budget from the first new step on
        assert rates[step] == pytest.approx(peak * schedule(step - 1, 32))
    assert rates[17] > 2 * rates[16]  # the first run had come down to a tenth
    assert read_checkpoint(run.checkpoint("last"))["global_step"] == 32
    best = read_checkpoint(run.checkpoint("best"))["global_step"]
    assert best == result["best"]["step"]
    # once begun it needs the first one no more
    assert run.result is not None
    (run.path / "result.json").unlink()
    first.path.rename(first.path.with_name("elsewhere"))
    fit(RunDir(run.path))
    assert run.result == result
    assert run.manifest["continued"] == {"run": first.name, "step": 16}
    # sample n of a run is the same whatever its budget
    whole = freeze(f"model={model}", "budget_tokens=8192")
    later: list[torch.Tensor] = []

    def spy_all(self: LitLM, batch: Any, batch_idx: int) -> torch.Tensor:
        later.append(batch[0])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LitLM, "training_step", spy_all)
    fit(whole)
    assert all(torch.equal(a, b) for a, b in zip(seen, later[16:24], strict=True))


def test_what_cannot_be_continued_is_one_line(freeze: Callable[..., RunDir]) -> None:
    with pytest.raises(ValueError, match=r"continue_to=2100 is no step more than"):
        freeze("budget_tokens=2048", "continue_to=2100")
    with pytest.raises(ValueError, match=r"continue_to is 'x': it must be a number"):
        freeze("budget_tokens=2048", "continue_to=x")
    first = freeze("model=rwkv4", "size=pico", "budget_tokens=512")
    fit(first)
    (first.path / "config.yaml").write_text(
        (first.path / "config.yaml").read_text().replace("n_validations: 2", "n_validations: 1")
    )
    with pytest.raises(ValueError, match=r"has another config \(n_validations: 1 -> 2\)"):
        fit(freeze("model=rwkv4", "size=pico", "budget_tokens=512", "continue_to=1024"))
