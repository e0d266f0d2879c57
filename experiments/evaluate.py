"""Score finished runs zero-shot through lm-eval; one JSON file a run and task, `eval/<task>.json`.

    python -m experiments.evaluate suite=demo
    python -m experiments.evaluate run='runs/demo/rwkv4_*/*' tasks=paper12 pack=DIR
    torchrun --standalone --nproc-per-node 2 -m experiments.evaluate suite=demo

A task that is scored already, for the same weights and the same protocol, is not scored again; one
that was interrupted goes on. Processes that torchrun starts share the work.
"""

import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from experiments.config.entry import RunFailed, as_typed, entry, one_line
from experiments.config.identity import plain
from experiments.evaluation.journal import Journal
from experiments.evaluation.scores import (
    read_scored,
    result_file,
    split_by_task,
    table,
    write_scored,
)
from experiments.evaluation.tasks import Tasks
from experiments.runs.run_dir import RunDir, find_runs
from experiments.runs.trained_model import held_out, load_model, load_tokenizer, weights_hash
from experiments.system import ranks

if TYPE_CHECKING:
    from experiments.data.token_data import TokenData
    from experiments.evaluation.adapter import LanguageModelLM


class Evaluation:
    """All tasks of one configuration, to be run on one run after the other."""

    def __init__(self, cfg: DictConfig) -> None:
        import torch

        self.cfg = cfg
        wanted = plain(cfg.tasks)
        self.limit, self.num_fewshot = wanted["limit"], wanted["num_fewshot"]
        self.gen_kwargs, self.bootstrap_iters = wanted["gen_kwargs"], wanted["bootstrap_iters"]
        check_settings(cfg)
        self.device = cfg.device
        if cfg.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = ranks.local_device(self.device)
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device={cfg.device} cannot be used here: {one_line(error)[:200]}"
            ) from None
        self.tasks = Tasks(
            wanted["tasks"],
            wanted["include_path"],
            cfg.seed,
            None if cfg.pack is None else str(cfg.pack),  # pack=2024 is read as a number
            wanted.get("n_documents"),
        )
        self.failures: list[str] = []

    def score(self, run: RunDir) -> dict[str, dict[str, Any]]:
        """Score a run on every task; the content of its result files by task name.

        What fails is printed and noted in `failures`; the rest goes on.
        """
        contents: dict[str, dict[str, Any]] = {}
        try:
            lm = self._language_model(run)
            weights = weights_hash(lm.model)
        except (ValueError, OSError, RuntimeError) as error:
            self._fail(str(run.path), error)
            return contents
        for name in self.tasks.names:
            try:
                contents |= self._score_task(run, lm, name, weights)
            except Exception as error:  # whatever a task or a device can throw: the others go on
                self._fail(f"{run.path} {name}", error)
        return contents

    def _fail(self, what: str, error: Exception) -> None:
        if ranks.size() > 1:
            # the others would wait for this process's answers
            raise RunFailed(f"{what}: {describe(error)}") from error
        self.failures.append(what)
        print(f"error: {what}: {describe(error)}", file=sys.stderr, flush=True)

    def _language_model(self, run: RunDir) -> "LanguageModelLM":
        from experiments.evaluation.adapter import LanguageModelLM

        return LanguageModelLM(
            load_model(run, self.cfg.checkpoint, self.device, self.cfg.dtype),
            load_tokenizer(run),
            prefix=self.cfg.prefix,
            rolling_ctx=self.cfg.rolling_ctx,
            batch_tokens=self.cfg.batch_tokens,
            seed=self.cfg.seed,
        )

    def _score_task(
        self, run: RunDir, lm: "LanguageModelLM", name: str, weights: str
    ) -> dict[str, dict[str, Any]]:
        data = held_out(run) if self.tasks.uses_data(name) else None
        protocol = self._protocol(lm, name, weights, data)
        members = self.tasks.members(name)
        loaded = None
        if members is None:
            loaded = self.tasks.load(name, data)
            averaged = [k for k, group in loaded["groups"].items() if group.has_aggregation]
            members = [*loaded["tasks"], *averaged]
        old = {member: read_scored(result_file(run, member), protocol) for member in members}
        # the first's word counts: it may have written what the others were too early to see
        old = ranks.gather(old)[0]
        if not self.cfg.force and all(old.values()):
            say(f"{run.path}: {name} is scored already")
            return {member: content for member, content in old.items() if content}
        loaded = loaded or self.tasks.load(name, data)
        start, n_truncated = time.perf_counter(), lm.n_truncated
        answered_under = {**lm.protocol, "weights": weights, "seed": self.cfg.seed}
        with Journal(run.path / "eval", name, answered_under, ranks.rank()) as lm.journal:
            if self.cfg.force:
                lm.journal.answers.clear()
            for answers in ranks.gather(lm.journal.answers):  # before any of them writes more
                lm.journal.answers |= answers
            resumed = len(lm.journal.answers)
            results = self._run(lm, loaded)
        seconds = time.perf_counter() - start
        extra = {"n_truncated": lm.n_truncated - n_truncated, "time_s": round(seconds, 3)}
        contents = split_by_task(results, protocol, extra, self.tasks.documents)
        if ranks.rank() == 0:
            for task, content in contents.items():
                write_scored(run, task, content, results["samples"].get(task))
            lm.journal.discard()
        again = f", {resumed} requests answered before" if resumed else ""
        say(f"{run.path}: {name} scored in {seconds:.1f} s{again}")
        return contents

    def _run(self, lm: "LanguageModelLM", loaded: dict[str, Any]) -> dict[str, Any]:
        import random

        import numpy as np
        import torch
        from lm_eval import evaluator

        seed = self.cfg.seed
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (own != 0 and self.num_fewshot is not None):  # a fixed 0 stays 0
                task.set_config("num_fewshot", self.num_fewshot or 0)
            if self.gen_kwargs and task.get_config("output_type") == "generate_until":
                task.set_config("generation_kwargs", dict(self.gen_kwargs), update=True)
            task.set_fewshot_seed(seed)
        return evaluator.evaluate(
            lm,
            loaded,
            limit=self.limit,
            bootstrap_iters=self.bootstrap_iters,
            log_samples=True,
        )

    def _protocol(
        self, lm: "LanguageModelLM", name: str, weights: str, data: "TokenData | None"
    ) -> dict[str, Any]:
        """Everything that decides a score; another value of anything is another score."""
        from importlib.metadata import version

        protocol = {
            "lm_eval": version("lm-eval"),
            "checkpoint": self.cfg.checkpoint,
            "weights": weights,
            **lm.protocol,
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "gen_kwargs": self.gen_kwargs,
            "bootstrap_iters": self.bootstrap_iters,
            "seed": self.cfg.seed,
            "pack": None if data is not None else self.tasks.pack_hash(name),
        }
        if own_files := self.tasks.own_files_hash(name):
            protocol["task_files"] = own_files
        if data is not None:
            from experiments.evaluation.held_out_tasks import VERSIONS

            protocol |= {"data": data.fingerprint, "task_version": VERSIONS[name]}
        return protocol


def check_settings(cfg: DictConfig) -> None:
    """Raise ValueError for the first setting of conf/evaluate.yaml that is of the wrong kind."""
    tasks = plain(cfg.tasks)
    limit = tasks["limit"]
    if limit is not None and not (type(limit) in (int, float) and limit > 0):
        raise ValueError(f"tasks.limit must be a positive number or null, got {limit!r}")
    for name in ("gen_kwargs", "n_documents"):
        if not isinstance(tasks.get(name) or {}, dict):
            raise ValueError(f"tasks.{name} must be {{NAME: VALUE, ...}}, got {tasks[name]!r}")
    for name, value, least in (
        ("tasks.num_fewshot", tasks["num_fewshot"] or 0, 0),
        ("tasks.bootstrap_iters", tasks["bootstrap_iters"], 0),
        ("batch_tokens", cfg.batch_tokens, 1),
        ("n_threads", 1 if cfg.n_threads is None else cfg.n_threads, 1),
        ("seed", cfg.seed, 0),
    ):
        if type(value) is not int or not least <= value < 2**32:
            raise ValueError(f"{name} must be a whole number from {least} on, got {value!r}")


def describe(error: Exception) -> str:
    """An error as one line; its type too, unless the line was written for users."""
    line = one_line(error)[:400]
    return line if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {line}"


def say(line: str) -> None:
    """Print, in the first process alone."""
    if ranks.rank() == 0:
        print(line, flush=True)


def evaluate(cfg: DictConfig) -> None:
    """Score the runs that a config names.

    Raises:
        FileNotFoundError, ValueError: for what is wrong with it.
        RunFailed: if a run could not be scored, once all others are.
    """
    if (cfg.run is None) == (cfg.suite is None):
        raise ValueError("say what to score: run=DIRECTORY (or a glob, or a list) or suite=NAME")
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")  # before torch or lm-eval imports it
    ranks.start()
    pattern = f"{cfg.paths.runs}/{cfg.suite}/*/*" if cfg.run is None else plain(cfg)["run"]
    runs = find_runs(pattern if isinstance(pattern, list) else str(pattern))
    finished = [run for run in runs if run.finished]
    for run in runs:
        if not run.finished:
            say(f"{run.path}: not finished, skipped")
    if not finished:
        raise ValueError("nothing to score: none of these runs is finished; train them first")

    import torch

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    evaluation = Evaluation(cfg)
    if cfg.n_threads is not None:
        torch.set_num_threads(cfg.n_threads)
    scored = {run.name: evaluation.score(run) for run in finished}
    if any(scored.values()):
        say(table(scored))
    ranks.stop()
    if evaluation.failures:
        failed = ", ".join(evaluation.failures)
        raise RunFailed(f"not scored, for the reasons above: {failed}")


def main() -> None:
    typed, sys.argv[1:] = as_typed(sys.argv[1:], ("run", "pack", "suite"))

    @entry("evaluate")
    def task(cfg: DictConfig) -> None:
        cfg.merge_with(typed)
        evaluate(cfg)

    task()


if __name__ == "__main__":
    main()
