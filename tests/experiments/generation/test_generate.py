"""experiments.generate: what it writes, streams and saves, and what it refuses in one line."""

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.config.entry import CONF_DIR, as_typed
from experiments.config.identity import plain
from experiments.data.tokenizer import BytesTokenizer, IdsTokenizer
from experiments.generate import AS_TYPED, MANY
from experiments.generation import texts
from experiments.generation.state_file import load_state, save_state
from experiments.generation.texts import generate
from experiments.runs.run_dir import RunDir
from experiments.runs.trained_model import load_model
from experiments.system.files import write_text
from models.generation import Past, prefill
from models.generation import generate as generate_ids

from ...random_runs import FAMILIES, GROWING, random_run


@pytest.fixture(params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    return random_run(tmp_path, request.param)


def settings(run: RunDir, **changes: Any) -> dict[str, Any]:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = plain(compose("generate"))
    assert not set(changes) - set(cfg)
    return cfg | {"run": str(run.path), "max_tokens": 20, "device": "cpu"} | changes


def ids_of(run: RunDir, prompt: str, n: int, seed: int = 0, **how: Any) -> list[int]:
    """New ids by the library alone."""
    ids = BytesTokenizer().encode(prompt)
    generator = [torch.Generator().manual_seed(seed)]
    return generate_ids(load_model(run, "last"), [ids], n, generator=generator, eot_id=0, **how)[0]


def text_of(ids: list[int]) -> str:
    return BytesTokenizer().decode(ids)


def test_text_is_streamed_as_it_comes(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(texts, "show", shown.append)
    how = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}
    generate(settings(run, prompt="def f(", seed=3, **how))
    new = ids_of(run, "def f(", 20, seed=3, **how)
    assert "".join(shown) == text_of(new) + "\n"
    assert len([text for text in shown if text]) > 5  # not in one go
    cost = rf"{len(new)} new tokens; prefill 6 in .* tokens/s\); decode 19 in .* tokens/s\)\n"
    assert re.fullmatch(cost, capsys.readouterr().err)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_prompts_together_give_what_each_gives_alone(
    run: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path, batch_size: int
) -> None:
    prompts = ["def f(", "x", "import os"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    asked = {"prompts_file": str(tmp_path / "prompts.txt"), "batch_size": batch_size}
    generate(settings(run, temperature=0.9, seed=5, chunk_len=2, **asked))
    assert capsys.readouterr().out == "".join(
        f"--- {i + 1}: {prompt}\n{text_of(ids_of(run, prompt, 20, seed=5 + i, temperature=0.9))}\n"
        for i, prompt in enumerate(prompts)
    )


def test_a_saved_state_continues_without_its_text(
    run: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = str(tmp_path / "state")
    generate(settings(run, prompt="def f(", max_tokens=30))
    whole, _ = capsys.readouterr()
    generate(settings(run, prompt="def f(", max_tokens=10, save_state=file))
    first, _ = capsys.readouterr()
    generate(settings(run, state=file, max_tokens=20))
    second, cost = capsys.readouterr()
    assert first[:-1] + second == whole
    assert "prefill 1 in" in cost


def test_max_tokens_0_reads_and_saves(
    run: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = str(tmp_path / "state")
    generate(settings(run, prompt="def f(", max_tokens=0, save_state=file))
    assert capsys.readouterr().out == ""
    past, unread = load_state(Path(file), load_model(run, "last"))
    assert (past.ids, unread) == ([list(b"def f(")], [])
    with pytest.raises(ValueError, match="nothing is left of the saved text"):
        generate(settings(run, state=file))
    generate(settings(run, state=file, prompt="xy", max_tokens=5))
    assert capsys.readouterr().out == text_of(ids_of(run, "def f(xy", 5)) + "\n"


def test_a_state_keeps_the_penalty_of_what_it_read(
    run: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    how = {"repetition_penalty": 1.5, "save_state": str(tmp_path / "state")}
    generate(settings(run, prompt="def f(", max_tokens=16, **how))
    generate(settings(run, state=how["save_state"], max_tokens=8, **how))
    new = ids_of(run, "def f(", 24, repetition_penalty=1.5)
    assert capsys.readouterr().out == f"{text_of(new[:16])}\n{text_of(new[16:])}\n"


def test_standard_input_and_a_stop_string(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a text\n"))
    text = text_of(ids_of(run, "a text\n", 20, temperature=0.9))
    stop = text[8:10]
    generate(settings(run, prompt="-", temperature=0.9, stop=["never", stop]))
    assert capsys.readouterr().out == text.partition(stop)[0] + "\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": None}, "say which run"),
        ({"run": "nowhere"}, "nowhere is not a run directory"),
        ({"prompt": None}, "nothing to go on from: give prompt=TEXT"),
        ({"prompt": ["a", ""]}, "prompt 2 is empty"),
        ({"prompt": "\0"}, "prompt 1 has no token"),
        ({"prompts_file": "b"}, "give either prompt=TEXT or prompts_file=FILE"),
        ({"prompt": None, "prompts_file": "nowhere"}, "there is no prompts_file nowhere"),
        ({"temperature": "hot"}, "temperature is 'hot': it must be a number"),
        ({"top_k": 0}, "top_k is 0: it must be"),
        ({"top_p": 1.1}, "top_p is 1.1: it must be"),
        ({"stop": ["a", ""]}, "stop is empty"),
        ({"max_tokens": 0}, "max_tokens=0 writes nothing"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"device": "meta"}, "device=meta cannot be used here"),
        ({"checkpoint": "best"}, "has no best checkpoint"),
        ({"prompt": ["a", "b"], "state": "s"}, "give one prompt, not 2"),
        ({"state": "nowhere"}, "there is no saved state nowhere"),
        ({"save_state": "nowhere/state"}, "there is no folder nowhere"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_any_text(
    tmp_path: Path, changes: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = random_run(tmp_path, FAMILIES[0])
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        generate(settings(run, prompt="a") | changes)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("family", GROWING)
def test_past_the_end_of_a_context_is_refused_before_any_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    run, file = random_run(tmp_path, family), str(tmp_path / "state")
    generate(settings(run, prompt="a" * 45, max_tokens=20, save_state=file))
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"46 tokens and 20 new ones make 65 .* ends at 64"):
        generate(settings(run, prompt=["a", "a" * 46]))
    with pytest.raises(ValueError, match="65 tokens and 2 new ones make 66"):
        generate(settings(run, state=file, max_tokens=2))
    assert capsys.readouterr().out == ""


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    run = random_run(tmp_path, FAMILIES[0], vocab_size=200)
    with pytest.raises(ValueError, match="makes 256 ids but the model knows 200"):
        generate(settings(run, prompt="a"))
    write_text(run.tokenizer_file, IdsTokenizer(200).to_json())
    with pytest.raises(ValueError, match="this data came as ids"):
        generate(settings(run, prompt="a"))
    run.tokenizer_file.unlink()
    with pytest.raises(FileNotFoundError, match="text cannot be turned into tokens"):
        generate(settings(run, prompt="a"))


@torch.no_grad()
def saved(run: RunDir, file: Path) -> Past:
    model = load_model(run, "last")
    ids = [5, 6, 7, 8]
    _, state = prefill(model, torch.tensor([ids]), model.init_state(1))
    save_state(file, Past(state, [ids]), [9], model)
    return Past(state, [ids])


def test_a_state_file_gives_back_what_was_saved(run: RunDir, tmp_path: Path) -> None:
    file = tmp_path / "state"
    past = saved(run, file)
    loaded, unread = load_state(file, load_model(run, "last"))
    assert (loaded.ids, unread) == (past.ids, [9])
    assert set(loaded.state) == set(past.state)
    assert all(torch.equal(loaded.state[name], value) for name, value in past.state.items())
    assert [path.name for path in tmp_path.glob("*") if path.is_file()] == ["state"]


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    first, second = FAMILIES[:2]
    file = tmp_path / "state"
    saved(random_run(tmp_path, first), file)
    with pytest.raises(ValueError, match=f"its family is {first}, this model's {second}"):
        load_state(file, load_model(random_run(tmp_path, second), "last"))
    with pytest.raises(ValueError, match="state of another model: its weights is"):
        load_state(file, load_model(random_run(tmp_path, first, seed=1), "last"))
    other = random_run(tmp_path, first, seed=2, n_embd=16)
    with pytest.raises(ValueError, match="its n_embd is 32, this model's 16"):
        generate(settings(other, state=str(file)))


def test_a_damaged_state_is_refused(run: RunDir, tmp_path: Path) -> None:
    file, model = tmp_path / "state", load_model(run, "last")
    saved(run, file)
    whole = file.read_bytes()
    for content in (whole[:-5], whole[:20], b"", b"no state at all"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged or no saved state") as caught:
            load_state(file, model)
        assert "\n" not in str(caught.value)


def test_texts_and_paths_are_taken_as_typed() -> None:
    arguments = [
        "run=runs/a,b=1", "prompt=f(a, b='${x}')\n", "prompt=[1, 2]", "stop=\n", "stop=User:",
        "top_k=5", "state='quoted'", "save_state=null",
    ]  # fmt: skip
    typed, others = as_typed(arguments, AS_TYPED, MANY)
    assert typed == {
        "run": "runs/a,b=1",
        "prompt": ["f(a, b='${x}')\n", "[1, 2]"],
        "stop": ["\n", "User:"],
    }
    assert others[:3] == ["top_k=5", "state='quoted'", "save_state=null"]


@pytest.mark.slow
def test_the_command_writes_text_and_refuses_in_one_line(tmp_path: Path) -> None:
    run = random_run(tmp_path, FAMILIES[0])

    def command(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "experiments.generate", f"run={run.path}", *arguments],
            cwd=CONF_DIR.parent,
            capture_output=True,
            encoding="utf-8",
        )

    done = command("prompt=f(a, b='${x}')\n", "max_tokens=8", "n_threads=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == text_of(ids_of(run, "f(a, b='${x}')\n", 8)) + "\n"
    assert done.stderr.startswith("8 new tokens; prefill 15 in ")
    failed = command("prompt=")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: prompt 1 is empty")
    assert failed.stderr.count("\n") == 1
