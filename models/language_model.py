"""The contract that every architecture keeps (CONTRIBUTING.md), and the counting of parameters.

State goes in and comes out as a value: a dict of tensors whose first dimension is the batch.

B batch, T time, C n_embd, V vocabulary, L layers.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


class LanguageModel(nn.Module):
    """A causal language model over token ids; subclasses set the modules and fill in the rest."""

    family: ClassVar[str]
    # How it runs, not what it computes; may be set at any time.
    backend = "auto"  # of its operators, for those that have several
    grad_checkpoint = False  # True: run each block again in the backward pass
    # Learning-rate multipliers by the last part of a parameter's name.
    lr_scales: ClassVar[dict[str, float]] = {}

    emb: nn.Embedding
    blocks: nn.ModuleList
    ln_out: nn.LayerNorm
    head: nn.Linear
    max_ctx: int | None  # longest sequence the model may see; None: unbounded

    def __init__(self, vocab_size: int, n_layer: int, n_embd: int, n_ffn: int, ctx_len: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.n_layer = n_layer
        self.n_embd = n_embd
        self.n_ffn = n_ffn
        self.ctx_len = ctx_len
        for name in ("vocab_size", "n_layer", "n_embd", "n_ffn", "ctx_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def features(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """Token ids (B, T) -> the last norm's output (B, T, C), and the state if one came in."""
        raise NotImplementedError

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """Token ids (B, T) -> logits (B, T, V), and the state after them if one came in."""
        x, state = self.features(ids, state)
        return self.head(x), state

    def init_state(self, batch_size: int, n_pad: Tensor | None = None) -> State:
        """The state before any token; the first n_pad[b] positions of row b leave no trace."""
        raise NotImplementedError

    def live_backend(self, device: torch.device) -> str | None:
        """The backend that its operators run on; None for a family without any to choose from.

        Raises:
            ValueError: if `backend` names one that cannot be had.
        """
        if self.backend != "auto":
            raise ValueError(f"{self.family} has no backends: leave out backend={self.backend}")
        return None

    def matmul_flops_per_token(self, ctx_len: int) -> int:
        """FLOPs of one forward pass's matrix products, per token; a multiply-add counts two."""
        raise NotImplementedError

    def mixing_flops_per_token(self, ctx_len: int) -> int:
        """FLOPs of one forward pass's elementwise mixing over time, per token."""
        raise NotImplementedError

    def flops_per_token(self, ctx_len: int) -> int:
        """Training FLOPs per token: forward, and backward at twice the forward."""
        return 3 * (self.matmul_flops_per_token(ctx_len) + self.mixing_flops_per_token(ctx_len))

    def state_bytes(self, batch_size: int, n_tokens: int) -> int:
        """Bytes of the state after n_tokens, in float32."""
        raise NotImplementedError

    def param_groups(self, weight_decay: float) -> list[dict]:
        """Optimizer groups with `lr_scale`; only matrices decay, never vectors of any shape."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            decay = weight_decay if parameter.dim() == 2 else 0.0
            scale = self.lr_scales.get(name.rpartition(".")[2], 1.0)
            groups.setdefault((decay, scale), []).append(parameter)
        return [
            {"params": params, "weight_decay": decay, "lr_scale": scale}
            for (decay, scale), params in groups.items()
        ]


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Number of parameters: `total`, and `non_embedding` without `emb` and `head`."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    outer = sum(n for name, n in sizes.items() if name.split(".")[0] in ("emb", "head"))
    return {"total": sum(sizes.values()), "non_embedding": sum(sizes.values()) - outer}


def select_rows(state: State, rows: Tensor) -> State:
    """The state of the batch rows `rows` (N,) int64, in that order; repeat a row to fork it."""
    return {name: value.index_select(0, rows) for name, value in state.items()}


def check_n_pad(n_pad: Tensor, batch_size: int) -> Tensor:
    """`n_pad` itself, if it has one count for each of the batch's rows."""
    if n_pad.shape != (batch_size,) or n_pad.dtype != torch.int64:
        raise ValueError(
            f"n_pad must be int64 of shape ({batch_size},), got {n_pad.dtype} {tuple(n_pad.shape)}"
        )
    return n_pad
