"""Names, freezing and refusing of run directories."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments.config.entry import CONF_DIR
from experiments.config.identity import run_tag
from experiments.runs.run_dir import RunDir, find_runs
from experiments.system.files import write_json, write_text


def config(runs: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(
            "train", overrides=["size=pico", f"paths.runs={runs}", "suite=s", *overrides]
        )


def test_tag_names_what_is_computed_and_nothing_else() -> None:
    assert run_tag([], 3) == "seed=3"
    named = ["suite=x", "model=y", "size=z", "seed=3", "experiment=e"]
    executed = ["execution.loss=chunked", "trainer=ddp", "logger=wandb", "paths.runs=x", "jobs=2"]
    assert run_tag([*named, *executed], 3) == "seed=3"
    assert run_tag(["budget_tokens=5e6"], 0) == run_tag(["budget_tokens=5_000_000"], 0)
    assert run_tag(["ctx_len=64", "batch_size=2"], 0) == "seed=0,batch_size=2,ctx_len=64"
    assert run_tag(["ctx_len=32", "+ctx_len=64"], 0) == "seed=0,ctx_len=64"  # the last counts


def test_tags_of_different_overrides_differ_and_stay_in_their_folder() -> None:
    tags = [
        run_tag([f"data.source.paths={path}"], 0)
        for path in ("a/b", "a-b", "a b", "../../b", "/etc/passwd", "x" * 300, "x" * 301)
    ]
    assert len(set(tags)) == len(tags)
    assert run_tag(["data.source.paths=a/b"], 1) == tags[0].replace("seed=0", "seed=1")
    for tag in tags:
        assert "/" not in tag
        assert len(tag) <= 100


def test_same_config_again_is_the_same_directory(tmp_path: Path) -> None:
    given = config(tmp_path, "optim.peak_lr=1.0")
    first = RunDir.freeze(given, ["optim.peak_lr=1.0"])
    assert first.path == tmp_path / "s" / "rwkv4_pico" / "seed=0,optim.peak_lr=1"
    assert RunDir.freeze(given, ["optim.peak_lr=1.0"]).path == first.path
    assert not first.finished
    assert first.manifest == {}


def test_another_config_is_refused_once_something_was_trained(tmp_path: Path) -> None:
    run = RunDir.freeze(config(tmp_path), [])
    two = "optim.peak_lr=2"
    RunDir.freeze(config(tmp_path, two), [])  # nothing trained yet: simply frozen again
    run.checkpoints.mkdir()
    (run.checkpoints / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"another config \(optim.peak_lr: 2(.0)? -> 3(.0)?\)"):
        RunDir.freeze(config(tmp_path, "optim.peak_lr=3"), [])
    RunDir.freeze(config(tmp_path, two, "execution.micro_batch_size=1"), [])  # how, not what


@pytest.mark.parametrize("name", ["..", "a/b", "''", ".", "'a b'"])
def test_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a folder"):
        RunDir.freeze(config(tmp_path, f"suite={name}"), [])
    assert not list(tmp_path.iterdir())


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        RunDir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no run directory matches"):
        find_runs(str(tmp_path / "*"))
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not readable YAML"):
        _ = RunDir(tmp_path).config


def test_find_runs_takes_globs_and_lists(tmp_path: Path) -> None:
    for seed in range(3):
        RunDir.freeze(config(tmp_path, f"seed={seed}"), [])
    assert len(find_runs(str(tmp_path / "s" / "*" / "*"))) == 3
    model = tmp_path / "s" / "rwkv4_pico"
    two = [str(model / "seed=0"), str(model / "seed=[01]")]
    assert [run.path.name for run in find_runs(two)] == ["seed=0", "seed=1"]


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="nan"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
