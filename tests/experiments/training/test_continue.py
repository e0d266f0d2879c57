"""`continue_to`: a finished run goes on to a larger budget, in a directory of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.config.checks import check_config
from experiments.config.entry import CONF_DIR
from experiments.config.targets import make
from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.runs.metrics import MetricsFile
from experiments.runs.run_dir import RunDir
from experiments.training.fit import fit
from experiments.training.module import LitLM
from experiments.training.optimizer import Schedule


@pytest.fixture(name="freeze")
def frozen(tmp_path: Path) -> Callable[..., RunDir]:
    text = tmp_path / "a.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))

    def freeze(*overrides: str) -> RunDir:
        given = [
            *("data=text", f"data.source.paths={text}", "data.val_tokens=300", "trainer=cpu"),
            *(
                "size=pico",
                "ctx_len=32",
                "batch_size=4",
                "execution.n_threads=1",
                "n_validations=2",
                "execution.log_every=1",
            ),
            *(f"paths.runs={tmp_path / 'runs'}", f"paths.data={tmp_path / 'data'}", *overrides),
        ]
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = compose("train", overrides=given)
        check_config(cfg)
        return RunDir.freeze(cfg, overrides)

    return freeze


def content(run: RunDir) -> dict[str, bytes]:
    return {
        str(path.relative_to(run.path)): path.read_bytes()
        for path in run.path.rglob("*")
        if path.is_file()
    }


def rows(run: RunDir) -> list[dict[str, str]]:
    return MetricsFile(run.path / "metrics.csv").rows()


@pytest.mark.parametrize("model", ["rwkv4", "gpt"])
def test_a_finished_run_goes_on_to_a_larger_budget(
    freeze: Callable[..., RunDir], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [f"model={model}", "budget_tokens=2048"]  # 16 steps
    first = freeze(*command)
    with pytest.raises(ValueError, match="not finished: run the same command without continue_to"):
        fit(freeze(*command, "continue_to=4096"))
    fit(first)
    before = content(first)

    run = freeze(*command, "continue_to=4096")
    assert run.path.parent == first.path.parent
    assert run.path.name == "seed=0,budget_tokens=2048,continue_to=4096"
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
    assert (result["step"], result["tokens"]) == (32, 4096)
    assert run.manifest["budget_tokens"] == 4096
    assert run.manifest["continued"] == {"run": first.name, "step": 16}
    n_before = len(rows(first))
    assert rows(run)[:n_before] == rows(first)
    steps = [int(row["step"]) for row in rows(run) if row["train/loss"]]
    assert steps == list(range(1, 33))
    schedule = make(run.config.schedule.function, Schedule)
    rates = {int(row["step"]): float(row["lr"]) for row in rows(run) if row["lr"]}
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
    # sample n of the run is the same whatever its budget
    whole = freeze(f"model={model}", "budget_tokens=4096")
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
    first = freeze("model=rwkv4", "size=pico", "budget_tokens=256")
    fit(first)
    (first.path / "config.yaml").write_text(
        (first.path / "config.yaml").read_text().replace("n_validations: 2", "n_validations: 1")
    )
    with pytest.raises(ValueError, match=r"has another config \(n_validations: 1 -> 2\)"):
        fit(freeze("model=rwkv4", "size=pico", "budget_tokens=256", "continue_to=512"))
