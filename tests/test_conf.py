"""Every yaml of conf/ composes, and its targets accept exactly the keys it gives them."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from experiments.config.entry import CONF_DIR
from experiments.config.identity import config_difference, config_hash, flatten, plain, run_tag
from experiments.config.targets import nodes, resolve
from experiments.runs.freezing import searched_rate
from experiments.system.files import write_json

from .presets import MODELS, frozen

GROUPS = ("model", "size", "data", "optim", "schedule", "trainer", "logger", "experiment", "debug")


def choices(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF_DIR / group).glob("*.yaml"))


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in GROUPS for name in choices(group)]
)
def test_every_choice_composes(group: str, name: str) -> None:
    config = composed(f"{group}={name}")
    # what only the user can give is missing, not guessed
    for key, value in flatten(OmegaConf.to_container(config)).items():
        if value == "???":
            OmegaConf.update(config, key, 300 if key.endswith("vocab_size") else "given")
    for node in nodes(plain(config)):
        if "_target_" in node:
            signature = inspect.signature(resolve(node["_target_"], object))
            bind = signature.bind_partial if node.get("_partial_") else signature.bind
            bind(**{key: value for key, value in node.items() if not key.startswith("_")})


@pytest.mark.parametrize("size", ["tiny", "169m"])
def test_the_shared_recipe_is_the_same_for_every_family(size: str) -> None:
    first, *others = (frozen(f"model={name}", f"size={size}") for name in MODELS)
    for other in others:
        for key in ("optim", "schedule", "batch_size", "ctx_len", "budget_tokens", "precision"):
            assert first[key] == other[key]


def test_the_constant_phase_is_that_of_the_papers_table() -> None:
    mini_epochs = {"169m": 361, "430m": 411, "1b5": 443, "3b": 451, "7b": 465, "14b": 544}
    for size, n in mini_epochs.items():
        schedule = plain(composed(f"size={size}", "schedule=own"))["schedule"]["function"]
        assert schedule["constant_fraction"] == pytest.approx(n / 8043, abs=5e-5)


@pytest.mark.parametrize("size", ["tiny", "430m"])
@pytest.mark.parametrize("model", MODELS)
def test_every_family_has_a_recipe_of_its_own(model: str, size: str) -> None:
    config = frozen(f"model={model}", f"size={size}", "optim=own", "schedule=own")
    assert "_target_" in config["schedule"]["function"]
    assert len(config["optim"]["betas"]) == 2
    assert config["optim"]["peak_lr"] > 0
    assert "own" not in config["model"]


def test_a_searched_rate_is_the_best_over_seeds(tmp_path: Path) -> None:
    for seed, rate, loss in ((0, 0.001, 2.0), (1, 0.001, 2.2), (0, 0.01, 1.9), (1, 0.01, 2.5)):
        run = tmp_path / "lr_search" / "rwkv4_nano" / f"{rate}-{seed}"
        write_json(run / "config.yaml", {"optim": {"peak_lr": rate}})
        write_json(run / "result.json", {"val/loss": loss})
    write_json(tmp_path / "lr_search" / "rwkv4_nano" / "going" / "config.yaml", {})
    assert searched_rate(tmp_path / "lr_search", "rwkv4_nano") == 0.001
    given = ("optim=searched", "size=nano", f"paths.runs={tmp_path}")
    assert frozen(*given)["optim"]["peak_lr"] == 0.001
    assert frozen(*given, "optim.peak_lr=0.5")["optim"]["peak_lr"] == 0.5
    with pytest.raises(ValueError, match=r"gpt_nano in .*experiment=lr_search"):
        frozen(*given, "model=gpt")


def test_execution_is_no_part_of_what_is_computed() -> None:
    base = frozen("size=nano")
    given = (
        "execution.micro_batch_size=2",
        "execution.backend=torch",
        "trainer=ddp",
        "logger=wandb",
    )
    other = frozen("size=nano", *given, "paths.runs=elsewhere")
    assert config_hash(base) == config_hash(other)
    assert config_difference(base, other) == []
    assert (
        run_tag([*given, "size=nano", "jobs=2", "seed=3", "ctx_len=64"], 3) == "seed=3,ctx_len=64"
    )
    assert config_difference(base, frozen("size=nano", "ctx_len=64", "truncate=32")) == [
        "ctx_len: 256 -> 64",
        "model.net.ctx_len: 256 -> 64",
        "truncate: None -> 32",
    ]


@pytest.mark.parametrize("override", ["modell=x", "ctx_lenn=3", "model=rwkv5", "loss=chunked"])
def test_a_misspelt_key_is_refused(override: str) -> None:
    with pytest.raises(HydraException):
        composed(override)


def test_all_yaml_files_are_reached() -> None:
    groups = (*GROUPS, "tokenizer", "tasks", "report", "bench", "hydra/launcher")
    known = {CONF_DIR} | {CONF_DIR / group for group in groups}
    assert [path for path in CONF_DIR.rglob("*.yaml") if path.parent not in known] == []
