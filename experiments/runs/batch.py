"""What a run sees at a step, computed from its config and the prepared data like the run's own."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from omegaconf import DictConfig

from experiments.data.order import TrainWindows
from experiments.data.prepare import prepare
from experiments.data.token_data import TokenData
from experiments.data.tokenizer import Tokenizer
from experiments.runs.run_dir import RunDir
from experiments.runs.trained_model import held_out

END_OF_TEXT = "<end of text>"


@dataclass
class Sequence:
    """One sequence of a batch.

    Attributes:
        sample: its number among all samples of the run.
        slot: which of the equal spans of the training tokens it is.
        offset: token of the file that it starts at.
        ids: (ctx_len + 1,) int64: the last is no input, the first no target.
    """

    sample: int
    slot: int
    offset: int
    ids: np.ndarray


def data_of(run: RunDir) -> TokenData:
    """The data of a run, prepared again where it is no longer there.

    Raises:
        FileNotFoundError, ValueError: if its source is gone or is no longer what it was.
    """
    if "data" not in run.config:
        raise ValueError(f"{run.path} was not trained here: it names no data")
    return held_out(run) if run.manifest else prepare(run.config.data, run.config.paths.data)


def batch(cfg: DictConfig, data: TokenData, step: int) -> Iterator[Sequence]:
    """The sequences of optimizer step ``step``, counted from 1, in the order of their samples."""
    windows = TrainWindows(data, cfg.ctx_len, cfg.data.seed)
    for sample in range((step - 1) * cfg.batch_size, step * cfg.batch_size):
        slot = windows.slot(sample)
        inputs, targets = (part.numpy() for part in windows[sample])
        offset = data.meta["train"]["offset"] + slot * cfg.ctx_len
        yield Sequence(sample, slot, offset, np.append(inputs, targets[-1]))


def readable(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of ids; what is not UTF-8, or would disturb a terminal, as escapes."""
    starts = np.flatnonzero(ids == tokenizer.eot_id)
    parts = [part[part != tokenizer.eot_id] for part in np.split(ids, starts)]
    texts = (tokenizer.decode_bytes(part).decode("utf-8", "backslashreplace") for part in parts)
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in END_OF_TEXT.join(texts)
    )
