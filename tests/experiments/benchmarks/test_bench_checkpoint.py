"""bench=checkpoint: its figures are of the files that training writes."""

from pathlib import Path

import pytest
from hydra import initialize_config_dir

from experiments.benchmarks.checkpoint import checkpoint
from experiments.config.entry import CONF_DIR


def test_what_a_save_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    model = (
        f"model=rwkv4_pico data=text data.source.paths={tmp_path / 'a.txt'} "
        f"data.val_tokens=500 paths.data={tmp_path / 'data'} ctx_len=32"
    )
    monkeypatch.setattr("experiments.benchmarks.checkpoint.seek", lambda cfg: 0.02)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        report = checkpoint([model, f"{model} model.net.n_layer=3"], str(tmp_path / "runs"), 2)
    rows, (share, seek) = report.tables.values()
    assert [row["model"] for row in rows] == ["rwkv4_pico"] * 2
    # weights and two moments, float32, and little else
    assert rows[1]["file_bytes"] > rows[0]["file_bytes"] > 12 * 2 * 256 * 16
    for row in rows:
        assert min(row[key] for key in ("stands_s", "write_s", "copy_s", "check_s")) > 0
        assert row["share"] == pytest.approx((row["stands_s"] + row["write_cpu_s"]) / 300)
    assert share["measured"] == max(row["share"] for row in rows)
    assert (seek["measured"], seek["met"]) == (0.02, False)
    assert not list((tmp_path / "runs").iterdir())
    assert report.text()
