"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048), as the authors' code has it where the text differs.

Attribute names follow the official checkpoints, so that a `.pth` file loads strictly.

B batch, T time, C n_embd, F n_ffn, V vocabulary, L layers; l a layer's number, i a channel's.
"""

import math
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.language_model import LanguageModel, State, check_n_pad
from models.ops.linear import Linear
from models.ops.shift import gated_linear, shift_linear, squared_relu
from models.ops.step import Weights, step_weights
from models.ops.wkv import can_step, live_backend, time_mix_step, wkv
from models.rwkv4.step import STEP, STEP_NAMES, rwkv4_step

EMPTY_EXPONENT = -1e38  # running max exponent of a WKV state that has seen nothing
PAD_KEY = -1e30  # above EMPTY_EXPONENT, and so far below any key that exp(difference) is 0
# Shifted input of the time-mix (B, C), of the channel-mix (B, C), and WKV state (B, 3, C).
LayerState = tuple[Tensor, Tensor, Tensor]


class TimeMix(nn.Module):
    """Attention's place: a decaying average of values over time, gated by receptance."""

    def __init__(self, n_embd: int, layer: int, n_layer: int):
        super().__init__()
        depth = layer / max(n_layer - 1, 1)  # 0 to 1; a single layer counts as the first
        height = 1 - layer / n_layer  # 1 to near 0
        i = torch.arange(n_embd, dtype=torch.float64)
        ramp = i / max(n_embd - 1, 1)
        zigzag = (i + 1) % 3 - 1
        decay = -5 + 8 * ramp ** (0.7 + 1.3 * depth)
        self.time_decay = nn.Parameter(decay.float())  # log of the decay rate
        self.time_first = nn.Parameter((math.log(0.3) + 0.5 * zigzag).float())  # bonus u
        mix = (i / n_embd).view(1, 1, -1)
        self.time_mix_k = nn.Parameter((mix**height).float())
        self.time_mix_v = nn.Parameter((mix**height + 0.3 * depth).float())
        self.time_mix_r = nn.Parameter((mix ** (0.5 * height)).float())
        self.key = Linear(n_embd, n_embd, bias=False)
        self.value = Linear(n_embd, n_embd, bias=False)
        self.receptance = Linear(n_embd, n_embd, bias=False)
        self.output = Linear(n_embd, n_embd, bias=False)
        nn.init.orthogonal_(self.value.weight)
        for zero in (self.key, self.receptance, self.output):
            nn.init.zeros_(zero.weight)

    def forward(
        self,
        x: Tensor,
        previous: Tensor,
        state: Tensor | None,
        pad: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, C) -> (B, T, C), and the WKV state (B, 3, C)."""
        mixes = [self.time_mix_k, self.time_mix_v, self.time_mix_r]
        weights = [self.key.weight, self.value.weight, self.receptance.weight]
        previous = previous.to(x.dtype)
        dtype = torch.promote_types(x.dtype, torch.float32)  # the op's arithmetic, never below
        w, u = -torch.exp(self.time_decay.to(dtype)), self.time_first.to(dtype)
        one_token = state is not None and x.shape[1] == 1 and pad is None
        if one_token and can_step(x, self.key.weight, backend):
            y, state = time_mix_step(x[:, 0], previous, mixes, weights, w, u, state)
            return self.output(y).unsqueeze(1), state
        k, v, r = shift_linear(x, previous, mixes, weights)
        if pad is not None:
            k = k.masked_fill(pad, max(PAD_KEY, torch.finfo(k.dtype).min / 2))
        y, state = wkv(w, u, k, v, state, backend)
        return gated_linear(r, y, self.output.weight), state


class ChannelMix(nn.Module):
    """The feed-forward part: squared ReLU, gated by receptance."""

    def __init__(self, n_embd: int, n_ffn: int, layer: int, n_layer: int):
        super().__init__()
        mix = (torch.arange(n_embd, dtype=torch.float64) / n_embd) ** (1 - layer / n_layer)
        self.time_mix_k = nn.Parameter(mix.float().view(1, 1, -1))
        self.time_mix_r = nn.Parameter(mix.float().view(1, 1, -1))
        self.key = Linear(n_embd, n_ffn, bias=False)
        self.receptance = Linear(n_embd, n_embd, bias=False)
        self.value = Linear(n_ffn, n_embd, bias=False)
        nn.init.orthogonal_(self.key.weight, math.sqrt(max(n_ffn / n_embd, 1)))
        for zero in (self.receptance, self.value):
            nn.init.zeros_(zero.weight)

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        mixes = [self.time_mix_k, self.time_mix_r]
        weights = [self.key.weight, self.receptance.weight]
        k, r = shift_linear(x, previous, mixes, weights)
        return torch.sigmoid(r) * self.value(squared_relu(k))  # k (B, T, F)


class Block(nn.Module):
    """Time-mix and channel-mix, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, n_embd: int, n_ffn: int, layer: int, n_layer: int):
        super().__init__()
        self.ln0 = nn.LayerNorm(n_embd) if layer == 0 else nn.Identity()  # after the embedding
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)
        self.att = TimeMix(n_embd, layer, n_layer)
        self.ffn = ChannelMix(n_embd, n_ffn, layer, n_layer)

    def forward(
        self, x: Tensor, state: LayerState | None, pad: Tensor | None, backend: str
    ) -> tuple[Tensor, LayerState | None]:
        """x (B, T, C) -> (B, T, C), and this layer's state if one came in; pad (B, T, 1) bool."""
        x = self.ln0(x)
        nothing = x.new_zeros(x.shape[0], x.shape[2])
        att_previous, ffn_previous, wkv_state = state or (nothing, nothing, None)
        att_x = self.ln1(x)
        if pad is not None:  # the first real token must find zeros before it
            att_x = att_x.masked_fill(pad, 0)
        y, wkv_state = self.att(att_x, att_previous, wkv_state, pad, backend)
        x = x + y
        ffn_x = self.ln2(x)
        if pad is not None:
            ffn_x = ffn_x.masked_fill(pad, 0)
        x = x + self.ffn(ffn_x, ffn_previous)
        if state is None:
            return x, None
        dtype = state[0].dtype
        return x, (att_x[:, -1].to(dtype), ffn_x[:, -1].to(dtype), wkv_state)


class RWKV4(LanguageModel):
    """RWKV-4; its state is {att_shift, ffn_shift: (B, L, C), wkv: (B, L, 3, C)}, float32.

    `emb_init` bounds the uniform initial embedding. A state made with n_pad also carries that,
    less the positions seen so far.
    """

    family = "rwkv4"
    lr_scales: ClassVar = {"time_decay": 2.0, "time_first": 3.0}

    def __init__(
        self,
        vocab_size: int,
        n_layer: int,
        n_embd: int,
        ctx_len: int,
        n_ffn: int | None = None,
        emb_init: float = 1e-4,
    ):
        n_ffn = 4 * n_embd if n_ffn is None else n_ffn
        super().__init__(vocab_size, n_layer, n_embd, n_ffn, ctx_len)
        self.max_ctx = None
        self.emb = nn.Embedding(vocab_size, n_embd)
        self.blocks = nn.ModuleList(
            Block(n_embd, n_ffn, layer, n_layer) for layer in range(n_layer)
        )
        self.ln_out = nn.LayerNorm(n_embd)
        self.head = Linear(n_embd, vocab_size, bias=False)
        nn.init.uniform_(self.emb.weight, -emb_init, emb_init)
        nn.init.orthogonal_(self.head.weight, 0.5 * math.sqrt(max(vocab_size / n_embd, 1)))

    def features(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """Token ids (B, T) -> the last norm's output (B, T, C), and the state if one came in."""
        T = ids.shape[1]
        x = self.emb(ids).to(self.ln_out.weight.dtype)
        weights = None if state is None else self._step_weights(x, state)
        if state is not None and weights is not None:
            first = cast(Block, self.blocks[0])
            x, new = rwkv4_step(first.ln0(x), state, weights)
            return self.ln_out(x), new
        pad = None
        if state is not None and "n_pad" in state:
            pad = (torch.arange(T, device=ids.device) < state["n_pad"][:, None]).unsqueeze(-1)
        layers = []
        for l, block in enumerate(self.blocks):
            past = None
            if state is not None:
                past = (state["att_shift"][:, l], state["ffn_shift"][:, l], state["wkv"][:, l])
            if self.grad_checkpoint and self.training:
                x, past = checkpoint(block, x, past, pad, self.backend, use_reentrant=False)
            else:
                x, past = block(x, past, pad, self.backend)
            layers.append(past)
        if state is None:
            return self.ln_out(x), None
        names = ("att_shift", "ffn_shift", "wkv")
        new = {name: torch.stack([layer[n] for layer in layers], 1) for n, name in enumerate(names)}
        if "n_pad" in state:
            new["n_pad"] = (state["n_pad"] - T).clamp(min=0)
        return self.ln_out(x), new

    def _step_weights(self, x: Tensor, state: State) -> list[Weights] | None:
        """What one call of C++ for all layers needs, or None where it cannot take x (B, T, C)."""
        B, L, C = len(x), self.n_layer, self.n_embd
        shift = (B, L, C)
        shapes = {"att_shift": shift, "ffn_shift": shift, "wkv": (B, L, 3, C)}
        if {name: value.shape for name, value in state.items()} != shapes:  # or n_pad is there
            return None
        if self.backend not in ("auto", "cpu"):
            return None
        return step_weights(STEP, x, self.blocks, STEP_NAMES, state.values())

    def init_state(self, batch_size: int, n_pad: Tensor | None = None) -> State:
        """The state before any token; the first n_pad[b] positions of row b leave no trace."""
        B, L, C = batch_size, self.n_layer, self.n_embd
        weight = self.emb.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        empty = weight.new_zeros(B, L, 3, C, dtype=dtype)
        empty[:, :, 2] = EMPTY_EXPONENT
        state = {
            "att_shift": weight.new_zeros(B, L, C, dtype=dtype),
            "ffn_shift": weight.new_zeros(B, L, C, dtype=dtype),
            "wkv": empty,
        }
        if n_pad is not None:
            state["n_pad"] = check_n_pad(n_pad, batch_size).to(weight.device)
        return state

    def live_backend(self, device: torch.device) -> str:
        """The backend that WKV runs on. Raises ValueError if `backend` cannot be had."""
        return live_backend(device, self.backend)

    def matmul_flops_per_token(self, ctx_len: int) -> int:
        """FLOPs of one forward pass's matrix products, per token: 2 (VC + 13 C^2 L) at F = 4C."""
        C, F = self.n_embd, self.n_ffn
        return 2 * (self.vocab_size * C + self.n_layer * (5 * C * C + 2 * C * F))

    def mixing_flops_per_token(self, ctx_len: int) -> int:
        """FLOPs of the mixing over time, per token: 5 token-shift mixes of 3, and 23 for WKV.

        WKV per channel: output 12 (2 exp, 2 differences, u + k, max, 5 for two sums, 1 division)
        and update 11 (the same without the division).
        """
        return self.n_layer * self.n_embd * (5 * 3 + 23)

    def state_bytes(self, batch_size: int, n_tokens: int) -> int:
        """Bytes of the state, which does not grow: 5 float32 vectors of C for each layer."""
        return batch_size * self.n_layer * 5 * self.n_embd * 4
