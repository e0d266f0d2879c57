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

from models.gpt.step import STEP, STEP_NAMES, gpt_step
from models.language_model import LanguageModel, State, check_n_pad
from models.ops.linear import Linear
from models.ops.step import step_weights

ROTARY_BASE = 10000.0
TAIL = 128  # tokens gathered one by one before they join the rest of a cache
KeyValue = tuple[Tensor, Tensor]  # keys and values of a layer, each (B, H, t, K)
Cache = list[KeyValue]  # of a layer: nothing, all of it, or all but a tail and that tail


def rotary_angles(position: Tensor, n_rotary: int) -> Tensor:
    """Angles (..., T, R / 2) float32 at the positions (..., T): position / base^(2i / R)."""
    i = torch.arange(0, n_rotary, 2, device=position.device).float()
    return position.float().unsqueeze(-1) * (1 / ROTARY_BASE ** (i / n_rotary))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R of K channels of x (B, T, H, K), pairing i with i + R / 2."""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def extend(cache: Cache, new: KeyValue) -> Cache:
    """The cache with new keys and values at its end; what came in is left as it was.

    A token at a time, joining all of a long cache again would cost more than the attention itself,
    so single tokens gather in a tail.
    """
    if not cache:
        return [new]
    one = new[0].shape[2] == 1
    if one and len(cache) == 1 and cache[0][0].shape[2] >= TAIL:
        return [*cache, new]
    if one and len(cache) == 2 and cache[1][0].shape[2] < TAIL:
        return [cache[0], _joined([cache[1], new])]
    return [_joined([*cache, new])]


def _joined(parts: Cache) -> KeyValue:
    dtype = parts[-1][0].dtype
    k, v = (torch.cat([part[i].to(dtype) for part in parts], dim=2) for i in (0, 1))
    return k, v


def attend(q: Tensor, cache: Cache, mask: Tensor | None) -> Tensor:
    """Queries (B, H, T, K) to all keys and values of a cache; mask (B or 1, 1, T, t) or causal."""
    if len(cache) == 1:
        causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, *cache[0], attn_mask=mask, is_causal=causal)
    scores = torch.cat([q @ k.to(q.dtype).transpose(2, 3) for k, _ in cache], dim=-1)
    scores = scores * q.shape[-1] ** -0.5  # (B, H, 1, t)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).split([k.shape[2] for k, _ in cache], dim=-1)
    first, second = (p @ v.to(p.dtype) for p, (_, v) in zip(weights, cache, strict=True))
    return first + second


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.qkv = Linear(n_embd, 3 * n_embd)  # rows ordered by head, then q, k, v
        self.output = Linear(n_embd, n_embd)

    def forward(
        self, x: Tensor, rotary: KeyValue, cache: Cache, mask: Tensor | None
    ) -> tuple[Tensor, Cache]:
        """x (B, T, C) -> (B, T, C), and the cache with these tokens."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, self.n_head, 3, C // self.n_head)
        q, k, v = qkv.unbind(3)  # (B, T, H, K)
        cos, sin = (factor.to(qkv.dtype) for factor in rotary)
        q = rotate(q, cos, sin).transpose(1, 2)  # (B, H, T, K)
        k = rotate(k, cos, sin).transpose(1, 2)
        cache = extend(cache, (k, v.transpose(1, 2)))
        y = attend(q, cache, mask)
        return self.output(y.transpose(1, 2).reshape(B, T, C)), cache


class FeedForward(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, n_embd: int, n_ffn: int):
        super().__init__()
        self.up = Linear(n_embd, n_ffn)
        self.down = Linear(n_ffn, n_embd)

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
        self, x: Tensor, rotary: KeyValue, cache: Cache, mask: Tensor | None
    ) -> tuple[Tensor, Cache]:
        """x (B, T, C) -> (B, T, C), and this layer's cache with these tokens."""
        y, cache = self.att(self.ln1(x), rotary, cache, mask)
        return x + y + self.ffn(self.ln2(x)), cache


PARTS = ("", "tail_")  # of a layer's cache in a state, by the start of their names


def layer_cache(state: State, layer: int) -> Cache:
    """What a state has of a layer."""
    names = [part for part in PARTS if f"{part}k{layer}" in state]
    return [(state[f"{part}k{layer}"], state[f"{part}v{layer}"]) for part in names]


def n_cached(state: State) -> int:
    """Tokens that a state holds, padding included."""
    return sum(k.shape[2] for k, _ in layer_cache(state, 0))


class GPT(LanguageModel):
    """GPT-NeoX; its state is the KV cache {k0, v0, k1, ...: (B, H, t, K)}.

    Tokens that came one by one may lie apart, as {tail_k0, tail_v0, ...}, behind those. A state
    made with n_pad also carries that; a row's positions start after its padding.
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
        self.emb = nn.Embedding(vocab_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, n_ffn) for _ in range(n_layer))
        self.ln_out = nn.LayerNorm(n_embd)
        self.head = Linear(n_embd, vocab_size, bias=False)
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
        T, t = ids.shape[1], 0 if state is None else n_cached(state)
        if t + T > self.ctx_len:
            raise ValueError(
                f"a sequence of {t + T} tokens is longer than this GPT's context of {self.ctx_len}"
            )
        n_pad = None if state is None else state.get("n_pad")
        x = self.emb(ids).to(self.ln_out.weight.dtype)
        new: State = {} if n_pad is None else {"n_pad": n_pad}
        if state is not None and T == 1:
            stepped = self._step(x, t, state)
            if stepped is not None:
                return self.ln_out(stepped[0]), new | stepped[1]
        rotary, mask = self._positions(ids, t, n_pad)
        for l, block in enumerate(self.blocks):
            cache = [] if state is None else layer_cache(state, l)
            if self.grad_checkpoint and self.training:
                x, cache = checkpoint(block, x, rotary, cache, mask, use_reentrant=False)
            else:
                x, cache = block(x, rotary, cache, mask)
            for part, (k, v) in zip(PARTS, cache, strict=False):  # there may be no tail
                new[f"{part}k{l}"], new[f"{part}v{l}"] = k, v
        return self.ln_out(x), None if state is None else new

    def _step(self, x: Tensor, t: int, state: State) -> tuple[Tensor, State] | None:
        """x (B, 1, C), after t others, through all layers by one call, and the cache after.

        None where that cannot be, or not before a full tail has joined the rest.
        """
        grown = state["tail_k0" if "tail_k0" in state else "k0"].shape[2]
        if grown >= TAIL and "tail_k0" in state:
            return None
        keys = [f"{name}{l}" for l in range(self.n_layer) for name in "kv"]
        still: list[Tensor] = []
        part = ""
        if grown >= TAIL or "tail_k0" in state:
            still, part = [state[key] for key in keys], "tail_"
        if "tail_k0" in state or not still:
            old = [state[part + key] for key in keys]
        else:
            old = [k[:, :, :0] for k in still]
        n_pad = state.get("n_pad")
        fits = all(
            k.shape == (len(x), self.n_head, parts[0].shape[2], self.n_embd // self.n_head)
            for parts in (still, old)
            for k in parts
        )
        if not fits or (n_pad is not None and n_pad.shape != (len(x),)):
            return None
        weights = step_weights(STEP, x, self.blocks, STEP_NAMES, (*still, *old))
        if weights is None:
            return None
        position = torch.tensor([t]) if n_pad is None else (t - n_pad).clamp(min=0)
        angles = rotary_angles(position, self.n_rotary)
        x, new = gpt_step(x, weights, still, old, angles, n_pad)
        kept = dict(zip(keys, still, strict=False))
        return x, kept | {part + key: k for key, k in zip(keys, new, strict=True)}

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
        weight = self.ln_out.weight  # of the activations' dtype, whatever matrices are kept in
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
