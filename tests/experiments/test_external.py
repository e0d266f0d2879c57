"""A run directory from elsewhere is data: it runs no code, and nothing of it leads outside."""

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
from omegaconf import OmegaConf

from experiments.benchmark import run as benchmark
from experiments.config.entry import CONF_DIR, REPORTED
from experiments.config.identity import plain
from experiments.config.targets import make, resolve
from experiments.convert import convert
from experiments.data.sources import TextSource
from experiments.data.tokenizer import Tokenizer
from experiments.evaluation.evaluating import evaluate
from experiments.generation.texts import generate
from experiments.relog import relog
from experiments.runs.checkpoints.checksums import CHECKSUMS
from experiments.runs.run_dir import RunDir, find_runs, open_external
from experiments.runs.trained_model import load_model
from experiments.training.fit import fit
from models.language_model import LanguageModel

TOUCH = {"command": "touch canary"}


def composed(root: str, *overrides: str) -> Any:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(root, overrides=list(overrides))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that every command takes."""
    root = tmp_path_factory.mktemp("honest")
    (root / "a.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(3000)))
    given = ["data=text", "debug=smoke", "trainer=cpu", "size=pico", "suite=s"]
    given += [f"data.source.paths={root / 'a.txt'}", "data.source.val_fraction=0.25"]
    given += ["data.val_tokens=20000", "budget_tokens=512"]
    given += [f"paths.{name}={root / name}" for name in ("runs", "data")]
    run = RunDir.freeze(composed("train", *given), [])
    fit(run)
    return run.path


@pytest.fixture
def run(honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it to be tampered with; nothing may make the canary."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "elsewhere" / "s" / "rwkv4_pico" / "seed=0"
    shutil.copytree(honest, path)
    yield path
    assert not (tmp_path / "canary").exists()


def evaluate_it(path: Path) -> None:
    cfg = composed("evaluate", "tasks.limit=2")
    cfg.run = str(path)
    evaluate(cfg)


def generate_it(path: Path) -> None:
    settings = plain(composed("generate", "max_tokens=2"))
    generate(settings | {"run": str(path), "prompt": ["a"]})


def measure_it(path: Path) -> None:
    settings = plain(composed("benchmark", "bench=generate", "max_tokens=16", "repeats=1"))
    benchmark(settings | {"run": str(path)})


def convert_it(path: Path) -> None:
    settings = plain(composed("convert", "source=x", "target=y", "check=false"))
    convert(settings | {"source": str(path), "target": str(path.parent / "out.pth")})


def relog_it(path: Path) -> None:
    cfg = composed("relog", "run=x", "logger=tensorboard")
    cfg.run = str(path)
    relog(cfg)


COMMANDS: list[Callable[[Path], None]] = [
    evaluate_it, generate_it, measure_it, convert_it, relog_it
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_an_honest_run_and_no_other(
    run: Path, command: Callable[[Path], None]
) -> None:
    command(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["net"] = {"_target_": "os.system", **TOUCH}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(REPORTED):
        command(run)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.net", {"_target_": "os.system", **TOUCH}),
        ("model.net", {"_target_": "models.ops.build.subprocess.run", "args": ["touch", "canary"]}),
        ("model.net", {"_target_": "experiments.fit.os.system", **TOUCH}),
        ("model.net", {"_target_": "experiments.fit.RunDir", "path": "."}),  # imported there
        ("model.net", {"_target_": "models.rwkv4.model.RWKV4.load_state_dict"}),
        ("model.net", {"_target_": "models.rwkv4.model.__loader__.exec_module"}),
        ("model.net", {"_target_": "models...os.system", **TOUCH}),
        ("model.net", {"_target_": ["os.system"]}),
        ("model.net.n_layer", {"_target_": "os.system", **TOUCH}),
        ("extra", [[{"_target_": "os.system"}]]),
        ("model.net._args_", ["x"]),
        ("model.net._call_", True),
        ("suite", "${oc.env:HOME}"),
        ("suite", "../../up"),
        ("model.name", "/tmp/up"),
        ("data.name", "../up"),
    ],
)
def test_a_config_that_reaches_for_more_is_refused(run: Path, key: str, value: Any) -> None:
    config = OmegaConf.create(yaml.safe_load((run / "config.yaml").read_text()))
    raw = OmegaConf.to_container(config)
    *above, last = key.split(".")
    node: Any = raw
    for name in above:
        node = node[name]
    node[last] = value
    (run / "config.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match=r"config\.yaml|cannot name a folder"):
        open_external(run)


def test_yaml_builds_no_objects(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    for line in (
        "x: !!python/object/apply:os.system ['touch canary']\n",
        "x: !!python/module:os\n",
    ):
        (run / "config.yaml").write_text(text + line)
        with pytest.raises(ValueError, match="not readable YAML"):
            open_external(run)


def test_a_target_builds_only_what_is_asked_for() -> None:
    for target, kind in (
        ("models.rwkv4.model.RWKV4", LanguageModel),
        ("experiments.data.sources.Stdlib", TextSource),
        ("experiments.data.tokenizer.train_bpe", Tokenizer),
    ):
        assert resolve(target, kind).__name__ == target.rpartition(".")[2]
        with pytest.raises(ValueError, match="makes no"):
            resolve(target, Path)
    for target in ("experiments.system.files.write_text", "experiments.evaluation.journal.Journal"):
        with pytest.raises(ValueError, match="makes no LanguageModel"):
            make({"_target_": target, "path": "canary", "text": "x"}, LanguageModel)


@pytest.mark.parametrize("name", ["checkpoints/last.ckpt", "metrics.csv", "eval", "checkpoints"])
def test_links_out_of_the_directory_are_refused(run: Path, tmp_path: Path, name: str) -> None:
    (run / "checkpoints" / "other.ckpt").symlink_to("last.ckpt")
    open_external(run)  # those within are fine
    (run / "checkpoints" / "other.ckpt").unlink()
    outside = tmp_path / "outside"
    outside.mkdir()
    link = run / name
    shutil.rmtree(link) if link.is_dir() else link.unlink(missing_ok=True)
    link.symlink_to(outside)
    with pytest.raises(ValueError, match=f"{name} is a link out of its run directory"):
        open_external(run)


class Bomb:
    """Makes the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


def bombs(path: Path) -> Iterator[None]:
    """Checkpoints with code in some part, one after the other in the place of an honest one."""
    good = torch.load(path, weights_only=True)
    for part in ("state_dict", "optimizer_states", "callbacks", "beside"):
        torch.save(good | {part: [good.get(part), Bomb()]}, path)
        yield
    path.write_bytes(pickle.dumps(Bomb()))
    yield
    torch.save(Bomb(), path, _use_new_zipfile_serialization=False)
    yield
    path.unlink()
    path.mkdir()
    torch.save({**good, "beside": Bomb()}, path / "rank-0-of-1.pt")
    yield


def test_checkpoints_and_tokenizers_run_no_code(run: Path) -> None:
    (run / "checkpoints" / CHECKSUMS).unlink()
    for _ in bombs(run / "checkpoints" / "last.ckpt"):
        with pytest.raises(ValueError, match=r"last\.ckpt|rank-0"):
            load_model(RunDir(run), "last")
    for content in (pickle.dumps(Bomb()), b"[]", b'{"kind": "os.system", "vocab_size": 2}'):
        (run / "tokenizer.json").write_bytes(content)
        with pytest.raises(REPORTED):
            Tokenizer.from_json((run / "tokenizer.json").read_text("utf-8", "replace"))


@pytest.mark.slow
def test_a_report_runs_nothing_and_escapes_names(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from analysis.report import main

    manifest = (run / "manifest.json").read_text()
    script = "<script>alert(1)</script>"
    (run / "manifest.json").write_text(manifest.replace('"rwkv4_pico"', f'"{script}"'))
    monkeypatch.setattr(sys, "argv", ["report", "suite=s", f"paths.runs={run.parents[2]}"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # it sets that itself, for good
    main()
    (page,) = run.parents[1].glob("report/*.html")
    assert script not in page.read_text()


def test_find_runs_takes_no_code_from_names(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s" / "$(touch canary)" / "`touch canary`;touch canary"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("a: 1")
    (found,) = find_runs(str(tmp_path / "s" / "*" / "*"))
    assert found.name == "s/$(touch canary)/`touch canary`;touch canary"
