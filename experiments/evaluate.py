"""Score finished runs zero-shot through lm-eval; one JSON file a run and task, `eval/<task>.json`.

    python -m experiments.evaluate suite=demo
    python -m experiments.evaluate run='runs/demo/rwkv4_*/*' tasks=paper12 pack=DIR
    torchrun --standalone --nproc-per-node 2 -m experiments.evaluate suite=demo

A task that is scored already, for the same weights and the same protocol, is not scored again; one
that was interrupted resumes. Processes that torchrun starts share the work.
"""

import os
import sys

from omegaconf import DictConfig

from experiments.config.entry import as_typed, entry


def main() -> None:
    typed, sys.argv[1:] = as_typed(sys.argv[1:], ("run", "pack", "suite"))

    @entry("evaluate")
    def task(cfg: DictConfig) -> None:
        cfg.merge_with(typed)
        if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
            os.environ.setdefault("TQDM_DISABLE", "1")  # before torch or lm-eval is imported
        from experiments.evaluation.evaluating import evaluate

        evaluate(cfg)

    task()


if __name__ == "__main__":
    main()
