"""Scoring runs on tasks: what is scored already is kept, what was interrupted resumes."""

import logging
import random
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from experiments.config.checks import Number, Optional, Rule, check_values
from experiments.config.entry import RunFailed, one_line
from experiments.config.identity import plain
from experiments.data.token_data import TokenData
from experiments.evaluation.adapter import LanguageModelLM
from experiments.evaluation.held_out_tasks import VERSIONS
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

Contents = dict[str, dict[str, Any]]  # of result files, by task


@dataclass(frozen=True)
class Options:
    """null, or named values."""

    def fault(self, value: Any) -> str:
        return "" if value is None or OmegaConf.is_dict(value) else "{NAME: VALUE, ...}"


RULES: dict[str, Rule] = {
    "tasks.limit": Optional(Number(0, above=True)),
    "tasks.num_fewshot": Optional(Number(0, whole=True)),
    "tasks.bootstrap_iters": Number(0, whole=True),
    "tasks.gen_kwargs": Options(),
    "tasks.n_documents": Options(),
    "batch_tokens": Number(1, whole=True),
    "n_threads": Optional(Number(1, whole=True)),
    "seed": Number(0, whole=True, most=2**32 - 1),
}


class Evaluation:
    """All tasks of one configuration (conf/evaluate.yaml), to be scored on one run after the other.

    Attributes:
        failures: what could not be scored, each reported when it happened.

    Raises:
        FileNotFoundError, ValueError: for what is wrong with the configuration.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_values(cfg, RULES)
        self.cfg = cfg
        self.asked = plain(cfg.tasks)
        self.device = usable_device(cfg.device)
        self.tasks = Tasks(
            self.asked["tasks"],
            self.asked["include_path"],
            cfg.seed,
            None if cfg.pack is None else str(cfg.pack),  # pack=2024 is read as a number
            self.asked["n_documents"],
        )
        self.failures: list[str] = []

    def score(self, run: RunDir) -> Contents:
        """Score a run on every task; the content of its result files by task name.

        What fails is printed and noted in `failures`; the rest continues.
        """
        contents: Contents = {}
        try:
            lm = self._language_model(run)
            weights = weights_hash(lm.model)
        except (ValueError, OSError, RuntimeError) as error:
            self._fail(str(run.path), error)
            return contents
        for name in self.tasks.names:
            try:
                contents |= self._score_task(run, lm, name, weights)
            except Exception as error:  # whatever a task or a device can throw: the others continue
                self._fail(f"{run.path} {name}", error)
        return contents

    def _fail(self, what: str, error: Exception) -> None:
        reason = one_line(error)[:400]
        if not isinstance(error, (ValueError, OSError)):  # those are written for users
            reason = f"{type(error).__name__}: {reason}"
        if ranks.size() > 1:
            # the others would wait for this process's answers
            raise RunFailed(f"{what}: {reason}") from error
        self.failures.append(what)
        print(f"error: {what}: {reason}", file=sys.stderr, flush=True)

    def _language_model(self, run: RunDir) -> LanguageModelLM:
        return LanguageModelLM(
            load_model(run, self.cfg.checkpoint, self.device, self.cfg.dtype),
            load_tokenizer(run),
            prefix=self.cfg.prefix,
            rolling_ctx=self.cfg.rolling_ctx,
            batch_tokens=self.cfg.batch_tokens,
            seed=self.cfg.seed,
        )

    def _score_task(self, run: RunDir, lm: LanguageModelLM, name: str, weights: str) -> Contents:
        data = held_out(run) if self.tasks.uses_data(name) else None
        protocol = self._protocol(lm, name, weights, data)
        members = self.tasks.members(name)
        if members is None:  # a group: it is scored itself if it averages its tasks
            loaded = self.tasks.load(name, data)
            averaged = [k for k, group in loaded["groups"].items() if group.has_aggregation]
            members = [*loaded["tasks"], *averaged]
        old = {member: read_scored(result_file(run, member), protocol) for member in members}
        # the first's word counts: it may have written what the others were too early to see
        old = ranks.gather(old)[0]
        if not self.cfg.force and all(old.values()):
            say(f"{run.path}: {name} is scored already")
            return {member: content for member, content in old.items() if content}
        loaded = self.tasks.load(name, data)
        start, n_truncated = time.perf_counter(), lm.n_truncated
        answered_under = {**lm.protocol, "weights": weights, "seed": self.cfg.seed}
        with Journal(run.scores, name, answered_under, ranks.rank()) as lm.journal:
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
        before = f", {resumed} requests answered before" if resumed else ""
        say(f"{run.path}: {name} scored in {seconds:.1f} s{before}")
        return contents

    def _run(self, lm: LanguageModelLM, loaded: dict[str, Any]) -> dict[str, Any]:
        """lm-eval's results of loaded tasks."""
        from lm_eval import evaluator

        seed, shots, gen_kwargs = self.cfg.seed, self.asked["num_fewshot"], self.asked["gen_kwargs"]
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        for task in loaded["tasks"].values():
            fixed = task.get_config("num_fewshot")
            if fixed is None or (fixed != 0 and shots is not None):  # a fixed 0 stays 0
                task.set_config("num_fewshot", shots or 0)
            if gen_kwargs and task.get_config("output_type") == "generate_until":
                task.set_config("generation_kwargs", dict(gen_kwargs), update=True)
            task.set_fewshot_seed(seed)
        return evaluator.evaluate(
            lm,
            loaded,
            limit=self.asked["limit"],
            bootstrap_iters=self.asked["bootstrap_iters"],
            log_samples=True,
        )

    def _protocol(
        self, lm: LanguageModelLM, name: str, weights: str, data: TokenData | None
    ) -> dict[str, Any]:
        """Everything that decides a score; another value of anything is another score."""
        settings = ("num_fewshot", "limit", "gen_kwargs", "bootstrap_iters")
        protocol = {
            "lm_eval": version("lm-eval"),
            "checkpoint": self.cfg.checkpoint,
            "weights": weights,
            **lm.protocol,
            **{key: self.asked[key] for key in settings},
            "seed": self.cfg.seed,
            "pack": self.tasks.pack_hash(name),
        }
        if own_files := self.tasks.own_files_hash(name):
            protocol["task_files"] = own_files
        if data is not None:
            protocol |= {"data": data.fingerprint, "task_version": VERSIONS[name]}
        return protocol


def usable_device(asked: str) -> str:
    """The device of this process under a setting.

    Raises:
        ValueError: if it cannot be used.
    """
    device = asked
    if asked == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = ranks.local_device(device)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={asked} cannot be used here: {one_line(error)[:200]}") from None
    return device


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
    ranks.start()
    pattern = f"{cfg.paths.runs}/{cfg.suite}/*/*" if cfg.run is None else plain(cfg)["run"]
    runs = find_runs(pattern if isinstance(pattern, list) else str(pattern))
    finished = [run for run in runs if run.finished]
    for run in runs:
        if not run.finished:
            say(f"{run.path}: not finished, skipped")
    if not finished:
        raise ValueError("nothing to score: none of these runs is finished; train them first")
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
