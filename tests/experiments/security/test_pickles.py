"""Code in a checkpoint, a tokenizer or a whole suite that a report is made of never runs."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.runs.checkpoints.checksums import CHECKSUMS, digest
from experiments.system.files import write_json

from .conftest import LOADERS, TEXTS, TOUCH, Entry, evaluate, generate, refused, show_batch, train


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
