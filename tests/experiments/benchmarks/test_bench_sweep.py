"""bench=sweep, with commands that take no time."""

from pathlib import Path

import pytest

from experiments.benchmarks import sweep as bench_sweep
from experiments.config.entry import RunFailed


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, ...]] = []

    def command(*overrides: str) -> None:
        given.append(overrides)
        folder = next(o.partition("=")[2] for o in overrides if o.startswith("paths.runs="))
        if "dry_run=true" in overrides:
            run = Path(folder) / "finished" / "m" / "seed=0"
            run.mkdir(parents=True)
            (run / "config.yaml").touch()

    monkeypatch.setattr(bench_sweep, "command", command)
    report = bench_sweep.measure(["model=m"], n_finished=7, n_cells=3, repeats=2)
    assert report.tables["Skipping finished cells"][0]["cells"] == 7
    assert [row["jobs"] for row in report.tables["3 cells, one thread each"]] == ["1", "2"]
    assert len(report.tables["Against what is wanted"]) == 2
    assert "seed=range(7)" in given[0]
    jobs = [o for overrides in given for o in overrides if o.startswith("jobs=")]
    assert jobs == ["jobs=1", "jobs=2", "jobs=2", "jobs=1"]


def test_a_sweep_that_fails_is_one_line() -> None:
    with pytest.raises(RunFailed, match="exit code 2: error: "):
        bench_sweep.command("nosuch=1")
