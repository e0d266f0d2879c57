"""A config that reaches for more than a model and its data is refused by every entry."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from experiments.config.identity import plain

from .conftest import (
    ENTRIES,
    TEXTS,
    TOUCH,
    Entry,
    convert,
    evaluate,
    generate,
    refused,
    show_batch,
    train,
)

Config = dict[str, Any]


def named(config: Config, target: Any, where: str = "model.net", **keys: Any) -> Config:
    """The config with another target somewhere, and its arguments."""
    *above, last = where.split(".")
    node = config
    for key in above:
        node = node[key]
    node[last] = {"_target_": target, **keys}
    return config


def changed(config: Config, **values: Any) -> Config:
    for key, value in values.items():
        *above, last = key.split("__")
        node = config
        for name in above:
            node = node[name]
        node[last] = value
    return config


CONFIGS: dict[str, Callable[[Config], Config]] = {
    "os.system": lambda c: named(c, "os.system", command=TOUCH),
    "builtins": lambda c: named(c, "builtins.exec", _args_=["open('canary','w')"]),
    "module through ours": lambda c: named(
        c, "models.ops.build.subprocess.run", args=TOUCH.split()
    ),
    "module through fit": lambda c: named(c, "experiments.fit.os.system", command=TOUCH),
    "function of ours that writes": lambda c: named(
        c, "experiments.system.files.write_text", path="canary", text="x"
    ),
    "the same as a schedule": lambda c: named(
        c, "experiments.system.files.write_text", "schedule.function", path="canary", text="x"
    ),
    "the same as a source": lambda c: named(
        c, "experiments.system.files.write_text", "data.source", path="canary", text="x"
    ),
    "the same as a tokenizer": lambda c: named(
        c, "experiments.system.files.write_json", "data.tokenizer", path="canary", obj=1
    ),
    "class of ours of another kind": lambda c: named(c, "experiments.evaluation.journal.Journal"),
    "what a module imports": lambda c: named(c, "experiments.fit.RunDir", path="."),
    "model that a module imports": lambda c: changed(c, model__net___target_="models.sizing.RWKV4"),
    "method": lambda c: named(c, "models.rwkv4.model.RWKV4.load_state_dict"),
    "dunder": lambda c: named(c, "models.rwkv4.model.__loader__.exec_module"),
    "private": lambda c: named(c, "models.sizing._name", architecture="x"),
    "hydra": lambda c: named(c, "hydra.utils.get_object", path="os.system"),
    "lightning": lambda c: named(c, "lightning.pytorch.loggers.CSVLogger", save_dir="canary"),
    "outside by dots": lambda c: named(c, "models...os.system", command=TOUCH),
    "outside by slashes": lambda c: named(c, "models/../os.system", command=TOUCH),
    "no text": lambda c: named(c, ["os.system"]),
    "target in an argument": lambda c: changed(
        c, model__net__n_layer={"_target_": "os.system", "command": TOUCH}
    ),
    "target of ours in an argument": lambda c: changed(
        c, model__net__n_layer={"_target_": "models.rwkv4.model.RWKV4"}
    ),
    "target in a list": lambda c: changed(
        c, model__net__n_layer=[{"_target_": "os.system", "command": TOUCH}]
    ),
    "target anywhere": lambda c: changed(c, extra=[[{"_target_": "os.system"}]]),
    "positional": lambda c: changed(c, model__net___args_=["x"]),
    "recursive": lambda c: changed(c, model__net___recursive_=True),
    "convert": lambda c: changed(c, model__net___convert_="object"),
    "call": lambda c: changed(c, model__net___call_=True),
    "environment": lambda c: changed(c, suite="${oc.env:RWKV_PARITY_SECRET}"),
    "interpolation": lambda c: changed(c, model__net__n_layer="${seed}"),
    "key with an interpolation": lambda c: changed(c, extra={"${oc.env:HOME}": 1}),
    "suite": lambda c: changed(c, suite="../../up"),
    "model name": lambda c: changed(c, model__name="/tmp/up"),
    "data name": lambda c: changed(c, data__name="../up"),
}
# what only some entries build, and so find out
BUILDERS = {
    "function of ours that writes": "train evaluate generate benchmark convert",
    "class of ours of another kind": "train evaluate generate benchmark convert",
    "the same as a schedule": "train",
    "the same as a source": "train evaluate show_batch",
    "the same as a tokenizer": "train evaluate show_batch",
}
# enough for the entries that read a config as training does
FEW = (
    "os.system", "module through ours", "function of ours that writes", "private",
    "target in an argument", "environment", "suite", "yaml apply", "escaped interpolation",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("entry", [train, evaluate, generate, convert, show_batch])
def test_the_honest_run_is_taken(run: Path, entry: Entry) -> None:
    entry(run)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES)
def test_configs_that_reach_for_more_are_refused(
    run: Path, canary: Path, entry: Entry, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "config.yaml"
    text = file.read_text()
    config = plain(OmegaConf.create(text))
    for attack, change in CONFIGS.items():
        tried = entry in (train, show_batch) or attack in (*FEW, *BUILDERS)
        if not tried or entry.__name__ not in BUILDERS.get(attack, entry.__name__):
            continue
        file.write_text(yaml.safe_dump(change(copy.deepcopy(config))))
        refused(entry, run, capsys, attack)
    for attack, rewrite in TEXTS.items():
        if entry not in (train, show_batch) and attack not in FEW:
            continue
        file.write_text(rewrite(text))
        refused(entry, run, capsys, attack)


@pytest.mark.parametrize(
    "change",
    [
        {"logger": {"wandb": {"_target_": "os.system", "command": TOUCH}}},
        {"logger": {"wandb": {"settings": {"base_url": "http://127.0.0.1:9"}}}},
        {"logger": {"mlflow": {"experiment_name": "x", "tracking_uri": "http://127.0.0.1:9"}}},
        {"logger": {"tensorboard": {"log_dir": "../canary"}}},
        {"logger": {"os.system": {"command": TOUCH}}},
        {"trainer__callbacks": [{"_target_": "os.system", "command": TOUCH}]},
        {"trainer__plugins": "os.system"},
        {"trainer__default_root_dir": "canary"},
        {"trainer__model_registry": "them/theirs"},
        {"trainer__strategy": "os.system"},
        {"trainer__accelerator": "os.system"},
        {"trainer__profiler": "os.system"},
        {"precision": "os.system"},
    ],
    ids=str,
)
def test_what_training_alone_reads_is_checked(
    run: Path, canary: Path, change: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "config.yaml"
    config = plain(OmegaConf.load(file))  # type: ignore[arg-type]
    file.write_text(yaml.safe_dump(changed(config, **change)))
    refused(train, run, capsys, str(change))


def test_what_is_not_ours_below_data_stays(run: Path, tmp_path: Path) -> None:
    """A config may say where prepared data go: nothing that is there is changed or removed."""
    root = tmp_path / "home"
    (root / ".tmp-precious").mkdir(parents=True)
    (root / ".tmp-precious" / "thesis.txt").write_text("all of it")
    (root / "notes.txt").write_text("more")
    file = run / "config.yaml"
    config = plain(OmegaConf.load(file))  # type: ignore[arg-type]
    file.write_text(yaml.safe_dump(changed(config, data__root=str(root))))
    train(run)
    assert (root / ".tmp-precious" / "thesis.txt").read_text() == "all of it"
    assert (root / "notes.txt").read_text() == "more"
    made = {path.name for path in root.iterdir()} - {".tmp-precious", "notes.txt"}
    assert all(name.removeprefix(".lock-").startswith("text-") for name in made)
