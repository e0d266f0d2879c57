"""Every data config composes and prepares a small local file of the format it is meant for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments.config.entry import CONF_DIR
from experiments.data.prepare import prepare
from experiments.data.tokenizer import train_bpe

from .small_data import write_jsonl, write_megatron

STORIES = [f"Story {i}: a cat of {i * i} years sat on mat {i * 7}.\n" for i in range(400)]
SMALL_BPE = ["tokenizer@data.tokenizer=bpe", "data.tokenizer.vocab_size=300"]


def data_config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(overrides=list(overrides)).data


def text_file(folder: Path) -> list[str]:
    (folder / "all.txt").write_text("".join(STORIES))
    return [f"data.source.paths={folder}/all.txt"]


def json_lines(folder: Path) -> list[str]:
    write_jsonl(folder / "all.jsonl", STORIES)
    return [f"data.source.paths={folder}/all.jsonl", "data.source.val_fraction=0.2"]


def dataset_folder(folder: Path) -> list[str]:
    (folder / "set").mkdir()
    for split in ("train", "validation"):
        write_jsonl(folder / "set" / f"{split}.jsonl", [split + story for story in STORIES])
    return [f"data.source.path={folder}/set"]


def named_dataset(folder: Path) -> list[str]:
    return [*dataset_folder(folder), "data.source.name=null", *SMALL_BPE]


def raw_ids(folder: Path) -> list[str]:
    write_megatron(folder / "doc", [2000, 3000])
    return [f"data.source.path={folder}/doc.bin", "data.tokenizer.vocab_size=300"]


def indexed_ids(folder: Path) -> list[str]:
    write_megatron(folder / "doc", [2000, 3000])
    return [f"data.source.prefix={folder}/doc", "data.tokenizer.vocab_size=300"]


def tokenizer_file(folder: Path) -> list[str]:
    tokenizer = train_bpe(iter(STORIES), 300, 10**6).description()["tokenizer"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return [f"data.tokenizer.path={folder}/tokenizer.json"]


LOCAL: dict[str, Callable[[Path], list[str]]] = {
    "stdlib": lambda folder: [],
    "text": lambda folder: [*text_file(folder), "data.source.val_fraction=0.2"],
    "enwik8": lambda folder: [*text_file(folder), "data.source.split_bytes=[9000,3000]"],
    "jsonl": json_lines,
    "hf": lambda folder: [*dataset_folder(folder), "data.source.val_split=validation"],
    "wikitext103": named_dataset,
    "tinystories": lambda folder: [*dataset_folder(folder), *SMALL_BPE],
    "fineweb_edu": lambda folder: [*named_dataset(folder), "data.source.val_fraction=0.2"],
    "megatron": indexed_ids,
    "nanogpt": raw_ids,
    "pile": lambda folder: [*indexed_ids(folder), *tokenizer_file(folder)],
}


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF_DIR / "data").glob("*.yaml")))
def test_data_config_prepares_a_local_file(name: str, tmp_path: Path) -> None:
    cfg = data_config(f"+data={name}", "data.val_tokens=1000", *LOCAL[name](tmp_path))
    data = prepare(cfg, tmp_path / "data")
    assert data.meta["name"] == name
    assert cfg.vocab_size in (None, data.vocab_size)
    assert len(data.val) == 1000
    assert len(data.train) >= 4000
    if data.tokenizer.kind == "ids":
        assert data.meta["n_val_bytes"] is None
    else:
        assert data.meta["n_val_bytes"] > 900
        assert data.meta["xz_bpb"] > 0


def test_vocabulary_of_a_file_tokenizer_may_be_left_open(tmp_path: Path) -> None:
    given = [*tokenizer_file(tmp_path), *text_file(tmp_path)]
    cfg = data_config("+data=text", "tokenizer@data.tokenizer=file", *given)
    assert cfg.vocab_size is None
    assert prepare(cfg, tmp_path / "data").vocab_size == 300
