"""The GPT baseline: GPT-NeoX as Pythia uses it (Black et al. 2022, Biderman et al. 2023).

Rotary embedding on a part of each head (Su et al. 2021), attention and feed-forward in parallel,
biases, exact GELU, untied head.

B batch, T time, t cached time, C n_embd, H heads, K head size, R rotary size, F n_ffn,
V vocabulary, L layers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.language_model import LanguageModel, State, check_n_pad

ROTARY_BASE = 10000.0

KeyValue = tuple[Tensor, Tensor]  # cached keys and values of a layer, each (B, H, t, K)


def rotary_angles(position: Tensor, n_rotary: int) -> Tensor:
    """Angles (..., T, R / 2) float32 at the positions (..., T): position / base^(2i / R)."""
    i = torch.arange(0, n_rotary, 2, device=position.device).float()
    return position.float().unsqueeze(-1) * (1 / ROTARY_BASE ** (i / n_rotary))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R of K channels of x (B, T, H, K), pairing i with i + R / 2."""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd)  # rows ordered by head, then q, k, v
        self.output = nn.Linear(n_embd, n_embd)

    def forward(
        self, x: Tensor, rotary: KeyValue, past: KeyValue | None, mask: Tensor | None
    ) -> tuple[Tensor, KeyValue]:
        """x (B, T, C) -> (B, T, C), and keys and values (B, H, t + T, K) with the past's."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, self.n_head, 3, C // self.n_head)
        q, k, v = qkv.unbind(3)  # (B, T, H, K)
        cos, sin = (factor.to(qkv.dtype) for factor in rotary)
        q = rotate(q, cos, sin).transpose(1, 2)  # (B, H, T, K)
        k = rotate(k, cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)
        if past is not None:
            k = torch.cat([past[0].to(k.dtype), k], dim=2)  # (B, H, t + T, K)
            v = torch.cat([past[1].to(v.dtype), v], dim=2)
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.output(y.transpose(1, 2).reshape(B, T, C)), (k, v)


class FeedForward(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, n_embd: int, n_ffn: int):
        super().__init__()
        self.up = nn.Linear(n_embd, n_ffn)
        self.down = nn.Linear(n_ffn, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Attention and feed-forward side by side, both reading the same residual stream."""

    def __init__(self, n_embd: int, n_head: int, n_ffn: int):
        super().__init__()
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)
        self.att = Attention(n_embd, n_head)
        self.ffn = FeedForward(n_embd, n_ffn)

    def forward(
        self, x: Tensor, rotary: KeyValue, past: KeyValue | None, mask: Tensor | None
    ) -> tuple[Tensor, KeyValue]:
        """x (B, T, C) -> (B, T, C), and this layer's keys and values."""
        y, past = self.att(self.ln1(x), rotary, past, mask)
        return x + y + self.ffn(self.ln2(x)), past


class GPT(LanguageModel):
    """GPT-NeoX; its state is the KV cache {k0, v0, k1, ...: (B, H, t, K)}.

    A state made with n_pad also carries that; a row's positions start after its padding.
    """

    family = "gpt"

    def __init__(
        self,
        vocab_size: int,
        n_layer: int,
        n_embd: int,
        n_head: int,
        ctx_len: int,
        n_ffn: int | None = None,
        rotary_pct: float = 0.25,
        grad_checkpoint: bool = False,
    ):
        n_ffn = 4 * n_embd if n_ffn is None else n_ffn
        super().__init__(vocab_size, n_layer, n_embd, n_ffn, ctx_len)
        if n_head < 1 or n_embd % n_head:
            raise ValueError(f"n_head must divide n_embd: {n_embd} / {n_head} is not whole")
        self.n_rotary = int(n_embd // n_head * rotary_pct)
        if not 0 <= rotary_pct <= 1 or self.n_rotary % 2:
            raise ValueError(
                f"rotary_pct {rotary_pct} of head size {n_embd // n_head} is {self.n_rotary} "
                "channels; it must be an even number of them"
            )
        self.max_ctx = ctx_len
        self.n_head = n_head
        self.grad_checkpoint = grad_checkpoint
        self.emb = nn.Embedding(vocab_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, n_ffn) for _ in range(n_layer))
        self.ln_out = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        self._init_weights()

    def _init_weights(self) -> None:
        small = math.sqrt(2 / (5 * self.n_embd))  # Nguyen and Salazar 2019
        wang = 2 / (self.n_layer * math.sqrt(self.n_embd))  # Wang and Komatsuzaki 2021
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("att.output", "ffn.down"))
                nn.init.normal_(module.weight, std=wang if residual else small)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def features(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """Token ids (B, T) -> the last norm's output (B, T, C), and the state if one came in.

        Raises ValueError when the sequence would become longer than max_ctx.
        """
        T, t = ids.shape[1], 0 if state is None else state["k0"].shape[2]
        if t + T > self.ctx_len:
            raise ValueError(
                f"a sequence of {t + T} tokens is longer than this GPT's context of {self.ctx_len}"
            )
        n_pad = None if state is None else state.get("n_pad")
        rotary, mask = self._positions(ids, t, n_pad)
        x = self.emb(ids)
        new: State = {} if n_pad is None else {"n_pad": n_pad}
        for l, block in enumerate(self.blocks):
            past = None if state is None else (state[f"k{l}"], state[f"v{l}"])
            if self.grad_checkpoint and self.training:
                x, past = checkpoint(block, x, rotary, past, mask, use_reentrant=False)
            else:
                x, past = block(x, rotary, past, mask)
            new[f"k{l}"], new[f"v{l}"] = past
        return self.ln_out(x), None if state is None else new

    def _positions(
        self, ids: Tensor, t: int, n_pad: Tensor | None
    ) -> tuple[KeyValue, Tensor | None]:
        """Cosines and sines of the new tokens, and the mask (B or 1, 1, T, t + T) if needed."""
        T = ids.shape[1]
        place = torch.arange(t + T, device=ids.device)
        position = place[t:]
        mask = None
        if n_pad is not None or (t > 0 and T > 1):
            mask = (place <= position[:, None])[None, None]
            if n_pad is not None:
                real = (place >= n_pad[:, None])[:, None, None]
                itself = place == position[:, None]  # or a pad sees nothing at all: NaN
                mask = mask & real | itself
                position = (position - n_pad[:, None]).clamp(min=0)  # (B, T), those it has alone
        angles = rotary_angles(position, self.n_rotary).unsqueeze(-2)  # (B or nothing, T, 1, R/2)
        return (angles.cos(), angles.sin()), mask

    def init_state(self, batch_size: int, n_pad: Tensor | None = None) -> State:
        """The state before any token; the first n_pad[b] positions of row b leave no trace."""
        weight = self.emb.weight
        empty = weight.new_zeros(batch_size, self.n_head, 0, self.n_embd // self.n_head)
        state = {f"{name}{l}": empty for l in range(self.n_layer) for name in "kv"}
        if n_pad is not None:
            state["n_pad"] = check_n_pad(n_pad, batch_size).to(weight.device)
        return state

    def matmul_flops_per_token(self, ctx_len: int) -> int:
        """FLOPs of one forward pass's matrix products, per token, masked scores not counted.

        A token attends to (ctx_len + 1) / 2 others on average: what causality asks for, and what
        a fused kernel does. Counting the whole square would double the attention's share.
        """
        C, F = self.n_embd, self.n_ffn
        scores = 2 * C * (ctx_len + 1)  # q k^T and the sum of values: 2 * 2C * (T + 1) / 2
        return 2 * (self.vocab_size * C + self.n_layer * (4 * C * C + 2 * C * F)) + (
            self.n_layer * scores
        )

    def mixing_flops_per_token(self, ctx_len: int) -> int:
        """FLOPs of the mixing over time, per token: 5 per score for the softmax, 3 for rotary.

        Softmax: scale, subtract the max, exp, sum, divide. Rotary: on R channels of q and of k.
        """
        softmax = 5 * self.n_head * (ctx_len + 1) // 2
        return self.n_layer * (softmax + 2 * 3 * self.n_head * self.n_rotary)

    def state_bytes(self, batch_size: int, n_tokens: int) -> int:
        """Bytes of the KV cache after n_tokens, in float32."""
        return batch_size * n_tokens * self.n_layer * 2 * self.n_embd * 4
