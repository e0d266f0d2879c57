"""What `show_batch` prints is what reached the model."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.config.entry import CONF_DIR
from experiments.data.token_data import TokenData
from experiments.data.tokenizer import BytesTokenizer
from experiments.runs.batch import END_OF_TEXT, batch, data_of, readable
from experiments.runs.run_dir import RunDir
from experiments.show_batch import show
from experiments.system.files import write_json
from models.rwkv4.model import RWKV4

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(60):
        (texts / f"{i:02}.txt").write_text(f"{i} \u00e4\u20ac " * 40)
    given = ["data=text", "debug=smoke", "trainer=cpu", "size=pico", "execution.micro_batch_size=2"]
    given += [f"data.source.paths={texts}", "data.val_tokens=300", "budget_tokens=1536"]
    given += [f"paths.runs={tmp_path / 'runs'}", f"paths.data={tmp_path / 'data'}"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return RunDir.freeze(compose("train", overrides=given), [])


def asked(made: RunDir, **changes: Any) -> dict[str, Any]:
    return {"run": str(made.path), "step": 1, "rows": 4, "ids": False} | changes


def test_it_is_what_reached_the_model(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.training.fit import fit

    seen: list[torch.Tensor] = []
    original = RWKV4.features

    def spy(self: RWKV4, ids: torch.Tensor, state: Any = None) -> Any:
        if self.training:
            seen.append(ids.clone())
        return original(self, ids, state)

    monkeypatch.setattr(RWKV4, "features", spy)
    data = data_of(run)  # before it was trained at all
    expected = [list(batch(run.config, data, step)) for step in range(1, 7)]
    fit(run)
    assert len(seen) == 12  # six steps of two micro-batches
    for step, sequences in enumerate(expected):
        ids = torch.cat(seen[2 * step : 2 * step + 2]).numpy()
        assert np.array_equal([one.ids[:-1] for one in sequences], ids)
        assert [one.sample for one in sequences] == [4 * step + i for i in range(4)]


def test_the_place_it_names_holds_these_tokens(
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
    show(asked(run, rows=None))
    assert "more" not in capsys.readouterr().out


def test_any_step_is_found_at_once(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_of(run)
    start = time.perf_counter()
    far = list(batch(run.config, data, 10**9))
    assert time.perf_counter() - start < 0.1
    assert far[0].sample == 4 * (10**9 - 1)
    show(asked(run, step=10**9))
    assert "step 1000000000 of 6, which lies beyond its budget" in capsys.readouterr().out


def test_what_a_terminal_cannot_show_is_escaped() -> None:
    tokenizer = BytesTokenizer()
    ids = np.frombuffer(b"a\x00\x00b\n\tc\xffd\x1b[31m\xe2\x82", np.uint8).astype(np.int64)
    assert readable(ids, tokenizer) == (
        f"a{END_OF_TEXT}{END_OF_TEXT}b\n\tc\\xffd\\x1b[31m\\xe2\\x82"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 0}, "step is 0: it must be"),
        ({"step": "x"}, "step is 'x'"),
        ({"rows": 0}, "rows is 0"),
        ({"run": "nowhere"}, "nowhere is not a run directory"),
    ],
)
def test_bad_input_is_one_line(run: RunDir, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        show(asked(run, **changes))
    assert "\n" not in str(error.value)


def test_other_data_than_it_was_trained_on_are_not_shown(run: RunDir) -> None:
    write_json(run.path / "manifest.json", {"data": {"fingerprint": "0" * 64}})
    with pytest.raises(ValueError, match="no longer what it was trained on"):
        show(asked(run))


def test_a_converted_run_has_no_batches(run: RunDir) -> None:
    text = (run.path / "config.yaml").read_text()
    start, end = text.index("data:\n"), text.index("model:\n")
    (run.path / "config.yaml").write_text(text[:start] + text[end:])
    with pytest.raises(ValueError, match="it names no data"):
        show(asked(RunDir(run.path)))


def test_ids_without_a_tokenizer_are_shown_as_ids(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = TokenData.open

    def without_text(path: Path) -> TokenData:
        data = opened(path)
        data.tokenizer.kind = "ids"
        return data

    monkeypatch.setattr(TokenData, "open", without_text)
    show(asked(run, rows=1))
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"[\d ]+", lines[-3])


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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "step 3 of 6" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "experiments.show_batch", f"run={run.path}"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "step" in done.stderr
