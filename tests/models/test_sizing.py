"""Counted parameters and FLOPs against published and hand-computed numbers; sizes are met."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.config.targets import resolve
from models.families import families
from models.gpt.model import GPT
from models.language_model import LanguageModel, count_parameters
from models.rwkv4.model import RWKV4
from models.sizing import MEASURES, build_empty, solve

from ..presets import MODELS, SIZES, empty, frozen, net

RWKV_TOTAL = {  # paper.md 1.7: counted on the official state dicts
    "169m": 169_342_464,
    "430m": 430_397_440,
    "1b5": 1_515_106_304,
    "3b": 2_984_627_200,
    "7b": 7_392_649_216,
    "14b": 14_148_597_760,
}
PYTHIA = {  # paper.md 5.1: non-embedding, total
    "14m": (1_189_888, 14_067_712),
    "31m": (4_739_072, 30_494_720),
    "70m": (18_915_328, 70_426_624),
    "160m": (85_056_000, 162_322_944),
    "410m": (302_311_424, 405_334_016),
    "1b": (805_736_448, 1_011_781_632),
    "1b4": (1_208_602_624, 1_414_647_808),
    "2b8": (2_517_652_480, 2_775_208_960),
    "6b9": (6_444_163_072, 6_857_302_016),
    "12b": (11_327_027_200, 11_846_072_320),
}


@pytest.mark.parametrize("size", RWKV_TOTAL)
def test_the_papers_sizes_are_exact(size: str) -> None:
    rwkv = count_parameters(empty("rwkv4", size, 50277, 1024))["total"]
    assert rwkv == RWKV_TOTAL[size]
    gpt = net("gpt", size, 50277, 1024)
    assert gpt["n_ffn"] == 4.5 * gpt["n_embd"]  # as many weights a layer as RWKV-4's 13 C^2
    counted = count_parameters(empty("gpt", size, 50277, 1024))["total"]
    assert counted == pytest.approx(rwkv, rel=5e-3)


@pytest.mark.parametrize("size", PYTHIA)
def test_pythia_has_its_published_size(size: str) -> None:
    counted = count_parameters(empty("gpt", f"pythia_{size}", 50277, 2048))
    assert (counted["non_embedding"], counted["total"]) == PYTHIA[size]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_has_every_size_and_runs(name: str, size: str) -> None:
    config = frozen(f"model={name}", f"size={size}", "data.vocab_size=256")["model"]
    target = resolve(config["net"]["_target_"], LanguageModel)
    model = build_empty(target, config["net"])
    assert target is families()[model.family].model
    match, found = config["match"], count_parameters(model)["non_embedding"]
    assert match["found"] == found
    assert found == pytest.approx(match["wanted"], rel=5e-3)
    assert match["deviation"] == pytest.approx(found / match["wanted"] - 1, abs=1e-6)
    del model.blocks[2:]  # the others are as these
    logits, state = model(torch.zeros(2, 3, dtype=torch.int64, device="meta"))
    assert (logits.shape, state) == ((2, 3, model.vocab_size), None)


@pytest.mark.parametrize("by", MEASURES)
def test_the_measure_is_a_choice(by: str) -> None:
    rwkv = empty("rwkv4", "tiny", 256, 256)
    gpt = empty("gpt", "tiny", 256, 256, f"match={by}")
    assert MEASURES[by](gpt) == pytest.approx(MEASURES[by](rwkv), rel=6e-3)


def test_a_size_that_is_not_met_is_refused_unless_asked_for() -> None:
    shape = ("model=gpt", "size=pico", "data.vocab_size=256")
    with pytest.raises(ValueError, match=r"comes no nearer to its size than \+0\.2%"):
        frozen(*shape, "match_tolerance=0.001")
    frozen(*shape, "match_tolerance=0.003")


def test_count_leaves_out_embedding_and_head() -> None:
    # One layer: 13 C^2 + 11 C, and 4 C for ln0 and ln_out.
    counted = count_parameters(RWKV4(vocab_size=7, n_layer=1, n_embd=4, ctx_len=8))
    assert counted == {"total": 13 * 16 + 15 * 4 + 2 * 7 * 4, "non_embedding": 13 * 16 + 15 * 4}


def test_flops_by_hand() -> None:
    rwkv = RWKV4(vocab_size=50277, n_layer=1, n_embd=64, ctx_len=16)
    assert rwkv.matmul_flops_per_token(16) == 2 * (50277 * 64 + 13 * 64 * 64)
    assert rwkv.flops_per_token(16) == 3 * (2 * (50277 * 64 + 13 * 64 * 64) + 38 * 64)
    assert rwkv.flops_per_token(16) == rwkv.flops_per_token(4096)
    gpt = GPT(vocab_size=100, n_layer=2, n_embd=64, n_head=2, ctx_len=15)
    scores = 2 * 2 * 64 * 8  # 8 keys on average; q k^T and the sum of values
    matmuls = 2 * 100 * 64 + 2 * (2 * 12 * 64 * 64 + scores)
    mixing = 2 * (5 * 2 * 8 + 2 * 3 * 2 * 8)  # softmax over 8 keys, rotary on 8 channels a head
    assert gpt.matmul_flops_per_token(15) == matmuls
    assert gpt.flops_per_token(15) == 3 * (matmuls + mixing)


@pytest.mark.parametrize(("size", "published"), [("169m", 2.613e8), ("3b", 5.710e9)])
def test_published_forward_flops(size: str, published: float) -> None:
    flops = empty("rwkv4", size, 50277, 1024).matmul_flops_per_token(1024)
    assert flops == pytest.approx(published, rel=3e-4)


@pytest.mark.parametrize("family", ["rwkv4", "gpt"])
def test_matmul_flops_equal_torchs_count(family: str) -> None:
    B, T = 2, 33
    model = empty(family, "micro", 256, T)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(torch.zeros(B, T, dtype=torch.int64))
    counted = counter.get_total_flops()
    if family == "gpt":  # torch counts the whole T x T square: T keys instead of (T + 1) / 2
        counted -= B * T * model.n_layer * 4 * model.n_embd * (T - (T + 1) // 2)
    assert counted == B * T * model.matmul_flops_per_token(T)


@pytest.mark.parametrize("by", MEASURES)
@pytest.mark.parametrize(
    ("source", "target", "heads"), [(RWKV4, GPT, {"n_head": 4}), (GPT, RWKV4, {})]
)
def test_the_nearest_width_is_found(
    source: type[LanguageModel], target: type[LanguageModel], heads: dict[str, Any], by: str
) -> None:
    shape = {"vocab_size": 300, "n_layer": 3, "n_embd": 64, "n_ffn": 250, "ctx_len": 32}
    reference = build_empty(source, shape | {"n_head": 4})
    match = solve(target, heads, reference, by)
    assert match.n_ffn % 8 == 0

    def gap(n_ffn: int) -> int:
        model = build_empty(target, shape | heads | {"n_ffn": n_ffn})
        return abs(MEASURES[by](model) - match.wanted)

    assert gap(match.n_ffn) == min(gap(match.n_ffn + step) for step in (-8, 0, 8))


@pytest.mark.parametrize(
    ("by", "settings", "message"),
    [
        ("weight", {"n_head": 2}, "choose non_embedding, total, flops"),
        ("total", {"n_head": 3}, "n_head must divide n_embd"),
        ("total", {"n_head": 2, "n_embd": 512}, "more than the .* to match: make it smaller"),
    ],
)
def test_impossible_matches_say_so_in_one_line(by: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        solve(GPT, settings, empty("rwkv4", "tiny", 256, 64), by)
    assert "\n" not in str(caught.value)
