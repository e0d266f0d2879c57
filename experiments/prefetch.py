"""Make a task pack: tasks and their rows in one folder, to be scored without a network.

    python -m experiments.prefetch tasks=paper12 out=packs/paper12
    python -m experiments.prefetch tasks=paper12 out=packs/paper12 source=rows \\
        'files={record: record_dev.jsonl}' tokenizer_file=20B_tokenizer.json

Rows come from the hub, or from `<task>.jsonl` files of one row a line. Every document is built once
as the task builds it, so that what does not fit is found here and not on the cluster. Training rows
are taken along only where the task set asks for few-shot examples (`tasks.num_fewshot`).
"""

import logging
import os
import sys
from pathlib import Path

from omegaconf import DictConfig

from experiments.config.entry import entry
from experiments.config.identity import plain
from experiments.evaluation.pack import Pack
from experiments.evaluation.prefetching import (
    Wanted,
    check_out,
    check_tokenizer,
    find_files,
    make_pack,
)
from experiments.evaluation.tasks import Tasks


@entry("prefetch")
def main(cfg: DictConfig) -> None:
    out, asked = Path(str(cfg.out)), plain(cfg.tasks)  # out=2024 is read as a number
    check_out(out, cfg.force)
    tokenizer = check_tokenizer(cfg.tokenizer_file)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # before it is imported
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = Tasks(asked["tasks"], asked["include_path"], seed=0)
    leaves = [leaf for name in tasks.names for leaf in tasks.leaves(name)]
    folder = None if cfg.source is None else Path(str(cfg.source))
    files = find_files(folder, plain(cfg)["files"] or {}, leaves)
    wanted = Wanted(tasks, asked["num_fewshot"], asked["n_documents"], files, tokenizer)
    digest = make_pack(out, wanted)
    for name, task in Pack(out).tasks.items():
        n_rows, of = task["splits"][task["scored"]]["rows"], task["official"] or "an unknown number"
        note = f" (a subset: the official split has {of})" if task["subset"] else ""
        print(f"{name}: {n_rows} rows of {task['scored']}{note}")
    print(f"{out}: {len(leaves)} tasks, hash {digest[:16]}")


if __name__ == "__main__":
    main()
