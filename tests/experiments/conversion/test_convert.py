"""Checkpoints in and out: the same logits, the same text, the same bits; bad ones refused."""

import gc
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, RwkvConfig, RwkvForCausalLM

from experiments.config.entry import CONF_DIR
from experiments.conversion.external import hugging_face_logits, plain_rwkv, rwkv_logits
from experiments.convert import convert
from experiments.data.tokenizer import BytesTokenizer, Tokenizer, read_tokenizer, train_bpe
from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.runs.run_dir import RunDir, find_runs
from experiments.runs.trained_model import load_model
from experiments.system.files import write_text
from models.families import formats
from models.generation import generate
from models.gpt.model import GPT
from models.language_model import LanguageModel
from models.rwkv4.model import RWKV4

ROOT = CONF_DIR.parent
PTH = formats()["rwkv_pth"][1]
HF = {"rwkv4": formats()["hf_rwkv"][1], "gpt": formats()["hf_gpt_neox"][1]}
FAMILIES = pytest.mark.parametrize("family", ["rwkv4", "gpt"])
FORMATS = pytest.mark.parametrize("form", ["pth", "safetensors", "hf_rwkv", "hf_gpt"])


def run_convert(source: Path, target: Path, **settings: Any) -> None:
    """The command in this process, with these keys and the others as conf/convert.yaml has them."""
    config = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "convert.yaml"))
    assert isinstance(config, dict)
    defaults = {str(k): v for k, v in config.items() if k not in ("defaults", "hydra")}
    convert(defaults | {"source": source, "target": target} | settings)


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rwkv` collects garbage while it loads, which takes longer than all else it does here."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def randomised(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """Every tensor random, those too that start at zero or one, and activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if name.endswith("weight") and parameter.dim() == 1:
                parameter.add_(1)
    return model.eval()


def make_model(family: str, seed: int = 0, ctx_len: int = 64, vocab: int = 90) -> LanguageModel:
    rng = random.Random(seed)
    L = rng.randint(2, 3)
    if family == "rwkv4":
        C = rng.choice([8, 24, 33])
        model: LanguageModel = RWKV4(vocab, L, C, ctx_len, n_ffn=rng.choice([4 * C, 2 * C + 1]))
    else:
        H, K = rng.randint(1, 3), rng.choice([8, 16, 24])
        model = GPT(vocab, L, H * K, H, ctx_len, n_ffn=3 * H * K, rotary_pct=rng.choice([0.25, 1]))
    return randomised(model, seed)


def make_run(path: Path, model: LanguageModel, tokenizer: Tokenizer | None = None) -> RunDir:
    """A run directory that holds the model's weights as they are."""
    net = {"_target_": f"{type(model).__module__}.{type(model).__name__}"}
    net |= {key: getattr(model, key) for key in ("vocab_size", "n_layer", "n_embd", "n_ffn")}
    if isinstance(model, GPT):
        net |= {"n_head": model.n_head, "rotary_pct": model.n_rotary * model.n_head / model.n_embd}
    config = {"ctx_len": model.ctx_len, "model": {"net": net | {"ctx_len": model.ctx_len}}}
    write_text(path / "config.yaml", json.dumps(config))
    (path / "checkpoints").mkdir()
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights}, path / "checkpoints" / "last.ckpt")
    if tokenizer is not None:
        write_text(path / "tokenizer.json", tokenizer.to_json())
    return RunDir(path)


def weights_of(run: Path) -> dict[str, Tensor]:
    state = read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    return {name.removeprefix("model."): value for name, value in state.items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


@torch.no_grad()
def logits(model: LanguageModel, ids: Tensor) -> Tensor:
    return model(ids[None])[0][0]


@pytest.mark.parametrize("seed", range(3))
@FAMILIES
def test_exported_logits_are_those_of_the_other_library(family, seed, tmp_path, capsys) -> None:
    model = make_model(family, seed)
    run = make_run(tmp_path / "runs/s/m/x", model)
    ids = torch.randint(90, (64,))
    ours = logits(model, ids)
    run_convert(run.path, tmp_path / "hf")
    assert (hugging_face_logits(tmp_path / "hf", ids, HF[family]) - ours).abs().max() < 1e-4
    if family == "rwkv4":
        for name in ("out.pth", "out.safetensors"):
            run_convert(run.path, tmp_path / name)
            assert (rwkv_logits(tmp_path / name, tmp_path, ids, PTH) - ours).abs().max() < 1e-4
    printed = capsys.readouterr().out
    assert "largest difference of logits" in printed


@FAMILIES
def test_greedy_text_is_the_same(family, tmp_path) -> None:
    model = make_model(family, seed=5 if family == "rwkv4" else 19, ctx_len=96)
    run = make_run(tmp_path / "run", model)
    run_convert(run.path, tmp_path / "hf", check=False)
    prompt = [3, 1, 4, 1, 5]
    (ours,) = generate(model, [prompt], 64)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = twin.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :]
    assert theirs.tolist() == ours
    assert len(set(ours)) >= 10  # not one token for ever
    if family == "gpt":
        return
    run_convert(run.path, tmp_path / "out.pth", check=False)
    with plain_rwkv():
        from rwkv.model import RWKV

        package = RWKV(model=str(tmp_path / "out.pth"), strategy="cpu fp32", verbose=False)
        out, state = package.forward(prompt, None)
        written = [int(out.argmax())]
        while len(written) < 64:
            out, state = package.forward([written[-1]], state)
            written.append(int(out.argmax()))
    assert written == ours


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@FORMATS
def test_round_trips_keep_every_bit(form, dtype, tmp_path) -> None:
    model = make_model("gpt" if form == "hf_gpt" else "rwkv4", seed=3)
    model = model.to(getattr(torch, dtype))
    run = make_run(tmp_path / "runs/s/m/x", model)
    external = tmp_path / (form if form.startswith("hf") else f"out.{form}")
    run_convert(run.path, external)
    assert_same_bits(weights_of(run.path), dict(model.state_dict()))
    back, again = tmp_path / "runs/s/m/back", external.with_stem(f"again_{external.stem}")
    run_convert(external, back)
    assert_same_bits(weights_of(back), weights_of(run.path))
    run_convert(back, again)
    if external.is_dir():
        files = ("model.safetensors", "config.json")
        assert json.loads((external / "config.json").read_text())["torch_dtype"] == dtype
        for name in files:
            assert (external / name).read_bytes() == (again / name).read_bytes()
    elif form == "safetensors":
        assert external.read_bytes() == again.read_bytes()
    else:
        assert_same_bits(read_checkpoint(external), read_checkpoint(again))
    assert read_checkpoint(back / "checkpoints/last.ckpt").keys() == {"state_dict"}


@FAMILIES
def test_a_converted_run_is_a_run(family, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model(family, seed=4)
    make_run(Path("made"), model, BytesTokenizer())
    run_convert(Path("made"), Path("hf"))
    target = Path("runs/pile/released_model/v1")
    run_convert(Path("hf"), target)
    (run,) = find_runs("runs/pile/*/*")
    loaded = load_model(run, "last")
    assert run.finished
    assert run.result == {"converted": True}
    assert run.config.ctx_len == loaded.ctx_len == 64
    assert (run.config.suite, run.config.model.name) == ("pile", "released_model")
    assert_same_bits(dict(loaded.state_dict()), dict(model.state_dict()))
    manifest = run.manifest
    assert manifest["name"] == "pile/released_model/v1"
    assert manifest["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert manifest["flops_per_token"] == model.flops_per_token(64)
    assert manifest["converted"]["file"] == "hf"
    (digest,) = manifest["converted"]["sha256"].values()
    assert len(digest) == 64
    (new,) = generate(load_model(run, "last", dtype="bfloat16"), [[1, 2]], 4)
    assert len(new) == 4


def test_a_file_says_nothing_of_context_tokenizer_or_tokens(tmp_path, capsys) -> None:
    model = make_model("rwkv4", vocab=256)
    file = tmp_path / "released.pth"
    torch.save(dict(model.state_dict()), file)
    run_convert(file, tmp_path / "a/b/plain")
    assert RunDir(tmp_path / "a/b/plain").config.model.net.ctx_len == 1024
    assert "no tokenizer was found" in capsys.readouterr().out
    described = tmp_path / "tokenizer.json"
    described.write_text(BytesTokenizer().to_json())
    more = {"ctx_len": 77, "training_tokens": 332_000_000_000, "tokenizer_file": str(described)}
    run_convert(file, tmp_path / "a/b/given", **more)
    run = RunDir(tmp_path / "a/b/given")
    assert run.config.ctx_len == run.manifest["ctx_len"] == 77
    assert run.manifest["converted"]["training_tokens"] == 332_000_000_000
    assert Tokenizer.from_json((run.path / "tokenizer.json").read_text()).kind == "bytes"


@FAMILIES
def test_tokenizers_go_out_for_lm_evals_own_backend_and_come_back(
    family, neox_tokenizer_json, tmp_path
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from experiments.evaluation.adapter import LanguageModelLM

    file, vocab_size = neox_tokenizer_json, 50304  # with Pythia's padding
    if family == "rwkv4":
        file, vocab_size = tmp_path / "bpe.json", 300
        bpe = train_bpe(iter(["the cat sat on the mat, and the hat"] * 50), 265, 10_000)
        file.write_text(json.dumps(bpe.description()["tokenizer"]))
    tokenizer = read_tokenizer(str(file), vocab_size=vocab_size)
    sizes = {"vocab_size": vocab_size, "n_layer": 2, "n_embd": 8, "ctx_len": 32}
    model = randomised(RWKV4(**sizes) if family == "rwkv4" else GPT(**sizes, n_head=1))
    run_convert(make_run(tmp_path / "run", model, tokenizer).path, tmp_path / "hf", check=False)
    backend = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", batch_size=1, dtype="float32")
    exported = backend.tokenizer
    text = "The quick  brown fox\n\tjumps: 日本語 ✓ grüße, 1234!"
    assert exported(text)["input_ids"] == tokenizer.encode(text)
    assert exported.decode(tokenizer.encode(text)) == text
    assert exported.eos_token_id == exported.bos_token_id == tokenizer.eot_id == 0
    assert exported.model_max_length == 32
    pairs = [("The cat", " sat on a mat"), ("The cat", " ran"), ("", "Hello there")]
    asked = [Instance("loglikelihood", doc={}, arguments=p, idx=i) for i, p in enumerate(pairs)]
    want = backend.loglikelihood(asked, disable_tqdm=True)
    got = LanguageModelLM(model, tokenizer).loglikelihood(asked)
    assert [g for g, _ in got] == pytest.approx([w for w, _ in want], abs=1e-4)
    run_convert(tmp_path / "hf", tmp_path / "a/b/back", check=False)
    again = Tokenizer.from_json((tmp_path / "a/b/back/tokenizer.json").read_text())
    assert again.hash == tokenizer.hash
    assert again.vocab_size == vocab_size


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A folder in Hugging Face's format, of an RWKV."""
    run = make_run(tmp_path / "made", make_model("rwkv4", seed=5))
    run_convert(run.path, tmp_path / "hf", check=False)
    shutil.rmtree(run.path)
    return tmp_path / "hf"


def test_shards_and_older_files_are_read(hf, tmp_path) -> None:
    tensors = load_file(hf / "model.safetensors")
    run_convert(hf, tmp_path / "a/b/whole")
    (hf / "model.safetensors").unlink()
    torch.save(tensors, hf / "pytorch_model.bin")
    run_convert(hf, tmp_path / "a/b/bin")
    (hf / "pytorch_model.bin").unlink()
    parts = {f"model-{i}-of-3.safetensors": dict(list(tensors.items())[i::3]) for i in range(3)}
    for name, part in parts.items():
        save_file(part, hf / name)
    where = {tensor: name for name, part in parts.items() for tensor in part}
    index = hf / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    run_convert(hf, tmp_path / "a/b/shards")
    for name in ("bin", "shards"):
        assert_same_bits(weights_of(tmp_path / "a/b/whole"), weights_of(tmp_path / "a/b" / name))
    made = [RunDir(path).manifest["converted"] for path in (tmp_path / "a/b").iterdir()]
    assert len({str(converted["sha256"]) for converted in made}) == 3
    for map_, message in (
        ({"x": "../hf/model-0-of-3.safetensors"}, "which is no file beside it"),
        ({"x": "model-9.safetensors"}, "is missing, which"),
        ({}, "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": map_}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run_convert(hf, tmp_path / "a/b/bad")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_asked_for(dtype, tmp_path) -> None:
    model = make_model("rwkv4", seed=8)
    run = make_run(tmp_path / "run", model)
    run_convert(run.path, tmp_path / "out.pth", dtype=dtype)
    rounded = {k: v.to(getattr(torch, dtype)) for k, v in model.state_dict().items()}
    assert_same_bits(read_checkpoint(tmp_path / "out.pth"), rounded)
    run_convert(run.path, tmp_path / "whole.pth")
    run_convert(tmp_path / "whole.pth", tmp_path / "a/b/c", dtype=dtype)
    assert_same_bits(weights_of(tmp_path / "a/b/c"), rounded)


def test_a_folder_saved_in_inference_mode_is_refused_until_told(tmp_path) -> None:
    config = RwkvConfig(vocab_size=20, hidden_size=16, num_hidden_layers=13, context_length=64)
    twin = RwkvForCausalLM(config)
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    twin.save_pretrained(tmp_path / "fresh")
    twin.eval()(torch.tensor([[1, 2, 3]]))
    twin.save_pretrained(tmp_path / "divided")
    run_convert(tmp_path / "fresh", tmp_path / "a/b/fresh", check=False)
    with pytest.raises(ValueError, match="say rescaled=true to multiply them back, or"):
        run_convert(tmp_path / "divided", tmp_path / "a/b/divided")
    assert sorted(os.listdir(tmp_path / "a/b")) == ["fresh"]
    run_convert(tmp_path / "divided", tmp_path / "a/b/divided", rescaled=True)
    assert_same_bits(weights_of(tmp_path / "a/b/divided"), weights_of(tmp_path / "a/b/fresh"))
    run_convert(tmp_path / "divided", tmp_path / "a/b/as_is", rescaled=False, check=False)
    name = "blocks.12.ffn.value.weight"
    whole = before["rwkv.blocks.12.feed_forward.value.weight"]
    assert torch.equal(weights_of(tmp_path / "a/b/as_is")[name], whole / 4)


class Evil:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, ("evil_ran",)


def spoilt(state: dict[str, Tensor], how: str) -> dict[str, Any]:
    state = {name: value.clone() for name, value in state.items()}
    if how == "missing":
        del state["blocks.0.ln2.bias"]
    elif how == "nan":
        state["blocks.0.att.value.weight"][1, 2] = torch.nan
    elif how == "integers":
        state["head.weight"] = state["head.weight"].long()
    elif how == "sparse":
        state["head.weight"] = state["head.weight"].to_sparse()
    elif how == "nested":
        return {"model": state}
    return state


BAD_FILES = [
    ("missing", r"tensor blocks\.0\.ln2\.bias is missing"),
    ("nan", r"tensor blocks\.0\.att\.value\.weight holds NaN"),
    ("integers", r"torch\.int64 cannot be used"),
    ("sparse", r"holds head\.weight sparse or without values"),
    ("nested", "is not a plain dictionary of tensors"),
    ("code", r"wants to run code \((posix|nt)\.mkdir\)"),
    ("truncated", "is damaged"),
    ("empty", "is damaged"),
]
PICKLES_ALONE = ("sparse", "nested", "code")  # safetensors files cannot hold these


@pytest.mark.parametrize(
    ("how", "message", "suffix"),
    [
        (how, message, suffix)
        for how, message in BAD_FILES
        for suffix in (".pth", ".safetensors")
        if suffix == ".pth" or how not in PICKLES_ALONE
    ],
)
def test_a_bad_file_is_one_line_and_leaves_nothing(
    how, message, suffix, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = RWKV4(20, 1, 8, 8).state_dict()
    file = tmp_path / f"bad{suffix}"
    bad: Any = {"emb.weight": Evil()} if how == "code" else spoilt(state, how)
    if suffix == ".safetensors":
        message = message.replace("is damaged", "is not a readable safetensors file")
        save_file(bad, file)
    else:
        torch.save(bad, file)
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif how == "empty":
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=message) as error:
        run_convert(file, tmp_path / "runs/a/b")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == [file.name]


def test_what_cannot_be_converted_is_said(hf, tmp_path) -> None:
    gpt = make_run(tmp_path / "gpt", make_model("gpt"))
    single = make_run(tmp_path / "single", RWKV4(90, 1, 8, 8))
    wrong = tmp_path / "wrong.json"
    wrong.write_text(BytesTokenizer().to_json())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    new = tmp_path / "a/b/c"
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (hf, tmp_path / "x.pth", {}, "convert it to a run directory first"),
        (gpt.path, tmp_path / "x.pth", {}, "has no \\.(pth|safetensors) files"),
        (gpt.path, tmp_path / "new", {"ctx_len": 8}, "ctx_len= is for external checkpoints"),
        (gpt.path, tmp_path / "new", {"checkpoint": "best"}, "has no best checkpoint"),
        (hf, Path("/no_such_run"), {}, "must end in SUITE/MODEL/LABEL"),
        (hf, other, {}, "target=.* exists"),
        (tmp_path / "nowhere", new, {}, "there is no source="),
        (single.path, tmp_path / "new", {}, "has two layers or more"),
        (wrong, new, {}, r"is no \.pth file"),
        (other, new, {}, "model_type='llama': gpt_neox and rwkv can be read"),
        (hf, new, {"tokenizer_file": str(wrong)}, "has 256 ids, the model 90"),
        (hf, new, {"tokenizer_file": str(tmp_path / "none.json")}, "there is no tokenizer_file="),
        (hf, new, {"checkpoint": "best"}, "checkpoint= is for runs"),
        (hf, new, {"dtype": "int8"}, "dtype is 'int8': it must be one of null"),
        (hf, new, {"rescaled": True}, "rescaled= is for .* leave it out"),
    ]
    for source, target, settings, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run_convert(source, target, **settings)
    assert not (tmp_path / "a").exists()
    assert not list(tmp_path.glob(".*"))


def test_other_logits_stop_the_conversion(hf, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "experiments.conversion.external.our_logits", lambda m, w, ids: torch.ones(128, 90)
    )
    with pytest.raises(ValueError, match=r"computes other logits.*check=false"):
        run_convert(hf, tmp_path / "a/b/c")
    assert os.listdir(tmp_path / "a/b") == []


@pytest.mark.parametrize("package", ["transformers", "rwkv"])
def test_without_the_other_library_it_is_said(package, hf, tmp_path, monkeypatch, capsys) -> None:
    import importlib.metadata

    version = importlib.metadata.version

    def absent(name: str) -> str:
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    run_convert(hf, tmp_path / "a/b/c")
    monkeypatch.setattr(importlib.metadata, "version", absent)
    target = tmp_path / ("out.pth" if package == "rwkv" else "out")
    run_convert(tmp_path / "a/b/c", target)
    assert f"not checked against {package}, which is not installed" in capsys.readouterr().out
    assert target.exists()


def test_the_environment_is_left_as_it_was(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RWKV_JIT_ON", "1")
    monkeypatch.setenv("RWKV_V7_ON", "1")
    monkeypatch.delenv("RWKV_CUDA_ON", raising=False)
    before = dict(os.environ)
    run = make_run(tmp_path / "run", make_model("rwkv4"))
    run_convert(run.path, tmp_path / "out.pth")
    assert dict(os.environ) == before
    assert "rwkv.model" in sys.modules


@pytest.mark.slow
def test_the_command_line(tmp_path) -> None:
    run = make_run(tmp_path / "run", make_model("rwkv4", vocab=256), BytesTokenizer())
    target, back = tmp_path / "it's (new) {1}.pth", tmp_path / "a/b/lr=1,seed=0"
    quoted = str(target).replace("'", "\\'")
    out = [f"source={run.path}", f"target={target}"]
    tokenizer = f"tokenizer_file={run.path / 'tokenizer.json'}"
    into = [f"source='{quoted}'", f"target={back}", tokenizer, "ctx_len=9", "dtype=bfloat16"]
    for arguments, code in ((out, 0), (out, 2), (into, 0)):
        command = [sys.executable, "-m", "experiments.convert", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        if code == 2:
            assert (
                done.stderr == f"error: target={target} exists: choose another name, or remove it\n"
            )
    assert_same_bits(read_checkpoint(target), weights_of(run.path))
    assert load_model(RunDir(back), "last").ctx_len == 9
    assert (back / "tokenizer.json").is_file()
