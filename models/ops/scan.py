"""WKV in plain PyTorch: a work-efficient parallel scan that needs no compiler, on any device.

A state is held here as a running average `mean` and the logarithm `lse` of its total weight. Two
neighbouring spans join in closed form, so a tree of depth log2(T) takes the place of a loop over T.
Every factor is a sigmoid, hence nothing can overflow, however large the keys or strong the decay.

B batch, T time, C channels.
"""

import torch
from torch import Tensor

EMPTY = -1e38  # the exponent of a state that has seen nothing
_CHUNK_ELEMENTS = (
    1 << 19
)  # what one pass works on: large enough to amortise calls, small for caches

Spans = tuple[Tensor, Tensor]  # mean, lse: (B, n, C) each


def _mix(mean_1: Tensor, lse_1: Tensor, mean_2: Tensor, lse_2: Tensor) -> Tensor:
    # two sigmoids, not s and 1 - s: the smaller weight keeps its relative accuracy
    difference = lse_1 - lse_2
    return torch.sigmoid(difference) * mean_1 + torch.sigmoid(-difference) * mean_2


def _join(older: Spans, newer: Spans, decay: Tensor) -> Spans:
    lse = older[1] + decay
    return _mix(older[0], lse, *newer), torch.logaddexp(lse, newer[1])


def _before_each(spans: Spans, first: Spans, decay: Tensor) -> Spans:
    """What precedes each of n spans and what follows the last: `first` joined with all before it.

    `first` is (B, 1, C) and the result (B, n + 1, C); `decay` (C,) is the decay over one span.
    """
    mean, lse = spans
    n = mean.shape[1]
    if n == 0:
        return first
    even = mean[:, 0::2], lse[:, 0::2]
    odd = mean[:, 1::2], lse[:, 1::2]
    n_pairs, n_odd = n // 2, (n + 1) // 2
    pairs = _join((even[0][:, :n_pairs], even[1][:, :n_pairs]), odd, decay)
    at_even = _before_each(pairs, first, 2 * decay)  # (B, n // 2 + 1, C)
    at_odd = _join((at_even[0][:, :n_odd], at_even[1][:, :n_odd]), even, decay)
    return _interleave(at_even[0], at_odd[0]), _interleave(at_even[1], at_odd[1])


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    n = odd.shape[1]
    both = torch.stack((even[:, :n], odd), dim=2).flatten(1, 2)
    return both if even.shape[1] == n else torch.cat((both, even[:, n:]), dim=1)


def wkv_scan(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The vectorised backend of `wkv`; arguments and results are those of `models.ops.wkv.wkv`."""
    dtype = k.dtype
    k, v = k.to(w.dtype), v.to(w.dtype)
    B, T, C = k.shape
    if state is None:
        mean, lse, top = k.new_zeros(B, 1, C), k.new_full((B, 1, C), EMPTY), k.new_full((), EMPTY)
    else:
        seen = state[:, 1:2] > 0
        total = state[:, 1:2].where(seen, 1.0)
        mean = state[:, 0:1] / total
        top = state[:, 2]
        lse = torch.where(seen, state[:, 2:3] + total.log(), EMPTY)

    step = max(16, min(T, _CHUNK_ELEMENTS // (B * C)))
    ys = []
    for k_part, v_part in zip(k.split(step, dim=1), v.split(step, dim=1), strict=True):
        n = k_part.shape[1]
        before = _before_each((v_part[:, :-1], k_part[:, :-1]), (mean, lse), w)
        ys.append(_mix(*before, v_part, k_part + u))
        mean, lse = _join(
            (before[0][:, -1:], before[1][:, -1:]), (v_part[:, -1:], k_part[:, -1:]), w
        )
        age = torch.arange(n - 1, -1, -1, device=k.device, dtype=k.dtype)
        top = torch.maximum(top + n * w, (k_part + age[:, None] * w).amax(1))  # (B, C)
    y = ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)
    total = (lse[:, 0] - top).exp()
    return y.to(dtype), torch.stack((mean[:, 0] * total, total, top), dim=1)
