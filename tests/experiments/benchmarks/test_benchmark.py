"""The arithmetic of the benchmarks, and that each runs at toy size; no test depends on speed."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_method

from experiments.benchmark import SHARED
from experiments.benchmarks.loss import TOY, loss_step
from experiments.benchmarks.measure import (
    Report,
    bar,
    cell,
    check_counts,
    interleaved,
    paired_ratio,
    peak_memory,
)
from experiments.config.entry import CONF_DIR
from experiments.config.identity import plain
from experiments.config.targets import check_targets

BENCHES = sorted(path.stem for path in (CONF_DIR / "bench").glob("*.yaml"))


class Clock:
    """Shows the time it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def lasting(self, *seconds: float) -> Callable[[], None]:
        left = iter(seconds)

        def candidate() -> None:
            self.now += next(left)

        return candidate


def test_interleaved_times_every_round_but_the_warmup() -> None:
    clock = Clock()
    candidates = {"a": clock.lasting(9, 9, 1, 2, 3), "b": clock.lasting(8, 8, 4, 5, 6)}
    assert interleaved(candidates, 3, warmup=2, clock=clock) == {"a": [1, 2, 3], "b": [4, 5, 6]}


def test_interleaved_takes_turns_in_both_orders() -> None:
    calls: list[str] = []
    interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 3, warmup=1)
    assert "".join(calls) == "cba" + "abc" + "cba" + "abc"


def test_a_candidate_may_time_itself() -> None:
    assert interleaved({"a": lambda: 0.25}, 2, warmup=0) == {"a": [0.25, 0.25]}


def test_paired_ratio_compares_within_rounds() -> None:
    # the machine slowed down tenfold in the last two rounds; the ratio did not change
    assert paired_ratio([2, 20, 20], [1, 10, 10]) == 2
    assert paired_ratio([3, 2, 9], [1, 1, 1]) == 3


def test_bars() -> None:
    assert bar("x", 3.6, 3.5)["met"] is True
    assert bar("x", 0.6, 0.5, at_most=True) == {
        "what": "x",
        "measured": 0.6,
        "wanted": "<= 0.5",
        "met": False,
    }
    assert bar("x", None, 1)["met"] is None


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("peak_mem_bytes", 3 * 2**20, "3 MiB"),
        ("state_bytes", 1536, "1.5 KiB"),
        ("state_bytes", 0, "0 B"),
        ("x", 12345.6, "12,346"),
        ("x", 0.012345, "0.0123"),
        ("x", 12345, "12,345"),
        ("x", None, "–"),
        ("met", False, "NO"),
    ],
)
def test_cells(key: str, value: Any, shown: str) -> None:
    assert cell(key, value) == shown


def test_report_shows_titles_rows_and_notes() -> None:
    text = Report({"T": [{"name": "a", "x": 1.5}, {"name": "bc", "x": None}]}, ["Mind."]).text()
    table = ["name      x", "------  ---", "a       1.5", "bc        –"]
    assert text.splitlines() == ["T", *table, "", "Mind."]


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_counts_are_checked(value: Any) -> None:
    with pytest.raises(ValueError, match=r"n is .* at least 1"):
        check_counts(m=1, n=value)


@pytest.mark.slow
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
    check_targets(settings)
    function = get_method(settings.pop("_target_"))
    assert settings.keys() >= set(SHARED)
    inspect.signature(function).bind(**{k: v for k, v in settings.items() if k not in SHARED})


def entry(*args: str) -> subprocess.CompletedProcess[str]:
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


def test_entry_says_what_is_wrong() -> None:
    done = entry("bench=loss", "n_threads=0")
    assert done.returncode == 2
    assert "error: n_threads is 0" in done.stderr
    assert "Traceback" not in done.stderr
