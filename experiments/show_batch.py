"""What a run saw at a step: ``python -m experiments.show_batch run=DIR step=N``.

Step 1 is the first, as in metrics.csv. The batch is computed from the run's config and the prepared
data, like the run's own, so any step can be asked for at once, also one that is still to come.
"""

import sys
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from experiments.config.checks import step_count
from experiments.config.entry import as_typed, entry
from experiments.config.identity import plain
from experiments.runs.run_dir import RunDir

if TYPE_CHECKING:
    from experiments.data.token_data import TokenData
    from experiments.data.tokenizer import Tokenizer

END_OF_TEXT = "<end of text>"


@dataclass
class Sequence:
    """One sequence of a batch."""

    sample: int  # its number among all samples of the run
    slot: int  # which of the equal spans of the training tokens it is
    offset: int  # token of the file that it starts at
    ids: np.ndarray  # (ctx_len + 1,) int64: the last is no input, the first no target


def batch(cfg: DictConfig, data: "TokenData", step: int) -> list[Sequence]:
    """The sequences of optimizer step ``step``, counted from 1, in the order of their samples."""
    from experiments.data.token_data import TrainWindows

    windows = TrainWindows(data, cfg.ctx_len, cfg.data.seed)
    first = (step - 1) * cfg.batch_size
    sequences = []
    for sample in range(first, first + cfg.batch_size):
        slot = windows.slot(sample)
        inputs, targets = (part.numpy() for part in windows[sample])
        offset = data.meta["train"]["offset"] + slot * cfg.ctx_len
        sequences.append(Sequence(sample, slot, offset, np.append(inputs, targets[-1])))
    return sequences


def data_of(run: RunDir) -> "TokenData":
    """The data of a run, prepared anew where it is no longer there.

    Raises:
        FileNotFoundError, ValueError: if its source is gone or is no longer what it was.
    """
    from experiments.data.prepare import prepare
    from experiments.data.token_data import TokenData
    from experiments.runs.trained_model import held_out

    if "data" not in run.config:
        raise ValueError(f"{run.path} was not trained here: it names no data")
    return held_out(run) if run.manifest else TokenData.open(prepare(run.config.data))


def readable(ids: np.ndarray, tokenizer: "Tokenizer") -> str:
    """The text of ids; what is not UTF-8, or would disturb a terminal, as escapes."""
    starts = np.flatnonzero(ids == tokenizer.eot_id)
    parts = [part[part != tokenizer.eot_id] for part in np.split(ids, starts)]
    texts = (tokenizer.decode_bytes(part).decode("utf-8", "backslashreplace") for part in parts)
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in END_OF_TEXT.join(texts)
    )


def show(settings: dict[str, Any]) -> None:
    """Print the batch that the keys of conf/show_batch.yaml ask for.

    Raises:
        FileNotFoundError, ValueError: for what is wrong with them, with the run or with its data.
    """
    for key, may_be_null in (("step", False), ("rows", True)):
        value = settings[key]
        if not (type(value) is int and value >= 1) and not (value is None and may_be_null):
            raise ValueError(f"{key} is {value!r}: it must be a whole number, 1 or more")
    run, step = RunDir(settings["run"]), settings["step"]
    cfg, data = run.config, data_of(run)
    n_steps, end = step_count(cfg), step * cfg.batch_size
    file = data.path / data.meta["train"]["path"]
    beyond = ", which lies beyond its budget" if step > n_steps else ""
    print(f"{run.name}: step {step} of {n_steps}{beyond}")
    print(f"samples {end - cfg.batch_size} to {end - 1}, data.seed={cfg.data.seed}, {file}")
    print(f"{cfg.ctx_len + 1} tokens each: all but the last are inputs, all but the first targets")
    shown = batch(cfg, data, step)
    for one in shown[: settings["rows"]]:
        span = f"tokens {one.offset} to {one.offset + cfg.ctx_len}"
        print(f"\n--- sample {one.sample}, slot {one.slot}, {span}")
        if settings["ids"] or data.tokenizer.kind == "ids":
            print(textwrap.fill(" ".join(map(str, one.ids)), 100))
        if data.tokenizer.kind != "ids":
            print(readable(one.ids, data.tokenizer))
    if settings["rows"] is not None and len(shown) > settings["rows"]:
        print(f"\n{len(shown) - settings['rows']} more: rows=null shows all {len(shown)}")


def main() -> None:
    typed, sys.argv[1:] = as_typed(sys.argv[1:], ("run",))

    @entry("show_batch")
    def task(cfg: DictConfig) -> None:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        show(plain(cfg) | typed)

    task()


if __name__ == "__main__":
    main()
