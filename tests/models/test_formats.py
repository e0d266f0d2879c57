"""Names, shapes, settings and the guess about divided matrices, against Hugging Face's classes."""

import random

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, RwkvConfig, RwkvForCausalLM

from models.families import formats
from models.formats import SIZES, same_dtype
from models.language_model import LanguageModel
from models.rwkv4 import rescale
from models.rwkv4.model import RWKV4
from models.sizing import build_empty

RWKV_NET = {"vocab_size": 50, "n_layer": 3, "n_embd": 16, "n_ffn": 40, "ctx_len": 32}
GPT_NET = RWKV_NET | {"n_head": 2, "rotary_pct": 0.25}
FORMS = {name: form for name, (_, form) in formats().items()}
NETS = {kind: GPT_NET if kind == "hf_gpt_neox" else RWKV_NET for kind in FORMS}
KINDS = pytest.mark.parametrize("kind", NETS)
HUGGING_FACE = {
    "hf_rwkv": (RwkvConfig, RwkvForCausalLM),
    "hf_gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
}
NEOX_FIELDS = {"num_attention_heads": 2, "max_position_embeddings": 32}


def empty_model(net: dict, kind: str) -> LanguageModel:
    return build_empty(formats()[kind][0].model, net)


def shapes_of(model: LanguageModel, kind: str) -> dict[str, tuple[int, ...]]:
    return {FORMS[kind].external_name(k): tuple(v.shape) for k, v in model.state_dict().items()}


@KINDS
def test_a_name_has_one_counterpart(kind: str) -> None:
    ours = empty_model(NETS[kind], kind).state_dict()
    theirs = {FORMS[kind].external_name(name): name for name in ours}
    assert len(theirs) == len(ours)  # so the table can be read both ways
    if kind.startswith("rwkv_"):
        assert list(theirs) == list(theirs.values()) == list(ours)
        assert len(ours) == 18 * 3 + 6
        return
    config_class, model_class = HUGGING_FACE[kind]
    with torch.device("meta"):
        config = FORMS[kind].config(empty_model(NETS[kind], kind), 0, "float32")
        twin = model_class(config_class(**config)).state_dict()
    expected = {FORMS[kind].file_name(name): tuple(value.shape) for name, value in twin.items()}
    expected.pop(None, None)
    assert {name: tuple(ours[theirs[name]].shape) for name in theirs} == expected


@pytest.mark.parametrize("seed", range(4))
def test_sizes_are_read_off_the_tensors(seed: int) -> None:
    rng = random.Random(seed)
    for kind, net in NETS.items():
        heads = rng.randint(1, 4)
        sizes = {"vocab_size": rng.randint(2, 99), "n_layer": rng.randint(1, 12)}
        sizes |= {"n_embd": 16 * heads, "n_ffn": rng.randint(1, 99)}
        more = {"ctx_len": 8} | ({"n_head": heads} if "n_head" in net else {})
        model = empty_model(sizes | more, kind)
        assert FORMS[kind].infer_sizes(shapes_of(model, kind)) == sizes


@KINDS
def test_a_tensor_missing_extra_or_misshapen_is_named(kind: str) -> None:
    model = empty_model(NETS[kind], kind)
    shapes = shapes_of(model, kind)
    assert set(FORMS[kind].match(shapes, model)) == set(model.state_dict())
    for theirs, shape in list(shapes.items())[::5]:
        less = {name: shape for name, shape in shapes.items() if name != theirs}
        with pytest.raises(ValueError, match=f"tensor {theirs} is missing"):
            FORMS[kind].match(less, model)
        with pytest.raises(ValueError, match=f"tensor {theirs} has shape"):
            FORMS[kind].match(shapes | {theirs: (*shape[:-1], shape[-1] + 1)}, model)
    extra = FORMS[kind].external_name("blocks.0.att.ln_x.weight")
    with pytest.raises(ValueError, match=f"tensor {extra} is not one of a"):
        FORMS[kind].match(shapes | {extra: (16,)}, model)
    far = FORMS[kind].external_name("blocks.99999999.ln1.weight")
    sizes = FORMS[kind].infer_sizes(shapes | {far: (16,)})
    assert sizes["n_layer"] == 4  # counted, not believed
    del shapes[FORMS[kind].external_name("emb.weight")]
    with pytest.raises(ValueError, match="is missing: not a whole checkpoint"):
        FORMS[kind].infer_sizes(shapes)


def test_buffers_prefixes_and_second_names() -> None:
    for name in ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"):
        assert FORMS["hf_gpt_neox"].file_name(f"gpt_neox.layers.0.{name}") is None
    for name in ("attention.dense.bias", "attention.query_key_value.bias"):
        assert FORMS["hf_gpt_neox"].file_name(f"gpt_neox.layers.0.{name}") is not None
    assert FORMS["hf_gpt_neox"].file_name("lm_head.weight") == "embed_out.weight"
    assert FORMS["rwkv_pth"].file_name("_forward_module.emb.weight") == "emb.weight"


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("hf_gpt_neox", {"use_parallel_residual": False}, "use_parallel_residual=False"),
        ("hf_gpt_neox", {"rotary_emb_base": 500}, "rotary_emb_base=500"),
        ("hf_gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling="),
        ("hf_gpt_neox", {"rope_parameters": {"factor": 8.0}}, "rope_scaling="),
        ("hf_gpt_neox", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ("hf_gpt_neox", {"num_attention_heads": None}, "num_attention_heads=None"),
        ("hf_gpt_neox", {"rotary_pct": float("nan")}, "a number from 0 to 1 is needed"),
        ("hf_gpt_neox", {"rope_parameters": [1]}, r"rope_parameters=\[1\]: an object is needed"),
        ("hf_gpt_neox", {"hidden_size": 8}, "hidden_size=8, its tensors have 16"),
        ("hf_rwkv", {"attention_hidden_size": 8}, "attention_hidden_size=8"),
        ("hf_rwkv", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
        ("hf_rwkv", {"num_hidden_layers": 2}, "num_hidden_layers=2, its tensors have 3"),
    ],
)
def test_a_config_that_we_cannot_follow_is_refused(kind: str, fields: dict, message: str) -> None:
    config = (NEOX_FIELDS if kind == "hf_gpt_neox" else {}) | fields
    sizes = {key: RWKV_NET[key] for key in SIZES}
    with pytest.raises(ValueError, match=message):
        FORMS[kind].settings(config, sizes)


def test_settings_come_back_out_of_a_config_of_either_age() -> None:
    sizes = {key: GPT_NET[key] for key in SIZES}
    settings = {"ctx_len": 32, "n_head": 2, "rotary_pct": 0.5}
    old = NEOX_FIELDS | {"rotary_pct": 0.5, "rotary_emb_base": 10000, "rope_scaling": None}
    new = GPTNeoXConfig(**NEOX_FIELDS, rotary_pct=0.5, hidden_size=16, vocab_size=50,
                        num_hidden_layers=3, intermediate_size=40).to_dict()  # fmt: skip
    assert "rope_parameters" in new
    assert FORMS["hf_gpt_neox"].settings(old, sizes) == settings
    assert FORMS["hf_gpt_neox"].settings(new, sizes) == settings
    assert FORMS["hf_gpt_neox"].settings(NEOX_FIELDS, sizes) == settings | {"rotary_pct": 0.25}
    assert FORMS["hf_rwkv"].settings({"context_length": 7}, sizes) == {"ctx_len": 7}


def test_the_rotated_share_survives_rounding() -> None:
    for K in (2, 3, 48, 49, 64, 80, 98, 103, 107, 128, 161):
        net = GPT_NET | {"n_layer": 1, "n_embd": K, "n_head": 1, "rotary_pct": 0.0}
        model = empty_model(net, "hf_gpt_neox")
        for n in range(0, K + 1, 2):
            model.n_rotary = n
            assert int(K * FORMS["hf_gpt_neox"].config(model, 0, "float32")["rotary_pct"]) == n


def deep_rwkv(n_layer: int, every: int) -> RwkvForCausalLM:
    config = RwkvConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=n_layer, rescale_every=every
    )
    return RwkvForCausalLM(config)


def our_weights(twin: RwkvForCausalLM, n_layer: int) -> dict[str, Tensor]:
    state = twin.state_dict()
    ours = RWKV4(20, n_layer, 16, 8).state_dict()
    return {name: state[FORMS["hf_rwkv"].external_name(name)] for name in ours}


@pytest.mark.parametrize(("n_layer", "every"), [(7, 6), (13, 4), (4, 1)])
def test_weights_saved_in_inference_mode_are_seen_and_undone(n_layer: int, every: int) -> None:
    twin = deep_rwkv(n_layer, every).train()
    before = {name: value.clone() for name, value in our_weights(twin, n_layer).items()}
    assert rescale.step_height(before, every) > rescale.SUSPICIOUS
    twin.eval()(torch.tensor([[1, 2, 3]]))
    after = our_weights(twin, n_layer)
    assert rescale.step_height(after, every) < rescale.SUSPICIOUS
    for name, value in after.items():
        assert torch.equal(value * 2 ** rescale.shift(name, every), before[name])


def test_nothing_is_guessed_where_nothing_is_divided() -> None:
    assert rescale.step_height(RWKV4(20, 12, 16, 8).state_dict(), 6) is None  # zeros at the start
    weights = our_weights(deep_rwkv(6, 6), 6)
    assert rescale.step_height(weights, 6) is None  # no layer past the first border
    assert rescale.step_height(weights, 0) is None
    assert rescale.halving_period({}) == 6
    with pytest.raises(ValueError, match="rescale_every='six'"):
        rescale.halving_period({"rescale_every": "six"})


def error_rates(n_layer: int, stray: float, n: int = 100) -> tuple[float, float]:
    """Shares of whole models called divided, and of divided ones called whole.

    `stray`: standard deviation of a matrix's size about a random parabola over the depth, in twos.
    """
    generator = torch.Generator().manual_seed(n_layer)
    false_alarms = missed = 0
    depth = torch.linspace(-1, 1, n_layer)
    for _ in range(n):
        weights = {}
        for kind in rescale.RESCALED:
            slope, bend, *noise = torch.randn(2 + n_layer, generator=generator)
            twos = slope * depth + bend * depth**2 + stray * torch.stack(noise)
            for layer, size in enumerate(2**twos):
                weights[f"blocks.{layer}.{kind}"] = torch.full((1, 1), size.item())
        divided = {name: w / 2 ** rescale.shift(name, 6) for name, w in weights.items()}
        false_alarms += rescale.step_height(weights, 6) < rescale.SUSPICIOUS
        missed += rescale.step_height(divided, 6) >= rescale.SUSPICIOUS
    return false_alarms / n, missed / n


@pytest.mark.parametrize(
    ("n_layer", "stray", "most"),
    [(7, 0.1, 0.01), (24, 0.3, 0.02)],
)
def test_the_guess_is_seldom_wrong(n_layer: int, stray: float, most: float) -> None:
    assert max(error_rates(n_layer, stray)) <= most


def test_mixed_dtypes_are_named_by_the_most_values_and_integers_refused() -> None:
    half, full = torch.zeros(9, dtype=torch.bfloat16), torch.zeros(3)
    assert same_dtype([full, half]) == "bfloat16"
    with pytest.raises(ValueError, match=r"torch\.int64 cannot be used"):
        same_dtype([half, torch.zeros(2, dtype=torch.int64)])
