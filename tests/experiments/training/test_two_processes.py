"""Two processes that Lightning starts, by the train command, end as one does; in chunks too."""

import json
import subprocess
from pathlib import Path

import pytest

from experiments.runs.run_dir import RunDir

from ...small_runs import FAMILIES, ROOT, command


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("chunk_len", ["null", "24"])
def test_two_processes_train_like_one(
    tmp_path: Path, text: Path, model: str, chunk_len: str
) -> None:
    one = command(tmp_path / "one", text, f"model={model}")
    two = command(
        tmp_path / "two",
        text,
        f"model={model}",
        "execution.micro_batch_size=2",
        f"execution.chunk_len={chunk_len}",
        "execution.trainer.devices=2",
        "execution.trainer.strategy=ddp",
    )
    for args in (one, two):
        done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    runs = [RunDir(next((tmp_path / n / "runs").glob("*/*/*"))) for n in ("one", "two")]
    assert runs[0].path.name == runs[1].path.name
    assert [json.loads(json.dumps(r.manifest["device"]["n_devices"])) for r in runs] == [1, 2]
    a, b = (r.result for r in runs)
    assert a is not None
    assert b is not None
    assert b["val/loss"] == pytest.approx(a["val/loss"], rel=1e-3)
    assert b["tokens"] == a["tokens"]
