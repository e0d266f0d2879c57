"""Logits equal those of an independent implementation (Hugging Face) on random weights."""

import random

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    RwkvPreTrainedModel,
)

from models.families import formats
from models.gpt.model import GPT
from models.language_model import LanguageModel
from models.rwkv4.model import RWKV4


def share_random_weights(ours: LanguageModel, theirs: nn.Module, form: str) -> None:
    """Give both the same random weights, of the size that keeps activations near 1."""
    with torch.no_grad():
        for parameter in ours.parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape))
    external = formats()[form][1]
    names = {external.file_name(name): name for name in theirs.state_dict()}
    weights = {names[external.external_name(k)]: v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(weights, strict=True)


def relative_rms(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def shapes(seed: int) -> tuple[random.Random, int, int, int, int]:
    """A generator, and L, V, B, T: one layer, one token and odd lengths among them."""
    rng = random.Random(seed)
    L = 1 if seed % 4 == 0 else rng.randint(2, 4)
    T = 1 if seed % 6 == 1 else rng.choice([2, 3, 7, 16, 31, 63])
    return rng, L, rng.randint(2, 99), rng.randint(1, 4), T


@pytest.mark.parametrize("seed", range(12))
def test_rwkv4_logits_equal_hugging_faces(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Theirs divides by n_layer - 1 when it initialises itself.
    monkeypatch.setattr(RwkvPreTrainedModel, "_init_weights", lambda self, module: None)
    rng, L, V, B, T = shapes(seed)
    C = rng.choice([8, 24, 33, 64])
    F = rng.choice([4 * C, 2 * C + 1])
    model = RWKV4(vocab_size=V, n_layer=L, n_embd=C, n_ffn=F, ctx_len=T)
    config = RwkvConfig(
        vocab_size=V, context_length=T, hidden_size=C, num_hidden_layers=L, intermediate_size=F,
        rescale_every=0,
    )  # fmt: skip
    theirs = RwkvForCausalLM(config).eval()
    share_random_weights(model, theirs, "hf_rwkv")
    ids = torch.randint(V, (B, T))
    with torch.no_grad():
        # Row by row: theirs mixes the rows of a batch of single tokens.
        expected = torch.cat([theirs(row[None]).logits for row in ids])
        assert relative_rms(model(ids)[0], expected) < 1e-5


@pytest.mark.parametrize("seed", range(12))
def test_gpt_logits_equal_hugging_faces(seed: int) -> None:
    rng, L, V, B, T = shapes(seed)
    H, K = rng.randint(1, 4), rng.choice([8, 16, 24, 32])
    C = H * K
    F = rng.choice([4 * C, 9 * C // 2])
    rotary_pct = rng.choice([0.25, 0.5, 1.0])
    model = GPT(V, L, C, H, ctx_len=T, n_ffn=F, rotary_pct=rotary_pct).double()
    config = GPTNeoXConfig(
        vocab_size=V, hidden_size=C, num_hidden_layers=L, num_attention_heads=H,
        intermediate_size=F, max_position_embeddings=T, hidden_act="gelu",
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": rotary_pct,
        },
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs = GPTNeoXForCausalLM(config).double().eval()
    share_random_weights(model, theirs, "hf_gpt_neox")
    ids = torch.randint(V, (B, T))
    with torch.no_grad():
        assert relative_rms(model(ids)[0], theirs(ids).logits) < 1e-10
