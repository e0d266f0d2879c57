"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048), as the authors' code has it where the text differs.

Attribute names follow the official checkpoints, so that a `.pth` file loads strictly.

B batch, T time, C n_embd, F n_ffn, V vocabulary, L layers; l a layer's number, i a channel's.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.language_model import LanguageModel, State, check_n_pad
from models.ops.linear import Linear, linear
from models.ops.wkv import can_step, time_mix_step, wkv

EMPTY_EXPONENT = -1e38  # running max exponent of a WKV state that has seen nothing
PAD_KEY = -1e30  # above EMPTY_EXPONENT, and so far below any key that exp(difference) is 0

# Shifted input of the time-mix (B, C), of the channel-mix (B, C), and WKV state (B, 3, C).
LayerState = tuple[Tensor, Tensor, Tensor]


class ShiftLinear(torch.autograd.Function):
    """Projections of mixes of each token with the one before it: W (m x_t + (1 - m) x_{t-1}).

    Autograd would keep every mix for the gradient of its W; here they are made again from x, which
    takes one cheap pass each. Its own backward would also touch memory nearly twice as often.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, previous: Tensor, mixes: int, *mixes_and_weights: Tensor
    ) -> tuple[Tensor, ...]:
        """x (B, T, C), `previous` (B, C) before its first token; `mixes` times (1, 1, C), then as
        many weights (out, C) -> that many (B, T, out).
        """
        ctx.save_for_backward(x, previous, *mixes_and_weights)
        ctx.n = mixes
        before = shifted(x, previous)
        pairs = zip(mixes_and_weights[:mixes], mixes_and_weights[mixes:], strict=True)
        out = tuple(linear(torch.lerp(before, x, mix), weight) for mix, weight in pairs)
        ctx.dtype = out[0].dtype  # autocast's, where it is on
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of `previous`, of each mix and of each weight."""
        x, previous, *rest = ctx.saved_tensors
        mixes, weights = rest[: ctx.n], rest[ctx.n :]
        before = shifted(x, previous)
        step = x - before
        of_mixes, of_weights = [], []
        of_x, of_both = torch.zeros_like(x), torch.zeros_like(x)
        for grad, mix, weight in zip(grads, mixes, weights, strict=True):
            rows = grad.flatten(0, 1).to(ctx.dtype)  # (B T, out)
            mixed = torch.lerp(before, x, mix).flatten(0, 1).to(ctx.dtype)
            of_weights.append((rows.T @ mixed).to(weight.dtype))
            of_mixed = (rows @ weight.to(ctx.dtype)).view_as(x).to(x.dtype)
            of_mixes.append((of_mixed * step).sum((0, 1), keepdim=True))
            of_both += of_mixed
            of_x.addcmul_(of_mixed, mix)
        of_before = of_both.sub_(of_x)
        of_x[:, :-1] += of_before[:, 1:]
        return of_x, of_before[:, 0], None, *of_mixes, *of_weights


def shifted(x: Tensor, previous: Tensor) -> Tensor:
    """x (B, T, C) one step later in time, starting with `previous` (B, C)."""
    return torch.cat([previous.unsqueeze(1), x[:, :-1]], dim=1)


class GatedLinear(torch.autograd.Function):
    """W (sigmoid(gate) y): keeps gate and y, and makes the gated product again for W's gradient."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """gate and y (B, T, C), weight (out, C) -> (B, T, out)."""
        ctx.save_for_backward(gate, y, weight)
        out = linear(torch.sigmoid(gate) * y, weight)
        ctx.dtype = out.dtype  # autocast's, where it is on
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of gate, y and weight."""
        gate, y, weight = ctx.saved_tensors
        opening = torch.sigmoid(gate)
        rows = grad.flatten(0, 1).to(ctx.dtype)  # (B T, out)
        gated = (opening * y).flatten(0, 1).to(ctx.dtype)
        of_weight = (rows.T @ gated).to(weight.dtype)
        of_gated = (rows @ weight.to(ctx.dtype)).view_as(y)
        of_gate = of_gated * y * opening * (1 - opening)
        return of_gate.to(gate.dtype), (of_gated * opening).to(y.dtype), of_weight


class SquaredReLU(torch.autograd.Function):
    """max(x, 0)^2, saving nothing but its result: F is the model's widest, and the next matrix
    product saves that anyway. The root of a square is right to the last bit or next to it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x of any shape -> the same shape."""
        squared = torch.relu(x).square_()
        ctx.save_for_backward(squared)
        return squared

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """2 max(x, 0) grad."""
        (squared,) = ctx.saved_tensors
        return squared.sqrt().mul_(grad).mul_(2)


# What the functions above compute, without the cost of a node of autograd where there is none.


def shift_linear(
    x: Tensor, previous: Tensor, mixes: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, ...]:
    """`ShiftLinear`; of one token without gradients, its mixes in one pass (weights alike)."""
    previous = previous.to(x.dtype)
    if torch.is_grad_enabled() or x.shape[1] > 1:
        return ShiftLinear.apply(x, previous, len(mixes), *mixes, *weights)
    mixed = torch.lerp(previous.unsqueeze(1), x, torch.stack(mixes))  # (mixes, B, 1, C)
    return tuple(linear(one, weight) for one, weight in zip(mixed, weights, strict=True))


def gated_linear(gate: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """`GatedLinear`."""
    if torch.is_grad_enabled():
        return GatedLinear.apply(gate, y, weight)
    return linear(torch.sigmoid(gate) * y, weight)


def squared_relu(x: Tensor) -> Tensor:
    """`SquaredReLU`."""
    return SquaredReLU.apply(x) if torch.is_grad_enabled() else torch.relu(x).square_()


class TimeMix(nn.Module):
    """Attention's place: a decaying average of values over time, gated by receptance."""

    def __init__(self, n_embd: int, layer: int, n_layer: int, wkv_backend: str):
        super().__init__()
        self.wkv_backend = wkv_backend
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
        self, x: Tensor, previous: Tensor, state: Tensor | None, pad: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, C) -> (B, T, C), and the WKV state (B, 3, C)."""
        mixes = [self.time_mix_k, self.time_mix_v, self.time_mix_r]
        weights = [self.key.weight, self.value.weight, self.receptance.weight]
        previous = previous.to(x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)  # the op's arithmetic, never below
        w, u = -torch.exp(self.time_decay.to(wide)), self.time_first.to(wide)
        one_token = state is not None and x.shape[1] == 1 and pad is None
        if one_token and can_step(x, self.key.weight, self.wkv_backend):
            y, state = time_mix_step(x[:, 0], previous, mixes, weights, w, u, state)
            return self.output(y).unsqueeze(1), state
        k, v, r = shift_linear(x, previous, mixes, weights)
        if pad is not None:
            k = k.masked_fill(pad, max(PAD_KEY, torch.finfo(k.dtype).min / 2))
        y, state = wkv(w, u, k, v, state, self.wkv_backend)
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

    def __init__(self, n_embd: int, n_ffn: int, layer: int, n_layer: int, wkv_backend: str):
        super().__init__()
        self.ln0 = nn.LayerNorm(n_embd) if layer == 0 else nn.Identity()  # after the embedding
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)
        self.att = TimeMix(n_embd, layer, n_layer, wkv_backend)
        self.ffn = ChannelMix(n_embd, n_ffn, layer, n_layer)

    def forward(
        self, x: Tensor, state: LayerState | None, pad: Tensor | None
    ) -> tuple[Tensor, LayerState | None]:
        """x (B, T, C) -> (B, T, C), and this layer's state if one came in; pad (B, T, 1) bool."""
        x = self.ln0(x)
        nothing = x.new_zeros(x.shape[0], x.shape[2])
        att_previous, ffn_previous, wkv_state = state or (nothing, nothing, None)
        att_x = self.ln1(x)
        if pad is not None:  # the first real token must find zeros before it
            att_x = att_x.masked_fill(pad, 0)
        y, wkv_state = self.att(att_x, att_previous, wkv_state, pad)
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
        grad_checkpoint: bool = False,
        wkv_backend: str = "auto",
    ):
        n_ffn = 4 * n_embd if n_ffn is None else n_ffn
        super().__init__(vocab_size, n_layer, n_embd, n_ffn, ctx_len)
        self.max_ctx = None
        self.grad_checkpoint = grad_checkpoint
        self.emb = nn.Embedding(vocab_size, n_embd)
        self.blocks = nn.ModuleList(
            Block(n_embd, n_ffn, layer, n_layer, wkv_backend) for layer in range(n_layer)
        )
        self.ln_out = nn.LayerNorm(n_embd)
        self.head = Linear(n_embd, vocab_size, bias=False)
        nn.init.uniform_(self.emb.weight, -emb_init, emb_init)
        nn.init.orthogonal_(self.head.weight, 0.5 * math.sqrt(max(vocab_size / n_embd, 1)))

    def features(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """Token ids (B, T) -> the last norm's output (B, T, C), and the state if one came in."""
        T = ids.shape[1]
        x = self.emb(ids).to(self.ln_out.weight.dtype)
        pad = None
        if state is not None and "n_pad" in state:
            pad = (torch.arange(T, device=ids.device) < state["n_pad"][:, None]).unsqueeze(-1)
        layers = []
        for l, block in enumerate(self.blocks):
            past = None
            if state is not None:
                past = (state["att_shift"][:, l], state["ffn_shift"][:, l], state["wkv"][:, l])
            if self.grad_checkpoint and self.training:
                x, past = checkpoint(block, x, past, pad, use_reentrant=False)
            else:
                x, past = block(x, past, pad)
            layers.append(past)
        if state is None:
            return self.ln_out(x), None
        names = ("att_shift", "ffn_shift", "wkv")
        new = {name: torch.stack([layer[n] for layer in layers], 1) for n, name in enumerate(names)}
        if "n_pad" in state:
            new["n_pad"] = (state["n_pad"] - T).clamp(min=0)
        return self.ln_out(x), new

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
