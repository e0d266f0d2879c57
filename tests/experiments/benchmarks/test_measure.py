"""How benches measure and report, and the command that runs them; nothing depends on speed."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_method

from experiments.benchmark import SHARED
from experiments.benchmarks.loss import TOY, loss_step
from experiments.benchmarks.measure import (
    Report,
    Timings,
    as_text,
    check_counts,
    interleaved,
    peak_memory,
)
from experiments.config.entry import CONF_DIR
from experiments.config.identity import plain
from experiments.config.targets import check_targets

from ...random_runs import FAMILIES, random_run

BENCHES = sorted(path.stem for path in (CONF_DIR / "bench").glob("*.yaml"))


def test_candidates_take_turns_forwards_and_backwards() -> None:
    calls: list[str] = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 3)
    assert "".join(calls) == "cba" + "abc" + "cba" + "abc"
    assert [len(seconds[name]) for name in "abc"] == [3, 3, 3]
    assert interleaved({"a": lambda: 0.25}, 2, warmup=0) == {"a": [0.25, 0.25]}  # timed itself


def test_ratios_compare_within_rounds() -> None:
    # the machine slowed down tenfold in the last two rounds; the ratio did not change
    seconds = Timings({"a": [2, 20, 20], "b": [1, 10, 10]})
    assert seconds.ratio("a", "b") == 2
    assert seconds.median("a") == 20


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("peak_mem_bytes", 3 * 2**20, "3 MiB"),
        ("state_bytes", 0, "0 B"),
        ("x", 12345.6, "12,346"),
        ("x", 0.012345, "0.0123"),
        ("x", 12345, "12,345"),
        ("x", None, "–"),
        ("same", False, "NO"),
    ],
)
def test_values_as_text(key: str, value: Any, shown: str) -> None:
    assert as_text(key, value) == shown


def test_a_report_shows_titles_rows_and_notes() -> None:
    text = Report({"T": [{"name": "a", "x": 1.5}, {"name": "bc"}]}, ["Mind."]).text()
    table = ["name      x", "------  ---", "a       1.5", "bc        –"]
    assert text.splitlines() == ["T", *table, "", "Mind."]


@pytest.mark.parametrize("value", [0, 1.5, True, "a"])
def test_counts_are_checked(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^n is .*: it must be "):
        check_counts(m=1, n=value)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is Linux's to tell")
def test_peak_memory_sees_the_logits_and_not_the_libraries() -> None:
    full = {"n_tokens": 2048, "n_embd": 8, "vocab_size": 8192}
    case = {"kind": "full", "precision": "32-true"}
    logits = 4 * full["n_tokens"] * full["vocab_size"]  # 64 MiB; and as much for log-softmax
    peak = peak_memory(loss_step, case | TOY, case | full)
    assert peak is not None
    assert 2 * logits <= peak < 5 * logits


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_composes_and_fits_its_function(name: str) -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        settings = plain(compose("benchmark", overrides=[f"bench={name}"]))
    check_targets(settings, name)
    function = get_method(settings.pop("_target_"))
    inspect.signature(function).bind(**{k: v for k, v in settings.items() if k not in SHARED})


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.benchmark", *args],
        cwd=CONF_DIR.parent,
        capture_output=True,
        text=True,
    )


def test_help_lists_the_benches_without_heavy_imports() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "import experiments.benchmark as b\n"
        "try: b.main()\n"
        "finally: assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CONF_DIR.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in BENCHES)


@pytest.mark.slow
def test_the_command_prints_the_machine_and_writes_json(tmp_path: Path) -> None:
    run, out = random_run(tmp_path, FAMILIES[0]), tmp_path / "out.json"
    given = ["bench=generate", f"run={run.path}", "max_tokens=16", "repeats=1", f"out={out}"]
    done = command(*given, "n_threads=1")
    assert done.returncode == 0, done.stderr
    assert "n_threads 1, torch " in done.stdout
    assert done.stderr == ""  # no progress bar where nobody watches
    content = json.loads(out.read_text())
    assert content["bench"] == "generate"
    assert content["machine"]["n_threads"] == 1
    assert content["settings"]["max_tokens"] == 16
    assert [row["run"] for rows in content["tables"].values() for row in rows] == [run.name]


@pytest.mark.slow
def test_the_command_says_what_is_wrong() -> None:
    done = command("bench=loss", "n_threads=0")
    assert done.returncode == 2
    assert done.stderr == "error: n_threads is 0: it must be a whole number, 1 or more\n"
