"""Counted parameters and FLOPs against published and hand-computed numbers; matching solves."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from models.gpt.model import GPT
from models.language_model import LanguageModel, count_parameters
from models.rwkv4.model import RWKV4
from models.sizing import MEASURES, matched_gpt, matched_sizes

CONF = Path(__file__).parents[2] / "conf" / "model"
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
SMALL = ("nano", "micro", "tiny", "mini", "small", "base")


def build(name: str, vocab_size: int, ctx_len: int) -> LanguageModel:
    cfg = OmegaConf.load(CONF / f"{name}.yaml")
    cfg = OmegaConf.merge(cfg, {"data": {"vocab_size": vocab_size}, "ctx_len": ctx_len})
    with torch.device("meta"):
        return instantiate(cfg.net)


@pytest.mark.parametrize("size", RWKV_TOTAL)
def test_rwkv_and_its_gpt_have_the_size_in_the_name(size: str) -> None:
    rwkv = count_parameters(build(f"rwkv4_{size}", 50277, 1024))["total"]
    assert rwkv == RWKV_TOTAL[size]
    stated = float(size.replace("b", ".").rstrip("m.")) * (1e9 if "b" in size else 1e6)
    assert rwkv == pytest.approx(stated, rel=0.06)  # "7b" has 7.39e9, "14b" 14.1e9
    gpt = build(f"gpt_{size}", 50277, 1024)
    assert count_parameters(gpt)["total"] == pytest.approx(rwkv, rel=5e-3)


@pytest.mark.parametrize("size", PYTHIA)
def test_pythia_has_its_published_size(size: str) -> None:
    counted = count_parameters(build(f"pythia_{size}", 50277, 2048))
    assert (counted["non_embedding"], counted["total"]) == PYTHIA[size]


@pytest.mark.parametrize("size", SMALL)
@pytest.mark.parametrize("vocab_size", [256, 4096])
def test_cpu_sizes_are_matched(size: str, vocab_size: int) -> None:
    rwkv, gpt = (
        count_parameters(build(f"{family}_{size}", vocab_size, 256)) for family in ("rwkv4", "gpt")
    )
    for key, n in rwkv.items():
        assert gpt[key] == pytest.approx(n, rel=5e-3)


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
    flops = build(f"rwkv4_{size}", 50277, 1024).matmul_flops_per_token(1024)
    assert flops == pytest.approx(published, rel=3e-4)


@pytest.mark.parametrize("family", ["rwkv4", "gpt"])
def test_matmul_flops_equal_torchs_count(family: str) -> None:
    B, T = 2, 33
    model = build(f"{family}_micro", 256, T)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(torch.zeros(B, T, dtype=torch.int64))
    counted = counter.get_total_flops()
    if family == "gpt":  # torch counts the whole T x T square: T keys instead of (T + 1) / 2
        counted -= B * T * model.n_layer * 4 * model.n_embd * (T - (T + 1) // 2)
    assert counted == B * T * model.matmul_flops_per_token(T)


@pytest.mark.parametrize("by", MEASURES)
@pytest.mark.parametrize(("source", "target"), [(RWKV4, GPT), (GPT, RWKV4)])
def test_matching_both_ways(source: type, target: type, by: str) -> None:
    heads = {GPT: {"n_head": 4}, RWKV4: {}}
    with torch.device("meta"):
        first = source(vocab_size=300, n_layer=3, n_embd=64, n_ffn=250, ctx_len=32, **heads[source])
        sizes = matched_sizes(target, first, by, **heads[target])
        second = target(**sizes)
    measure = MEASURES[by]
    wider = {n: measure(target(**sizes | {"n_ffn": sizes["n_ffn"] + n})) for n in (-1, 1)}
    gap = abs(measure(second) - measure(first))
    assert gap <= min(abs(value - measure(first)) for value in wider.values())


def test_matching_another_shape() -> None:
    with torch.device("meta"):
        target = build("rwkv4_169m", 50277, 1024)
        sizes = matched_sizes(GPT, target, n_layer=10, n_embd=640, n_head=10)
        total = count_parameters(GPT(**sizes))["total"]
    assert total == pytest.approx(169_342_464, rel=1e-3)


@pytest.mark.parametrize(
    ("by", "sizes", "message"),
    [
        ("weight", {"n_head": 2}, "choose one of total, non_embedding, flops"),
        ("total", {"n_head": 3}, "n_head must divide n_embd"),
        ("total", {"n_head": 2, "n_embd": 512}, "more than the .* to match; make it smaller"),
        ("total", {"n_head": 2, "heads": 2}, "unexpected keyword argument 'heads'"),
        ("total", {}, "missing a required argument: 'n_head'"),
    ],
)
def test_impossible_matches_say_so_in_one_line(by: str, sizes: dict, message: str) -> None:
    target = build("rwkv4_tiny", 256, 64)
    with pytest.raises(ValueError, match=message) as caught:
        matched_sizes(GPT, target, by, **sizes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("by", ["total", "non_embedding", "flops"])
def test_matched_gpt_is_the_size_of_the_rwkv(by: str) -> None:
    with torch.device("meta"):
        rwkv = RWKV4(256, n_layer=3, n_embd=64, ctx_len=128)
    gpt = matched_gpt(256, 128, n_layer=3, n_embd=64, n_head=2, by=by)
    assert MEASURES[by](gpt) == pytest.approx(MEASURES[by](rwkv), rel=0.005)
    with pytest.raises(ValueError, match="n_head must divide"):
        matched_gpt(256, 128, n_layer=3, n_embd=64, n_head=5)
