"""Every yaml of conf/ composes, and its targets accept exactly the keys it gives them."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import OmegaConf

from experiments.config.entry import CONF_DIR
from experiments.config.identity import flatten, plain
from experiments.config.targets import check_targets

GROUPS = ("model", "data", "optim", "schedule", "trainer", "logger", "experiment", "debug")


def choices(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF_DIR / group).glob("*.yaml"))


def composed(*overrides: str, root: str = "train") -> Any:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(root, overrides=list(overrides))


def missing(config: Any) -> list[str]:
    return [key for key, value in flatten(config).items() if value == "???"]


def targets(node: Any) -> list[dict[str, Any]]:
    found = []
    if isinstance(node, dict):
        if "_target_" in node:
            found.append(node)
        for value in node.values():
            found += targets(value)
    return found


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in GROUPS for name in choices(group)]
)
def test_every_choice_composes(group: str, name: str) -> None:
    config = composed(f"{group}={name}")
    # what only the user can give is missing, not guessed
    for key in missing(OmegaConf.to_container(config)):
        OmegaConf.update(config, key, 300 if key.endswith("vocab_size") else "given")
    frozen = plain(config)
    check_targets(frozen)
    for node in targets({k: v for k, v in frozen.items() if k != "logger"}):
        signature = inspect.signature(get_object(node["_target_"]))
        bind = signature.bind_partial if node.get("_partial_") else signature.bind
        bind(**{k: v for k, v in node.items() if not k.startswith("_")})


SIZES = sorted({name.partition("_")[2] for name in choices("model") if name.startswith("rwkv4")})


@pytest.mark.parametrize("size", SIZES)
def test_the_shared_recipe_is_the_same_for_both_families(size: str) -> None:
    rwkv, gpt = (plain(composed(f"model={family}_{size}")) for family in ("rwkv4", "gpt"))
    for key in ("optim", "schedule", "batch_size", "ctx_len", "budget_tokens", "precision"):
        assert rwkv[key] == gpt[key]


def test_the_constant_phase_is_that_of_the_papers_table() -> None:
    mini_epochs = {"169m": 361, "430m": 411, "1b5": 443, "3b": 451, "7b": 465, "14b": 544}
    for size, n in mini_epochs.items():
        schedule = plain(composed(f"model=rwkv4_{size}", "schedule=own"))["schedule"]
        assert schedule["function"]["constant_fraction"] == pytest.approx(n / 8043, abs=5e-5)


def test_every_recipe_is_for_every_family() -> None:
    for model in ("rwkv4_tiny", "gpt_tiny"):
        frozen = plain(composed(f"model={model}", "optim=own", "schedule=own"))
        assert "_target_" in frozen["schedule"]["function"]
        assert len(frozen["optim"]["betas"]) == 2
    assert frozen["optim"]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    "override", ["modell=x", "ctx_lenn=3", "model=rwkv5", "model.net.n_head=2"]
)
def test_a_misspelt_key_is_refused(override: str) -> None:
    with pytest.raises(HydraException):
        composed("model=rwkv4_tiny", override)


def test_all_yaml_files_are_reached() -> None:
    known = {
        (CONF_DIR / g) for g in (*GROUPS, "tokenizer", "tasks", "report", "bench", "hydra/launcher")
    }
    stray = [p for p in CONF_DIR.rglob("*.yaml") if p.parent not in known and p.parent != CONF_DIR]
    assert stray == []
    assert {Path(p).parent for p in CONF_DIR.rglob("*.yaml")}
