"""Scoring run directories: files, skipping, failures, tasks from local files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.config.entry import CONF_DIR
from experiments.data.prepare import prepare
from experiments.evaluation.evaluating import Evaluation
from experiments.evaluation.scores import table
from experiments.evaluation.tasks import Tasks
from experiments.runs.run_dir import RunDir
from experiments.system.files import write_json
from models.rwkv4.model import RWKV4

NET = {
    "_target_": "models.rwkv4.model.RWKV4",
    "vocab_size": 256,
    "n_layer": 1,
    "n_embd": 16,
    "ctx_len": 64,
}
TASK_YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
metadata: {{version: 3.0}}
"""


def make_run(path: Path, data: dict[str, Any], seed: int = 0) -> RunDir:
    """A finished run of a tiny model on the data of a config."""
    torch.manual_seed(seed)
    model = RWKV4(**{k: v for k, v in NET.items() if k != "_target_"})  # type: ignore[arg-type]
    torch.nn.init.normal_(model.emb.weight)
    paths = {"data": str(Path(data["source"]["paths"]).parent / "data")}
    config = OmegaConf.create({"data": data, "paths": paths, "model": {"net": NET}})
    prepared = prepare(config.data, config.paths.data)
    path.mkdir(parents=True)
    OmegaConf.save(config, path / "config.yaml")
    (path / "checkpoints").mkdir()
    weights = {f"model.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": weights}, path / "checkpoints" / "last.ckpt")
    (path / "tokenizer.json").write_text(prepared.tokenizer.to_json())
    write_json(path / "manifest.json", {"data": {"fingerprint": prepared.fingerprint}})
    write_json(path / "result.json", {"step": 1})
    return RunDir(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The data config of the runs."""
    root = tmp_path_factory.mktemp("prepared")
    for name, n_words in (("train", 400), ("val", 1600)):
        (root / f"{name}.txt").write_text(" ".join(f"word{i:06d}" for i in range(n_words)))
    source = {
        "_target_": "experiments.data.sources.TextFiles",
        "paths": str(root / "train.txt"),
        "val_paths": str(root / "val.txt"),
    }
    tokenizer = {"_target_": "experiments.data.tokenizer.BytesTokenizer", "vocab_size": 256}
    cfg = {"name": "tiny", "source": source, "tokenizer": tokenizer, "val_tokens": None}
    return cfg | {"vocab_size": 256}


@pytest.fixture
def run(tmp_path: Path, data: dict[str, Any]) -> RunDir:
    return make_run(tmp_path / "runs" / "toy" / "rwkv4_toy" / "seed=0", data)


def config(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("evaluate", overrides=["device=cpu", *overrides])


def scored(run: RunDir, *overrides: str) -> dict[str, dict[str, Any]]:
    evaluation = Evaluation(config(*overrides))
    contents = evaluation.score(run)
    assert evaluation.failures == []
    return contents


def stamps(run: RunDir) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (run.path / "eval").iterdir()}


def test_files_hold_lm_evals_keys_and_the_protocol(run: RunDir) -> None:
    contents = scored(run)
    assert set(contents) == {"cloze", "bits_per_byte"}
    assert {file.name for file in (run.path / "eval").iterdir()} == {
        "cloze.json",
        "cloze.documents.jsonl",
        "bits_per_byte.json",
        "bits_per_byte.documents.jsonl",
    }
    stored = json.loads((run.path / "eval" / "cloze.json").read_text())
    assert stored == contents["cloze"]
    assert set(stored["results"]["cloze"]) >= {"acc,none", "acc_stderr,none"}
    assert stored["versions"] == {"cloze": 1}
    assert stored["n-shot"] == {"cloze": 0}
    assert stored["config"]["cloze"]["metadata"] == {"version": 1, "chance": 0.25}
    assert stored["n-samples"]["cloze"]["effective"] >= 8
    assert len(stored["protocol"]["weights"]) == 16
    assert stored["protocol"]["checkpoint"] == "last"
    expected = {"prefix": "eot", "dtype": "float32", "rolling_ctx": 64, "n_truncated": 0}
    assert expected.items() <= stored["protocol"].items()
    shown = table({run.name: contents})
    assert f"{run.name} cloze" in shown
    assert "bits_per_byte" in shown
    bits = contents["bits_per_byte"]["results"]["bits_per_byte"]["bits_per_byte,none"]
    assert 6 < bits < 10  # the untrained model is close to uniform


def test_what_is_scored_is_not_scored_again(run: RunDir, data: dict[str, Any]) -> None:
    first = scored(run)
    before = stamps(run)
    assert scored(run, "batch_tokens=100", "n_threads=1") == first  # not part of the protocol
    assert stamps(run) == before
    scored(run, "force=true")
    assert all(stamps(run)[name] > before[name] for name in before)
    before = stamps(run)
    assert scored(run, "prefix=newline")["cloze"]["protocol"]["prefix"] == "newline"
    assert all(stamps(run)[name] > before[name] for name in before)
    shutil.rmtree(run.path / "checkpoints")
    other = make_run(run.path.parent / "seed=1", data, seed=1)
    shutil.move(other.path / "checkpoints", run.path / "checkpoints")
    again = scored(run)["cloze"]["protocol"]["weights"]
    assert again != first["cloze"]["protocol"]["weights"]


def test_data_that_changed_is_refused(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = run.manifest
    manifest["data"]["fingerprint"] = "other"
    write_json(run.path / "manifest.json", manifest)
    evaluation = Evaluation(config())
    assert evaluation.score(run) == {}
    assert evaluation.failures == [f"{run.path} cloze", f"{run.path} bits_per_byte"]
    assert "data=tiny is no longer what it was trained on" in capsys.readouterr().err
    assert not (run.path / "eval").exists()


@pytest.fixture
def local_tasks(tmp_path: Path) -> Path:
    """Three tasks of local rows: a choice, a last word, a generation; and one that is broken."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"q": f"Word {i} is", "options": ["right", "wrong"], "gold": i % 2, "last": " word000"}
        for i in range(6)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "local_choice": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: options\ndoc_to_target: gold\nnum_fewshot: null\n"
        "fewshot_split: test\ntag: local_tag\n",
        "local_last": "output_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: last\n"
        "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false},"
        "{metric: acc, aggregation: mean, higher_is_better: true}]\ntag: local_tag\n",
        "local_text": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: last\n"
        "generation_kwargs: {until: ['x'], max_gen_toks: 8}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
        "local_broken": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\n",
    }
    for name, body in kinds.items():
        rows_file = "nowhere.jsonl" if name == "local_broken" else "rows.jsonl"
        head = TASK_YAML.format(name=name, rows=folder / rows_file, cache=tmp_path / "cache")
        (folder / f"{name}.yaml").write_text(head + body)
    (folder / "group.yaml").write_text(
        "group: local_group\ntask: [local_choice, local_last]\nmetadata: {version: 2.0}\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return folder


def test_tasks_from_local_files(run: RunDir, local_tasks: Path, monkeypatch) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # lm-eval's bootstrap would fork
    options = (f"tasks.include_path={local_tasks}", "tasks.bootstrap_iters=10")
    asked = "tasks.tasks=[local_tag,local_text]"
    contents = scored(run, "tasks=base", asked, *options)
    assert set(contents) == {"local_choice", "local_last", "local_text"}
    assert 0 <= contents["local_choice"]["results"]["local_choice"]["acc,none"] <= 1
    last = contents["local_last"]["results"]["local_last"]
    assert last["perplexity,none"] > 1
    assert last["perplexity_stderr,none"] > 0
    assert contents["local_text"]["versions"] == {"local_text": 3.0}
    before = stamps(run)
    assert scored(run, "tasks=base", asked, *options) == contents  # a tag is known member by member
    assert stamps(run) == before
    shots = scored(run, "tasks=base", "tasks.tasks=[local_choice]", "tasks.num_fewshot=2", *options)
    assert shots["local_choice"]["n-shot"] == {"local_choice": 2}
    short = scored(
        run,
        "tasks=base",
        "tasks.tasks=[local_text]",
        "tasks.gen_kwargs={max_gen_toks: 2}",
        *options,
    )
    assert short["local_text"]["config"]["local_text"]["generation_kwargs"]["max_gen_toks"] == 2


def test_a_task_file_that_changed_is_scored_again(run: RunDir, local_tasks: Path) -> None:
    options = ("tasks=base", "tasks.tasks=[local_choice]", f"tasks.include_path={local_tasks}")
    before = scored(run, *options)["local_choice"]
    (local_tasks / "local_last.yaml").unlink()  # another task's file
    assert scored(run, *options)["local_choice"] == before
    file = local_tasks / "local_choice.yaml"
    file.write_text(file.read_text().replace("'{{q}}'", "'{{q}} what?'"))
    after = scored(run, *options)["local_choice"]
    assert after["protocol"]["protocol_hash"] != before["protocol"]["protocol_hash"]
    (local_tasks / "code.py").write_text("def process(rows):\n    return rows\n")
    assert scored(run, *options)["local_choice"]["protocol"] != after["protocol"]


def test_a_group_has_a_file_of_its_own_beside_its_tasks(
    run: RunDir, local_tasks: Path, monkeypatch
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    options = ("tasks=base", "tasks.tasks=[local_group]", f"tasks.include_path={local_tasks}")
    contents = scored(run, *options, "tasks.bootstrap_iters=10")
    assert set(contents) == {"local_group", "local_choice", "local_last"}
    mean = contents["local_group"]["results"]["local_group"]["acc,none"]
    parts = [contents[name]["results"][name]["acc,none"] for name in contents if name[6] != "g"]
    assert mean == pytest.approx(sum(parts) / 2)
    before = stamps(run)
    assert set(scored(run, *options, "tasks.bootstrap_iters=10")) == set(contents)
    assert stamps(run) == before


def test_a_task_that_cannot_be_loaded_stops_no_other(
    run: RunDir, local_tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "tasks.tasks=[local_broken,local_choice]"
    evaluation = Evaluation(config("tasks=base", asked, f"tasks.include_path={local_tasks}"))
    assert set(evaluation.score(run)) == {"local_choice"}
    assert evaluation.failures == [f"{run.path} local_broken"]
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error:")]
    assert "neither cached here nor can they be downloaded" in line
    assert "tasks.include_path" in line


@pytest.mark.slow
def test_a_task_of_lm_eval_by_name(monkeypatch) -> None:
    paper = OmegaConf.load(CONF_DIR / "tasks" / "paper12.yaml").tasks
    tasks = Tasks([*paper, "ai2_arc", "mmlu"], None, 0)
    assert tasks.members("ai2_arc") == ["arc_challenge", "arc_easy"]
    assert tasks.members("mmlu") is None
    assert tasks.members("piqa") == ["piqa"]
    with pytest.raises(ValueError, match="neither cached here nor can they be downloaded"):
        tasks.load("arc_easy", None)  # the hub is out of reach in tests
    monkeypatch.setattr(Tasks, "_manager", tasks._manager)  # reading the index takes long
    with pytest.raises(ValueError, match=r"knows no task 'arc_esay'; like it are .*arc_easy"):
        Tasks(["arc_esay"], None, 0)


@pytest.mark.slow
def test_the_command_goes_on_after_a_failure_and_reports_it(
    run: RunDir, data: dict[str, Any], tmp_path: Path
) -> None:
    broken = make_run(run.path.parent / "seed=1", data)
    (broken.path / "checkpoints" / "last.ckpt").write_bytes(b"not a checkpoint")
    unfinished = make_run(run.path.parent / "lr=0.1,seed=2", data)  # names of runs hold commas
    (unfinished.path / "result.json").unlink()
    command = [sys.executable, "-m", "experiments.evaluate", "device=cpu", "n_threads=1"]
    root = CONF_DIR.parent
    done = subprocess.run(
        [*command, "suite=toy", f"paths.runs={tmp_path}/runs"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line]
    assert [line[:6] for line in errors] == ["error:"] * 2
    assert "not a readable checkpoint" in errors[0]
    assert "seed=1" in errors[1]
    assert "not finished, skipped" in done.stdout
    assert "acc" in done.stdout
    assert (run.path / "eval" / "cloze.json").is_file()
    assert not (unfinished.path / "eval").exists()
    wrong = subprocess.run(
        [*command, f"run={tmp_path}/nothing"], cwd=root, capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: no run directory matches")
    assert len(wrong.stderr.splitlines()) == 1
    early = subprocess.run(
        [*command, f"run={unfinished.path}"], cwd=root, capture_output=True, text=True
    )
    assert early.returncode == 2
    assert early.stderr.startswith("error: nothing to score: none of these runs is finished")
    assert len(early.stderr.splitlines()) == 1
