"""Every data config composes and prepares a small local file of the format it is meant for."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments.data.prepare import prepare
from experiments.data.token_data import TokenData
from experiments.data.tokenizer import train_bpe

CONF = Path(__file__).parents[3] / "conf"
STORIES = [f"Story {i}: a cat of {i * i} years sat on mat {i * 7}.\n" for i in range(400)]
SMALL_BPE = ["tokenizer@data.tokenizer=bpe", "data.tokenizer.vocab_size=300"]


def data_config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(overrides=["+paths.data=/nowhere", *overrides]).data


def text_file(folder: Path) -> list[str]:
    (folder / "all.txt").write_text("".join(STORIES))
    return [f"data.source.paths={folder}/all.txt"]


def enwik8(folder: Path) -> list[str]:
    return [*text_file(folder), "data.source.split_bytes=[9000,3000]"]


def json_lines(folder: Path) -> list[str]:
    (folder / "all.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in STORIES))
    return [f"data.source.paths={folder}/all.jsonl", "data.source.val_fraction=0.2"]


def dataset_folder(folder: Path) -> list[str]:
    (folder / "set").mkdir()
    for split in ("train", "validation"):
        lines = "".join(json.dumps({"text": split + s}) + "\n" for s in STORIES)
        (folder / "set" / f"{split}.jsonl").write_text(lines)
    return [f"data.source.path={folder}/set"]


def named_dataset(folder: Path) -> list[str]:
    return [*dataset_folder(folder), "data.source.name=null", *SMALL_BPE]


def one_split_dataset(folder: Path) -> list[str]:
    return [*named_dataset(folder), "data.source.val_fraction=0.2"]


def raw_ids(folder: Path) -> list[str]:
    (np.arange(5000) % 300).astype("<u2").tofile(folder / "train.bin")
    return [f"data.source.path={folder}/train.bin", "data.tokenizer.vocab_size=300"]


def indexed_ids(folder: Path) -> list[str]:
    (np.arange(5000) % 300).astype("<u2").tofile(folder / "doc.bin")
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 1, 2) + struct.pack("<iqqq", 5000, 0, 0, 1)
    (folder / "doc.idx").write_bytes(index)
    return [f"data.source.prefix={folder}/doc", "data.tokenizer.vocab_size=300"]


def indexed_ids_with_tokenizer(folder: Path) -> list[str]:
    tokenizer = json.loads(train_bpe(iter(STORIES), 300, 10**6).to_json())["tokenizer"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return [*indexed_ids(folder), f"data.tokenizer.path={folder}/tokenizer.json"]


LOCAL: dict[str, Callable[[Path], list[str]]] = {
    "stdlib": lambda folder: [],
    "text": lambda folder: [*text_file(folder), "data.source.val_fraction=0.2"],
    "enwik8": enwik8,
    "jsonl": json_lines,
    "hf": lambda folder: [*dataset_folder(folder), "data.source.val_split=validation"],
    "wikitext103": named_dataset,
    "tinystories": lambda folder: [*dataset_folder(folder), *SMALL_BPE],
    "fineweb_edu": one_split_dataset,
    "megatron": indexed_ids,
    "nanogpt": raw_ids,
    "pile": indexed_ids_with_tokenizer,
}


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "data").glob("*.yaml")))
def test_data_config_prepares_a_local_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    overrides = [f"+data={name}", "data.val_tokens=1000", *LOCAL[name](tmp_path)]
    cfg = data_config(*overrides)
    data = TokenData.open(prepare(cfg, root=tmp_path / "data"))
    assert data.meta["name"] == name
    assert cfg.vocab_size in (None, data.vocab_size)
    assert len(data.val) == 1000
    assert len(data.train) >= 4000
    if data.tokenizer.kind == "ids":
        assert data.meta["n_val_bytes"] is None
    else:
        assert data.meta["n_val_bytes"] > 900
        assert data.meta["xz_bpb"] > 0


@pytest.mark.parametrize("name", ["text", "jsonl", "hf", "megatron", "nanogpt", "pile", "enwik8"])
def test_paths_that_only_the_user_knows_are_asked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be given \(data\.(source|tokenizer)\.") as caught:
        prepare(data_config(f"+data={name}"), root=tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_vocabulary_of_a_file_tokenizer_may_be_left_open(tmp_path: Path) -> None:
    overrides = [*indexed_ids_with_tokenizer(tmp_path)[2:], *text_file(tmp_path)]
    cfg = data_config("+data=text", "tokenizer@data.tokenizer=file", *overrides)
    assert cfg.vocab_size is None
    assert TokenData.open(prepare(cfg, root=tmp_path / "data")).vocab_size == 300


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "tokenizer").glob("*.yaml")))
def test_every_tokenizer_fits_every_place(name: str) -> None:
    cfg: Any = data_config("+data=text", f"tokenizer@data.tokenizer={name}")
    assert cfg.tokenizer._target_.startswith("experiments.data.tokenizer.")
    assert "vocab_size" in list(cfg.tokenizer)
