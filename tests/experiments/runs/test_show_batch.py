"""What `show_batch` prints is what reached the model."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.config.entry import CONF_DIR
from experiments.data.tokenizer import BytesTokenizer
from experiments.runs.batch import END_OF_TEXT, batch, data_of, readable
from experiments.runs.run_dir import RunDir
from experiments.show_batch import show
from experiments.system.files import write_json
from experiments.training.fit import fit
from models.families import families

ROOT = Path(__file__).resolve().parents[3]
FAMILY = next(iter(families().values()))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(60):
        (texts / f"{i:02}.txt").write_text(f"{i} \u00e4\u20ac " * 40)
    given = [f"model={FAMILY.name}", "size=pico", "data=text", "debug=smoke", "trainer=cpu"]
    given += ["execution.micro_batch_size=2", f"data.source.paths={texts}", "data.val_tokens=300"]
    given += [f"paths.runs={tmp_path / 'runs'}", f"paths.data={tmp_path / 'data'}"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return RunDir.freeze(compose("train", overrides=[*given, "budget_tokens=1536"]), [])


def asked(made: RunDir, **changes: Any) -> dict[str, Any]:
    return {"run": str(made.path), "step": 1, "rows": 4, "ids": False} | changes


def test_it_is_what_reached_the_model(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    original = FAMILY.model.features

    def spy(self: Any, ids: torch.Tensor, state: Any = None) -> Any:
        if self.training:
            seen.append(ids.clone())
        return original(self, ids, state)

    monkeypatch.setattr(FAMILY.model, "features", spy)
    data = data_of(run)  # before it was trained at all
    expected = [list(batch(run.config, data, step)) for step in range(1, 7)]
    fit(run)
    assert len(seen) == 12  # six steps of two micro-batches
    for step, sequences in enumerate(expected):
        ids = torch.cat(seen[2 * step : 2 * step + 2]).numpy()
        assert np.array_equal([one.ids[:-1] for one in sequences], ids)
        assert [one.sample for one in sequences] == [4 * step + i for i in range(4)]


def test_the_span_it_names_holds_these_tokens(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    show(asked(run, step=2, rows=3, ids=True))
    out = capsys.readouterr().out
    file = re.search(r"data\.seed=0, (\S+)", out)
    assert file is not None
    tokens = np.fromfile(file[1], np.uint8)
    spans = re.findall(r"--- sample (\d+), slot (\d+), tokens (\d+) to (\d+)\n([\d\s]+)\n", out)
    assert [int(sample) for sample, *_ in spans] == [4, 5, 6]
    for _, slot, first, last, ids in spans:
        assert int(first) == 64 * int(slot)
        assert int(last) == int(first) + 64
        assert tokens[int(first) : int(last) + 1].tolist()[:5] == [int(i) for i in ids.split()[:5]]
    assert "1 more: rows=null shows all 4" in out
    assert "\u00e4\u20ac" in out


def test_any_step_can_be_shown(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    show(asked(run, step=10**9, rows=None))
    out = capsys.readouterr().out
    assert "step 1000000000 of 6, which lies beyond its budget" in out
    assert f"--- sample {4 * (10**9 - 1)}, " in out
    assert "more" not in out


def test_what_a_terminal_cannot_show_is_escaped() -> None:
    ids = np.frombuffer(b"a\x00\x00b\n\tc\xffd\x1b[31m\xe2\x82", np.uint8).astype(np.int64)
    shown = readable(ids, BytesTokenizer())
    assert shown == f"a{END_OF_TEXT}{END_OF_TEXT}b\n\tc\\xffd\\x1b[31m\\xe2\\x82"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 0}, "step is 0: it must be"),
        ({"rows": "x"}, "rows is 'x'"),
        ({"run": "nowhere"}, "nowhere is not a run directory"),
    ],
)
def test_bad_input_is_one_line(run: RunDir, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        show(asked(run, **changes))
    assert "\n" not in str(error.value)


def test_other_data_than_it_was_trained_on_are_not_shown(run: RunDir) -> None:
    write_json(run.manifest_file, {"data": {"fingerprint": "0" * 64}})
    with pytest.raises(ValueError, match="no longer what it was trained on"):
        show(asked(run))


@pytest.mark.slow
def test_the_command_starts_without_lightning(run: RunDir) -> None:
    code = (
        "import sys\n"
        "from experiments.show_batch import main\n"
        "main()\n"
        "heavy = {'lightning', 'lm_eval', 'pandas', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code, f"run={run.path}", "step=3", "rows=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 3 of 6" in done.stdout
