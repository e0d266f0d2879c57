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
from hydra.utils import get_method
from omegaconf import OmegaConf

from experiments import generate as entry_module
from experiments.config.entry import CONF_DIR, as_typed
from experiments.config.identity import plain
from experiments.data.tokenizer import BytesTokenizer, IdsTokenizer
from experiments.generate import AS_TYPED, MANY, generate
from experiments.generation.state_file import load_state, save_state
from experiments.runs.run_dir import RunDir
from experiments.runs.trained_model import load_model
from experiments.system.files import write_json, write_text
from models.generation import Past, prefill
from models.generation import generate as generate_ids

RWKV_NET = {
    "_target_": "models.rwkv4.model.RWKV4",
    "vocab_size": 256,
    "n_layer": 2,
    "n_embd": 32,
    "ctx_len": 64,
}
GPT_NET = RWKV_NET | {"_target_": "models.gpt.model.GPT", "n_head": 2}


def make_run(root: Path, net: dict[str, Any], seed: int = 0) -> RunDir:
    """A finished run of random weights that write something lively."""
    torch.manual_seed(seed)
    path = root / "suite" / net["_target_"].rpartition(".")[2] / f"seed={seed},of=two"
    (path / "checkpoints").mkdir(parents=True)
    config = {"ctx_len": net["ctx_len"], "model": {"name": "model", "net": net}}
    OmegaConf.save(OmegaConf.create(config), path / "config.yaml")
    model = get_method(net["_target_"])(**{k: v for k, v in net.items() if k != "_target_"})
    weights = {
        f"model.{name}": torch.randn(value.shape) * (0.3 if value.dim() == 2 else 1)
        for name, value in model.state_dict().items()
    }
    torch.save({"state_dict": weights}, path / "checkpoints" / "last.ckpt")
    write_text(path / "tokenizer.json", BytesTokenizer().to_json())
    write_json(path / "result.json", {})
    return RunDir(path)


@pytest.fixture(params=[RWKV_NET, GPT_NET], ids=["rwkv4", "gpt"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    return make_run(tmp_path, request.param)


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


def test_text_is_streamed_as_it_comes(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(entry_module, "show", shown.append)
    how = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}
    generate(settings(run, prompt="def f(", seed=3, **how))
    new = ids_of(run, "def f(", 20, seed=3, **how)
    assert "".join(shown) == BytesTokenizer().decode(new) + "\n"
    assert len([text for text in shown if text]) > 5  # not in one go
    cost = rf"{len(new)} new tokens; prefill 6 in .* tokens/s\); decode 19 in .* tokens/s\)\n"
    assert re.fullmatch(cost, capsys.readouterr().err)


def test_prompts_together_give_what_each_gives_alone(
    run: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = ["def f(", "x", "import os"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    for batch_size in (2, 16):
        asked = {"prompts_file": str(tmp_path / "prompts.txt"), "batch_size": batch_size}
        generate(settings(run, temperature=0.9, seed=5, **asked))
        expected = "".join(
            f"--- {i + 1}: {prompt}\n"
            f"{BytesTokenizer().decode(ids_of(run, prompt, 20, seed=5 + i, temperature=0.9))}\n"
            for i, prompt in enumerate(prompts)
        )
        assert capsys.readouterr().out == expected


def test_a_saved_state_goes_on_without_its_text(
    run: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = str(tmp_path / "state")
    generate(settings(run, prompt="def f(", max_tokens=30))
    whole, _ = capsys.readouterr()
    generate(settings(run, prompt="def f(", max_tokens=10, save_state=file))
    generate(settings(run, state=file, max_tokens=0, save_state=file))
    capsys.readouterr()
    model = load_model(run, "last")
    past, unread = load_state(Path(file), model)
    new = ids_of(run, "def f(", 30)
    text = [*BytesTokenizer().encode("def f("), *new]
    assert (past.ids, unread) == ([text[:16]], [])
    # with a prompt, for all was read; what was drawn at first is asked for again
    with pytest.raises(ValueError, match="nothing is left of the saved text"):
        generate(settings(run, state=file))
    generate(settings(run, prompt="def f(", max_tokens=10, save_state=file))
    first, _ = capsys.readouterr()
    generate(settings(run, state=file, max_tokens=20))
    second, cost = capsys.readouterr()
    assert first[:-1] + second == whole
    assert "prefill 1 in" in cost
    generate(settings(run, state=file, prompt="xy", max_tokens=5))
    expected = generate_ids(model, [[*text[:16], *b"xy"]], 5, eot_id=0)[0]
    assert capsys.readouterr().out == BytesTokenizer().decode(expected) + "\n"


def test_a_state_keeps_the_penalty_of_what_it_read(
    run: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    how = {"repetition_penalty": 1.5, "save_state": str(tmp_path / "state")}
    generate(settings(run, prompt="def f(", max_tokens=16, **how))
    generate(settings(run, state=how["save_state"], max_tokens=8, **how))
    out = capsys.readouterr().out
    new = ids_of(run, "def f(", 24, repetition_penalty=1.5)
    decode = BytesTokenizer().decode
    assert out == f"{decode(new[:16])}\n{decode(new[16:])}\n"


def test_standard_input_and_a_stop_string(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a text\n"))
    text = BytesTokenizer().decode(ids_of(run, "a text\n", 20, temperature=0.9))
    stop = text[8:10]
    generate(settings(run, prompt="-", temperature=0.9, stop=["never", stop]))
    assert capsys.readouterr().out == text.partition(stop)[0] + "\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": None}, "say which run"),
        ({"run": "nowhere"}, "nowhere is not a run directory"),
        ({"prompt": None}, "nothing to go on from: give prompt=TEXT"),
        ({"prompt": ""}, "prompt 1 is empty"),
        ({"prompt": ["a", ""]}, "prompt 2 is empty"),
        ({"prompt": "\0"}, "prompt 1 has no token"),
        ({"prompts_file": "b"}, "give either prompt=TEXT or prompts_file=FILE"),
        ({"prompt": None, "prompts_file": "nowhere"}, "there is no prompts_file nowhere"),
        ({"temperature": -1}, "temperature must be a number from 0 on, got -1"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": [1]}, r"temperature must be a number, got \[1\]"),
        ({"top_k": 0}, "top_k must be a whole number"),
        ({"top_k": [5]}, r"top_k must be a number, got \[5\]"),
        ({"stop": ["a", ""]}, "stop is empty"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"max_tokens": -1}, "max_tokens must be a whole number of at least 0, got -1"),
        ({"max_tokens": 0}, "max_tokens=0 writes nothing"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"chunk_len": 0}, "chunk_len must be"),
        ({"seed": -1}, "seed must be"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"device": "abacus"}, "device=abacus cannot be used here"),
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
    run = make_run(tmp_path, RWKV_NET)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        generate(settings(run, prompt="a") | changes)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_file_that_is_no_text_and_a_run_without_text_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, RWKV_NET)
    (tmp_path / "prompts").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        generate(settings(run, prompts_file=str(tmp_path / "prompts")))
    write_text(run.path / "tokenizer.json", IdsTokenizer(256).to_json())
    with pytest.raises(ValueError, match="this data came as ids"):
        generate(settings(run, prompt="a"))


def test_past_a_gpts_context_is_refused_before_any_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = make_run(tmp_path, GPT_NET), str(tmp_path / "state")
    generate(settings(run, prompt="a" * 45, max_tokens=20, save_state=file))
    capsys.readouterr()
    message = "46 tokens and 20 new ones make 65 positions; this gpt model ends at 64"
    with pytest.raises(ValueError, match=message):
        generate(settings(run, prompt=["a", "a" * 46]))
    with pytest.raises(ValueError, match="65 tokens and 2 new ones make 66"):
        generate(settings(run, state=file, max_tokens=2))
    assert capsys.readouterr().out == ""


def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, RWKV_NET | {"vocab_size": 200})
    with pytest.raises(ValueError, match="makes 256 ids but the model knows 200"):
        generate(settings(run, prompt="a"))
    (run.path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="text cannot be turned into tokens"):
        generate(settings(run, prompt="a"))


@torch.no_grad()
def saved(run: RunDir, file: Path) -> Past:
    model = load_model(run, "last")
    ids = [5, 6, 7, 8]
    _, state = prefill(model, torch.tensor([ids]), model.init_state(1))
    past = Past(state, [ids])
    save_state(file, past, [9], model)
    return past


def test_a_state_file_gives_back_what_was_saved(run: RunDir, tmp_path: Path) -> None:
    file = tmp_path / "state"
    past = saved(run, file)
    loaded, unread = load_state(file, load_model(run, "last"))
    assert (loaded.ids, unread) == (past.ids, [9])
    assert set(loaded.state) == set(past.state)
    assert all(torch.equal(loaded.state[name], value) for name, value in past.state.items())
    assert [path.name for path in tmp_path.glob("*") if path.is_file()] == ["state"]


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state"
    saved(make_run(tmp_path, RWKV_NET), file)
    with pytest.raises(ValueError, match="its family is rwkv4, this model's gpt"):
        load_state(file, load_model(make_run(tmp_path, GPT_NET), "last"))
    other = make_run(tmp_path, RWKV_NET, seed=1)
    with pytest.raises(ValueError, match="state of another model: its weights is"):
        load_state(file, load_model(other, "last"))
    wide = make_run(tmp_path, RWKV_NET | {"n_embd": 16}, seed=2)
    with pytest.raises(ValueError, match="its n_embd is 32, this model's 16"):
        generate(settings(wide, state=str(file)))


def test_a_damaged_state_is_refused_and_nothing_overwritten(run: RunDir, tmp_path: Path) -> None:
    file, model = tmp_path / "state", load_model(run, "last")
    past = saved(run, file)
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-20] ^= 1
    read = whole.replace(b'"n_read":"4"', b'"n_read":"3"')
    assert read != whole
    for content in (whole[:-5], whole[:20], b"", b"no state at all", bytes(flipped), read):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged|no saved state") as caught:
            load_state(file, model)
        assert "\n" not in str(caught.value)
    file.write_bytes(b"my thesis")
    with pytest.raises(ValueError, match="exists and is not a saved state"):
        save_state(file, past, [], model)
    assert file.read_bytes() == b"my thesis"
    with pytest.raises(ValueError, match="exists and is not a saved state"):
        generate(settings(run, prompt="a", save_state=str(file)))


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
    assert as_typed(["stop=[a,b]"], AS_TYPED, MANY) == ({}, ["stop=[a,b]"])


@pytest.mark.slow
def test_the_command_writes_text_and_refuses_in_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path, RWKV_NET)

    def command(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "experiments.generate", f"run={run.path}", *arguments],
            cwd=CONF_DIR.parent,
            capture_output=True,
            encoding="utf-8",
        )

    done = command("prompt=f(a, b='${x}')\n", "max_tokens=8", "n_threads=1")
    assert done.returncode == 0, done.stderr
    expected = ids_of(run, "f(a, b='${x}')\n", 8)
    assert done.stdout == BytesTokenizer().decode(expected) + "\n"
    assert done.stderr.startswith("8 new tokens; prefill 15 in ")
    failed = command("prompt=")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: prompt 1 is empty")
    assert failed.stderr.count("\n") == 1
