"""A run directory from somebody else runs no code, and nothing of it reaches outside.

Each attack is tried through every entry that takes a run directory. It must be refused in one line,
and the canary, a file that any success would make or change, must stay as it is.
"""

import copy
import functools
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from experiments.checksums import CHECKSUMS, digest
from experiments.config import plain
from experiments.data.sources import TextSource
from experiments.data.tokenizer import Tokenizer
from experiments.entry import CONF_DIR, REPORTED, one_line
from experiments.fit import attempt, fit
from experiments.run_dir import RunDir, find_runs, write_json
from experiments.targets import check_targets, make, resolve
from models.language_model import LanguageModel

Config = dict[str, Any]
Entry = Callable[[Path], None]


def frozen(runs: Path, data: Path, text: Path) -> RunDir:
    given = ["data=text", "debug=smoke", "trainer=cpu", "model=rwkv4_pico", "suite=s"]
    given += [
        f"data.source.paths={text}",
        "data.val_tokens=20000",
        "budget_tokens=512",
        "n_threads=1",
    ]
    given += [f"paths.runs={runs}", f"paths.data={data}", "data.source.val_fraction=0.25"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return RunDir.freeze(compose("train", overrides=given), [])


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that every entry takes."""
    root = tmp_path_factory.mktemp("honest")
    (root / "a.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(3000)))
    run = frozen(root / "runs", root / "data", root / "a.txt")
    fit(run)
    return run.path


@pytest.fixture
def run(honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to be tampered with, in a folder that the canary shares."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RWKV_PARITY_SECRET", "secret")
    path = tmp_path / "theirs" / "s" / "rwkv4_pico" / "seed=0"
    shutil.copytree(honest, path)
    return path


def train(path: Path) -> None:
    (path / "result.json").unlink(missing_ok=True)
    attempt(RunDir(path))


@functools.cache
def composed(root: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(root, overrides=list(overrides))


def evaluate(path: Path) -> None:
    from experiments.evaluate import evaluate

    cfg = composed("evaluate", "tasks.limit=2", "n_threads=1")
    cfg.run = str(path)
    evaluate(cfg)


def generate(path: Path) -> None:
    from experiments.generate import generate

    cfg = plain(composed("generate", "max_tokens=2", "n_threads=1"))
    generate(cfg | {"run": str(path), "prompt": ["a"]})


def benchmark(path: Path) -> None:
    from experiments.benchmark import run

    overrides = ("bench=generate", "max_tokens=16", "repeats=1", "n_threads=1")
    run(plain(composed("benchmark", *overrides)) | {"run": str(path)})


def convert(path: Path) -> None:
    from experiments.convert import convert

    cfg = composed("convert", "source=x", "target=y", "check=false")
    convert(plain(cfg) | {"source": str(path), "target": str(path.parent / "out.pth")})


def show_batch(path: Path) -> None:
    from experiments.show_batch import show

    show({"run": str(path), "step": 1, "rows": 1, "ids": False})


ENTRIES: list[Entry] = [train, evaluate, generate, benchmark, convert, show_batch]
LOADERS: list[Entry] = [train, evaluate, generate, benchmark, convert]


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


TOUCH = "touch canary"
CONFIGS: dict[str, Callable[[Config], Config]] = {
    "os.system": lambda c: named(c, "os.system", command=TOUCH),
    "builtins": lambda c: named(c, "builtins.exec", _args_=["open('canary','w')"]),
    "module through ours": lambda c: named(
        c, "models.ops.build.subprocess.run", args=TOUCH.split()
    ),
    "module through fit": lambda c: named(c, "experiments.fit.os.system", command=TOUCH),
    "function of ours that writes": lambda c: named(
        c, "experiments.run_dir.write_text", path="canary", text="x"
    ),
    "the same as a schedule": lambda c: named(
        c, "experiments.run_dir.write_text", "schedule.function", path="canary", text="x"
    ),
    "the same as a source": lambda c: named(
        c, "experiments.run_dir.write_text", "data.source", path="canary", text="x"
    ),
    "the same as a tokenizer": lambda c: named(
        c, "experiments.run_dir.write_json", "data.tokenizer", path="canary", obj=1
    ),
    "class of ours of another kind": lambda c: named(c, "experiments.journal.Journal"),
    "what a module imports": lambda c: named(c, "experiments.fit.RunDir", path="."),
    "model that a module imports": lambda c: changed(c, model__net___target_="models.sizing.RWKV4"),
    "method": lambda c: named(c, "models.rwkv4.RWKV4.load_state_dict"),
    "dunder": lambda c: named(c, "models.rwkv4.__loader__.exec_module"),
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
        c, model__net__n_layer={"_target_": "models.rwkv4.RWKV4"}
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
TEXTS: dict[str, Callable[[str], str]] = {
    "yaml apply": lambda t: t + "x: !!python/object/apply:os.system ['touch canary']\n",
    "yaml new": lambda t: t + "x: !!python/object/new:os.system ['touch canary']\n",
    "yaml name": lambda t: t + "x: !!python/name:os.system\n",
    "yaml module": lambda t: t + "x: !!python/module:os\n",
    "escaped interpolation": lambda t: t.replace("suite: s\n", 'suite: "\\x24{oc.env:HOME}"\n'),
    "a list": lambda t: "- 1\n",
    "not YAML": lambda t: "a: [",
    "not text": lambda t: "\x00\x01",
    "empty": lambda t: "",
}


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """What no attack may make."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()
    assert not (tmp_path.parent / "up").exists()


def refused(entry: Entry, path: Path, capsys: pytest.CaptureFixture[str], attack: str) -> str:
    """The one line that an entry refuses a run with."""
    try:
        with pytest.raises(REPORTED) as error:
            entry(path)
    except BaseException as other:
        other.add_note(f"{entry.__name__}, {attack}")
        raise
    told = capsys.readouterr().err.strip()  # evaluate tells of each run, and goes on
    lines = told.splitlines() or [f"error: {one_line(error.value)}"]
    assert all(line.startswith("error: ") for line in lines), attack
    assert "secret" not in told + str(error.value), attack
    return "".join(lines)


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


class Bomb:
    """Makes the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (TOUCH,)


def bombs(path: Path) -> Iterator[str]:
    """Checkpoints with code in every part, one after the other in the place of an honest one."""
    good = torch.load(path, weights_only=True)
    for part in (*good, "beside"):
        bad = dict(good)
        bad[part] = [bad.get(part), Bomb()]
        torch.save(bad, path)
        yield part
    callbacks = {key: {**value, "rng": Bomb()} for key, value in good["callbacks"].items()}
    torch.save({**good, "callbacks": callbacks}, path)
    yield "a callback's state"
    torch.save({**good, "optimizer_states": [{"state": {0: Bomb()}, "param_groups": []}]}, path)
    yield "the optimizer's state"
    path.write_bytes(pickle.dumps(Bomb()))
    yield "a bare pickle"
    torch.save(Bomb(), path, _use_new_zipfile_serialization=False)
    yield "an old format"
    path.unlink()
    path.mkdir()
    torch.save({**good, "beside": Bomb()}, path / "rank-0-of-1.pt")
    yield "a shard"
    (path / "rank-0-of-1.pt").unlink()
    (path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    yield "a folder of PyTorch's own"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entry", "checksums"),
    [*((entry, "none") for entry in LOADERS), (train, "theirs"), (generate, "theirs")],
)
def test_checkpoints_run_no_code(
    run: Path, canary: Path, entry: Entry, checksums: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints" / "last.ckpt"
    path.with_name("previous.ckpt").unlink(missing_ok=True)  # nothing whole to fall back to
    for attack in bombs(path):
        if checksums == "none":
            (path.parent / CHECKSUMS).unlink(missing_ok=True)
        else:
            write_json(path.parent / CHECKSUMS, {path.name: [digest(path)]})
        refused(entry, run, capsys, attack)


def test_the_bomb_would_go_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "canary").exists()


FILES = (
    "checkpoints/last.ckpt", "checkpoints/.last.ckpt.1", "checkpoints/checksums.json",
    "metrics.csv", "manifest.json", "tokenizer.json", ".lock", ".claim.1", "error.txt",
    "log.txt", "eval/cloze.json", "bench/generate.json", "tensorboard", "wandb",
)  # fmt: skip


def links(run: Path, outside: Path, files: tuple[str, ...]) -> Iterator[str]:
    """Files and folders of a run, one after the other a link to elsewhere."""
    victim = outside / "last.ckpt"
    for name in files:
        link = run / name
        link.parent.mkdir(exist_ok=True)
        kept = link.read_bytes() if link.is_file() else None
        for target in (victim, outside / "new", Path("../../../../../outside/last.ckpt")):
            link.unlink(missing_ok=True)
            link.symlink_to(target)
            yield name
        link.unlink()
        if kept is not None:
            link.write_bytes(kept)
    for name in ("checkpoints", "eval", "bench"):
        (run / name).mkdir(exist_ok=True)
        shutil.move(run / name, run / "aside")
        (run / name).symlink_to(outside, target_is_directory=True)
        yield name
        (run / name).unlink()
        shutil.move(run / "aside", run / name)


@pytest.fixture
def outside(run: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder that holds one file before and after."""
    folder = tmp_path / "outside"
    folder.mkdir()
    shutil.copy(run / "checkpoints" / "last.ckpt", folder)
    before = (folder / "last.ckpt").read_bytes()
    yield folder
    assert (folder / "last.ckpt").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]


def test_links_out_of_the_directory_are_seen(run: Path, outside: Path) -> None:
    for name in links(run, outside, FILES):
        with pytest.raises(ValueError, match=f"{name}.* is a link out of its run directory"):
            _ = RunDir(run).config
        with pytest.raises(ValueError, match=f"{name}.* is a link out of its run directory"):
            RunDir(run).claim()


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES)
def test_links_out_of_the_directory_are_refused(
    run: Path, outside: Path, entry: Entry, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in links(run, outside, ("checkpoints/last.ckpt", "metrics.csv")):
        refused(entry, run, capsys, name)


def test_links_within_the_directory_are_fine(run: Path) -> None:
    (run / "checkpoints" / "other.ckpt").symlink_to("last.ckpt")
    (run / "best").symlink_to(run / "checkpoints")
    generate(run)


@pytest.mark.parametrize("entry", [evaluate, generate, show_batch])
def test_a_tokenizer_is_data(
    run: Path, canary: Path, entry: Entry, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in (
        pickle.dumps(Bomb()), b"{", b"[]", b"1", b'{"kind": "os.system", "vocab_size": 2}',
        b'{"kind": "json", "vocab_size": 256, "eot": "x", "tokenizer": {"_target_": "os.system"}}',
    ):  # fmt: skip
        (run / "tokenizer.json").write_bytes(content)
        if entry is show_batch:  # it takes the tokenizer of the prepared data
            entry(run)
        else:
            refused(entry, run, capsys, repr(content))


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


@pytest.mark.slow
def test_a_report_runs_nothing_and_stays_in_its_folder(
    run: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from analysis.report import main

    suite = run.parents[1]
    text = (run / "config.yaml").read_text()
    for number, rewrite in enumerate(TEXTS.values()):
        other = suite / "rwkv4_pico" / f"seed={number + 1}"
        shutil.copytree(run, other)
        (other / "config.yaml").write_text(rewrite(text))
        (other / "checkpoints" / "last.ckpt").write_bytes(pickle.dumps(Bomb()))
    manifest = json.loads((run / "manifest.json").read_text())
    script = "<script>alert(1)</script>"
    write_json(run / "manifest.json", manifest | {"model": f"../../{script}", "suite": script})
    before = {path for path in run.parents[3].rglob("*") if "report" not in path.parts}
    arguments = ["report", "suite=s", f"paths.runs={suite.parent}"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # it sets that itself, for good
    main()
    assert {path for path in run.parents[3].rglob("*") if "report" not in path.parts} == before
    pages = [path.read_text() for path in (suite / "report").glob("*.html")]
    assert pages
    assert not any(script in page for page in pages)


def test_every_target_of_conf_is_allowed_and_nothing_else_of_its_module() -> None:
    for target, kind in (
        ("models.rwkv4.RWKV4", LanguageModel),
        ("models.gpt.GPT", LanguageModel),
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
    from experiments import targets

    code = "from models.gpt import GPT\n\n\nclass Mine(GPT):\n    pass\n"
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
    check_targets({"a": {"_target_": "experiments.ray_tasks.launch"}})
    assert set(sys.modules) == before


def test_find_runs_takes_no_code_from_names(tmp_path: Path, canary: Path) -> None:
    folder = tmp_path / "s" / "$(touch canary)" / "`touch canary`;touch canary"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("a: 1")
    (run,) = find_runs(str(tmp_path / "s" / "*" / "*"))
    assert run.name == "s/$(touch canary)/`touch canary`;touch canary"
