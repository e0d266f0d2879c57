"""What a config may name, and that names alone run nothing."""

import sys
from pathlib import Path

import pytest

from experiments.config.targets import check_targets, make, resolve
from experiments.data.sources import TextSource
from experiments.data.tokenizer import Tokenizer
from experiments.runs.run_dir import find_runs
from models.language_model import LanguageModel


def test_every_target_of_conf_is_allowed_and_nothing_else_of_its_module() -> None:
    for target, kind in (
        ("models.rwkv4.model.RWKV4", LanguageModel),
        ("models.gpt.model.GPT", LanguageModel),
        ("models.sizing.matched_gpt", LanguageModel),
        ("experiments.data.sources.Stdlib", TextSource),
        ("experiments.data.records.HuggingFace", TextSource),
        ("experiments.data.tokenizer.train_bpe", Tokenizer),
        ("experiments.data.tokenizer.read_tokenizer", Tokenizer),
    ):
        assert resolve(target, kind).__name__ == target.rpartition(".")[2]
        for other in (Path, dict):
            with pytest.raises(ValueError, match="makes no"):
                resolve(target, other)
    with pytest.raises(ValueError, match="makes no LanguageModel"):
        resolve("models.sizing.matched_sizes", LanguageModel)


def test_a_new_model_is_allowed_without_an_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import models
    from experiments.config import targets

    code = "from models.gpt.model import GPT\n\n\nclass Mine(GPT):\n    pass\n"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.py").write_text(code)
    monkeypatch.setattr(targets, "ROOT", tmp_path)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path / "models")])
    targets.defined.cache_clear()
    sizes = {"vocab_size": 9, "ctx_len": 8, "n_layer": 1, "n_embd": 8, "n_head": 1, "n_ffn": 8}
    made = make({"_target_": "models.mine.Mine", **sizes}, LanguageModel)
    targets.defined.cache_clear()
    assert type(made).__name__ == "Mine"


def test_targets_are_found_without_importing_them() -> None:
    before = set(sys.modules)
    with pytest.raises(ValueError, match="no class or function"):
        check_targets({"a": {"_target_": "experiments.doctor.nothing"}})
    check_targets({"a": {"_target_": "experiments.sweeps.ray_engine.launch"}})
    assert set(sys.modules) == before


def test_find_runs_takes_no_code_from_names(tmp_path: Path, canary: Path) -> None:
    folder = tmp_path / "s" / "$(touch canary)" / "`touch canary`;touch canary"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("a: 1")
    (run,) = find_runs(str(tmp_path / "s" / "*" / "*"))
    assert run.name == "s/$(touch canary)/`touch canary`;touch canary"
