"""The mean of all that came before, through a feed-forward part.

B batch, T time, C n_embd, F n_ffn, V vocabulary, L layers.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.language_model import LanguageModel, State, check_n_pad


class Block(nn.Module):
    def __init__(self, n_embd: int, n_ffn: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(n_embd)
        self.up = nn.Linear(n_embd, n_ffn)
        self.down = nn.Linear(n_ffn, n_embd)

    def forward(self, x: Tensor, total: Tensor, n: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, C), total (B, C) of the n (B, T, 1) tokens up to each -> x, total after."""
        sums = total[:, None] + (self.norm(x).float() * real).cumsum(1)
        mean = (sums / n.clamp(min=1)).to(x.dtype)
        return x + self.down(torch.relu(self.up(mean))), sums[:, -1]


class Toy(LanguageModel):
    """Its state is {total: (B, L, C), n: (B, 1)}, float32."""

    family = "toy"

    def __init__(
        self, vocab_size: int, n_layer: int, n_embd: int, ctx_len: int, n_ffn: int | None = None
    ) -> None:
        n_ffn = 4 * n_embd if n_ffn is None else n_ffn
        super().__init__(vocab_size, n_layer, n_embd, n_ffn, ctx_len)
        self.max_ctx = None
        self.emb = nn.Embedding(vocab_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_ffn) for _ in range(n_layer))
        self.ln_out = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)

    def features(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        B, T = ids.shape
        old = self.init_state(B) if state is None else state
        n_pad = old.get("n_pad", torch.zeros(B, dtype=torch.int64, device=ids.device))
        real = (torch.arange(T, device=ids.device) >= n_pad[:, None]).unsqueeze(-1).float()
        n = old["n"][:, None] + real.cumsum(1)
        x = self.emb(ids).to(self.ln_out.weight.dtype)
        totals = []
        for l, block in enumerate(self.blocks):
            given = (x, old["total"][:, l], n, real)
            if self.grad_checkpoint and self.training:
                x, total = checkpoint(block, *given, use_reentrant=False)
            else:
                x, total = block(*given)
            totals.append(total)
        new = {"total": torch.stack(totals, 1), "n": n[:, -1]}
        if "n_pad" in old:
            new["n_pad"] = (n_pad - T).clamp(min=0)
        return self.ln_out(x), None if state is None else new

    def init_state(self, batch_size: int, n_pad: Tensor | None = None) -> State:
        weight = self.emb.weight
        zeros = weight.new_zeros(batch_size, self.n_layer, self.n_embd, dtype=torch.float32)
        state = {"total": zeros, "n": zeros.new_zeros(batch_size, 1)}
        if n_pad is not None:
            state["n_pad"] = check_n_pad(n_pad, batch_size).to(weight.device)
        return state

    def matmul_flops_per_token(self, ctx_len: int) -> int:
        return 2 * self.n_embd * (self.vocab_size + 2 * self.n_layer * self.n_ffn)

    def mixing_flops_per_token(self, ctx_len: int) -> int:
        return 2 * self.n_layer * self.n_embd

    def state_bytes(self, batch_size: int, n_tokens: int) -> int:
        return 4 * batch_size * (self.n_layer * self.n_embd + 1)
