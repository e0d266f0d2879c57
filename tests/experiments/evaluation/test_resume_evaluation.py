"""Evaluations that are killed, shared by processes, or started from lm-eval's own command line."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from experiments.config.entry import CONF_DIR, RunFailed
from experiments.evaluation.evaluating import Evaluation
from experiments.evaluation.pack import Pack
from experiments.runs.run_dir import RunDir
from experiments.runs.trained_model import load_model, load_tokenizer
from experiments.system import ranks
from models.gpt.model import GPT

TASKS = ("piqa", "lambada_openai")


def evaluation(pack: Path, *overrides: str) -> Evaluation:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        given = [f"pack={pack}", "tasks=base", f"tasks.tasks=[{','.join(TASKS)}]", "device=cpu"]
        return Evaluation(compose("evaluate", overrides=[*given, *overrides]))


def files(run: RunDir) -> dict[str, Any]:
    """Everything in eval/, without what the clock decides."""
    return {
        file.name: re.sub(r'"time_s": [0-9.]+', "", file.read_text())
        for file in sorted((run.path / "eval").iterdir())
    }


def test_each_document_has_its_own_scores(run: RunDir, paper_pack: Path) -> None:
    scored = evaluation(paper_pack).score(run)
    for task, second in {"piqa": "acc_norm", "lambada_openai": "perplexity"}.items():
        lines = (run.path / "eval" / f"{task}.documents.jsonl").read_text().splitlines()
        head, *rows = map(json.loads, lines)
        protocol = scored[task]["protocol"]
        assert head == {"task": task, "protocol_hash": protocol["protocol_hash"]}
        assert len(rows) == len({row["doc"] for row in rows}) == protocol["n_documents"]
        assert all(set(row) == {"doc", "acc", second} for row in rows)
        mean = sum(row["acc"] for row in rows) / len(rows)
        assert mean == pytest.approx(scored[task]["results"][task]["acc,none"])
        assert protocol["subset"] is Pack(paper_pack).tasks[task]["subset"]
        assert len(protocol["documents"]) == len(protocol["pack"]) == 16
    limited = evaluation(paper_pack, "tasks.limit=2").score(run)["piqa"]["protocol"]
    assert (limited["n_documents"], limited["subset"]) == (2, True)


class Killed(BaseException):
    """What a test stops an evaluation with; nothing catches it."""


def test_a_killed_evaluation_goes_on(
    run: RunDir, paper_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation(paper_pack).score(run)
    undisturbed = files(run)
    for file in (run.path / "eval").iterdir():
        file.unlink()
    n_passes, dies_at = 0, 8
    features = GPT.features

    def dying(self: GPT, *args: Any) -> Any:
        nonlocal n_passes
        n_passes += 1
        if n_passes == dies_at:
            raise Killed
        return features(self, *args)

    monkeypatch.setattr(GPT, "features", dying)
    for _ in range(30):  # each start gets a few passes further
        n_passes, before = 0, kept(run)
        try:
            evaluation(paper_pack, "batch_tokens=40").score(run)
            break
        except Killed:
            assert kept(run) > before
    assert n_passes < dies_at
    assert before > 0
    ours = files(run)
    assert ours.keys() == undisturbed.keys()  # nothing of the journal is left
    for name in ours:
        assert numbers(ours[name]) == pytest.approx(numbers(undisturbed[name]), abs=1e-4)


def kept(run: RunDir) -> int:
    """Finished tasks and answers on disk, weighed so that a task outweighs its answers."""
    folder = run.path / "eval"
    answers = [
        line for f in folder.glob("*.partial-*") for line in f.read_text().splitlines() if line
    ]
    return len(answers) + 1000 * len(list(folder.glob("*.json")))


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r": (-?[0-9]+\.[0-9e+-]+)", text)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.limit=some", "tasks.limit is 'some': it must be a number above 0"),
        ("tasks.num_fewshot=1.5", "tasks.num_fewshot is 1.5: it must be a whole number, 0 or more"),
        ("tasks.gen_kwargs=5", "tasks.gen_kwargs is 5: it must be {NAME: VALUE, ...}"),
        ("n_threads=0", "n_threads is 0: it must be a whole number, 1 or more"),
        ("pack=2024", "2024 is not a task pack"),
        ("seed=-1", "seed is -1: it must be a whole number from 0 to"),
        ("device=cuda:77", "device=cuda:77 cannot be used here"),
    ],
)
def test_bad_settings_are_one_line(paper_pack: Path, override: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        evaluation(paper_pack, override)


def test_what_fails_in_one_of_several_processes_ends_it_in_one_line(
    run: RunDir, paper_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.path / "checkpoints" / "last.ckpt").unlink()
    monkeypatch.setattr(ranks, "size", lambda: 2)
    with pytest.raises(RunFailed, match=r"released: .* has no last checkpoint"):
        evaluation(paper_pack).score(run)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(run: RunDir, paper_pack: Path) -> None:
    evaluation(paper_pack).score(run)
    alone = files(run)
    for file in (run.path / "eval").iterdir():
        file.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "experiments.evaluate", f"run={run.path}"]
    command += [
        f"pack={paper_pack}",
        "tasks=base",
        f"tasks.tasks=[{','.join(TASKS)}]",
        "device=cpu",
    ]
    done = subprocess.run(
        [*command, "n_threads=1"],
        cwd=CONF_DIR.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("piqa scored in") == 1
    assert "it/s" not in done.stderr  # no bars in a file
    together = files(run)
    assert together.keys() == alone.keys()
    for name in together:
        assert numbers(together[name]) == pytest.approx(numbers(alone[name]), abs=1e-5)


def test_lm_eval_finds_runs_under_its_own_name_for_them(run: RunDir) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    import experiments.evaluation.lm_eval_cli  # noqa: F401, registers
    from experiments.evaluation.adapter import LanguageModelLM

    chosen = f"run={run.path},prefix=newline,dtype=bfloat16"
    theirs = get_model("rwkv_parity").create_from_arg_string(
        chosen, {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
    )
    ours = LanguageModelLM(
        load_model(run, "last", dtype="bfloat16"), load_tokenizer(run), prefix="newline"
    )
    asked = [Instance("loglikelihood", doc={}, arguments=("a b", " c"), idx=0)]
    assert theirs.loglikelihood(asked) == ours.loglikelihood(asked)
    assert theirs.get_model_info()["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="has no model_args dtyp"):
        get_model("rwkv_parity").create_from_arg_string(f"run={run.path},dtyp=float16")
    with pytest.raises(ValueError, match="is not a run directory"):
        get_model("rwkv_parity").create_from_arg_string("run=nowhere")
