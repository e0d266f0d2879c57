"""Train one run, or with ``-m`` (or an experiment's own grid) many.

Every run is frozen into its directory first and trained in a fresh process from there. The same
command again skips what is finished, goes on with what is not, and refuses what differs.
"""

import contextlib
import shutil
import sys
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.cell import Outcome, train_cell
from experiments.config import check_config
from experiments.entry import REPORTED, entry, one_line
from experiments.run_dir import RunDir


def train(cfg: DictConfig, overrides: Sequence[str]) -> Outcome:
    """Bring one run to its end, in a process of its own.

    Raises:
        ValueError: if the run cannot be frozen, or its folder belongs to another config.
    """
    if cfg.data.vocab_size is None:  # the tokenizer file knows it
        from experiments.data.prepare import prepare
        from experiments.data.token_data import TokenData

        cfg.data.vocab_size = TokenData.open(prepare(cfg.data)).vocab_size
    check_config(cfg)
    run = RunDir.freeze(cfg, overrides)
    if run.finished:
        print(f"{run.name}: finished already", flush=True)
        return Outcome(str(run.path), "skipped")
    outcome = train_cell(run)
    if outcome.exit_code == 2 and not run.manifest:
        shutil.rmtree(run.path)  # bad input, nothing trained: leave nothing behind
        with contextlib.suppress(OSError):  # nor an empty folder of this model
            run.path.parent.rmdir()
    return outcome


@entry("train")
def main(cfg: DictConfig) -> Outcome:
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    if hydra.mode == RunMode.MULTIRUN:
        try:
            return train(cfg, overrides)
        except REPORTED as error:  # the other jobs go on
            label = ",".join(overrides)
            print(f"error: {label}: {one_line(error)}", file=sys.stderr, flush=True)
            return Outcome(label, "failed", one_line(error))
    outcome = train(cfg, overrides)
    if outcome.exit_code:
        sys.exit(outcome.exit_code)
    return outcome


if __name__ == "__main__":
    main()
