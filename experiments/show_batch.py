"""What a run saw at a step: ``python -m experiments.show_batch run=DIR step=N``.

Step 1 is the first, as in metrics.csv. Any step can be asked for, also one that is still to come.
"""

import sys
import textwrap
from itertools import islice
from typing import Any

from omegaconf import DictConfig

from experiments.config.checks import Flag, Number, Optional, Rule, check_values, step_count
from experiments.config.entry import as_typed, entry
from experiments.config.identity import plain

COUNT = Number(1, whole=True)
SETTINGS: dict[str, Rule] = {"step": COUNT, "rows": Optional(COUNT), "ids": Flag()}


def show(settings: dict[str, Any]) -> None:
    """Print the batch that the keys of conf/show_batch.yaml ask for.

    Raises:
        FileNotFoundError, ValueError: for what is wrong with them, with the run or with its data.
    """
    check_values({key: settings[key] for key in SETTINGS}, SETTINGS)
    from experiments.runs.batch import batch, data_of, readable
    from experiments.runs.run_dir import open_external

    run, step, n_rows = open_external(settings["run"]), settings["step"], settings["rows"]
    cfg, data = run.config, data_of(run)
    n_steps, end = step_count(cfg), step * cfg.batch_size
    file = data.path / data.meta["train"]["path"]
    beyond = ", which lies beyond its budget" if step > n_steps else ""
    print(f"{run.name}: step {step} of {n_steps}{beyond}")
    print(f"samples {end - cfg.batch_size} to {end - 1}, data.seed={cfg.data.seed}, {file}")
    print(f"{cfg.ctx_len + 1} tokens each: all but the last are inputs, all but the first targets")
    for one in islice(batch(cfg, data, step), n_rows):
        span = f"tokens {one.offset} to {one.offset + cfg.ctx_len}"
        print(f"\n--- sample {one.sample}, slot {one.slot}, {span}")
        if settings["ids"] or data.tokenizer.kind == "ids":
            print(textwrap.fill(" ".join(map(str, one.ids)), 100))
        if data.tokenizer.kind != "ids":
            print(readable(one.ids, data.tokenizer))
    if n_rows is not None and cfg.batch_size > n_rows:
        print(f"\n{cfg.batch_size - n_rows} more: rows=null shows all {cfg.batch_size}")


def main() -> None:
    typed, sys.argv[1:] = as_typed(sys.argv[1:], ("run",))

    @entry("show_batch")
    def task(cfg: DictConfig) -> None:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        show(plain(cfg) | typed)

    task()


if __name__ == "__main__":
    main()
