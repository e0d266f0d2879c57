"""A new architecture is one folder and one yaml: at every size and in every command at once."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import models
from experiments.benchmarks import self_test
from experiments.benchmarks.models import at_size
from experiments.config.entry import CONF_DIR
from experiments.config.identity import plain
from experiments.evaluation.evaluating import evaluate
from experiments.generation.texts import generate
from experiments.runs.run_dir import RunDir
from experiments.training.fit import fit
from models.families import families

from .presets import SIZES, frozen

TOY = Path(__file__).parent / "toy_family"


@pytest.fixture
def _toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(TOY / "models")])
    families.cache_clear()
    yield
    families.cache_clear()
    for name in [name for name in sys.modules if name.startswith("models.toy")]:
        del sys.modules[name]


def composed(root: str, *overrides: str):  # type: ignore[no-untyped-def]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(root, [f"hydra.searchpath=[file://{TOY / 'conf'}]", *overrides])


@pytest.mark.usefixtures("_toy")
def test_it_is_found_and_has_every_size(tmp_path: Path) -> None:
    assert families()["toy"].label == "Toy"
    for size in SIZES:
        given = ("model=toy", f"size={size}", f"paths.runs={tmp_path}", "data.vocab_size=256")
        _, frozen = RunDir.locate(composed("train", *given), [])
        assert abs(frozen["model"]["match"]["deviation"]) < 0.02


@pytest.mark.usefixtures("_toy")
def test_it_keeps_the_contract() -> None:
    model = families()["toy"].toy().eval()
    ids = torch.randint(64, (3, 9))
    with torch.no_grad():
        whole, _ = model(ids)
        state = model.init_state(3)
        pieces = []
        for t in range(9):
            logits, state = model(ids[:, t : t + 1], state)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert self_test.step(families()["toy"], torch.device("cpu")) is None
    assert "toy" in at_size(frozen("size=nano")["size"], 64, 32)  # what every bench measures


@pytest.mark.slow
@pytest.mark.usefixtures("_toy")
def test_it_trains_generates_and_is_scored_measured_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(9000)))
    given = ["model=toy", "data=text", f"data.source.paths={text}", "debug=smoke", "suite=s"]
    given += ["data.source.val_fraction=0.25", "data.val_tokens=20000", "trainer=cpu"]
    given += [f"paths.{name}={tmp_path / name}" for name in ("runs", "data")]
    for size in ("pico", "nano"):
        run = RunDir.freeze(composed("train", *given, f"size={size}"), [])
        fit(run)
        assert run.manifest["family_label"] == "Toy"
        assert run.manifest["backend"] is None
    shared = (f"paths.runs={tmp_path / 'runs'}", "suite=s")
    evaluate(composed("evaluate", *shared, "tasks.limit=5"))
    generate(
        plain(composed("generate", "max_tokens=4")) | {"run": str(run.path), "prompt": ["1 t"]}
    )
    from analysis.report import main

    monkeypatch.setattr(sys, "argv", ["report", *shared])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    main()
    page = (tmp_path / "runs" / "s" / "report" / "index.html").read_text()
    assert "Toy" in page
    assert "toy_nano" in page
