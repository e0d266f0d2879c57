"""bench=train: a training step of every family beside Hugging Face's models of the same sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.benchmarks.measure import (
    Report,
    Row,
    Timings,
    check_counts,
    interleaved,
    peak_memory,
)
from experiments.benchmarks.models import at_size, hugging_face
from experiments.training.loss import cross_entropy
from experiments.training.optimizer import make_optimizer
from models.families import families
from models.language_model import LanguageModel, count_parameters

DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}  # of matrix products
MATMUL_SIZES = (1024, 2048)
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
NOTES = [
    "A step is forward, loss, backward and fused AdamW; models take turns in one process. Columns "
    "are medians; ratios are medians over rounds. `of limit` is the share of the machine's rate of "
    "square matrix products, which take turns with the steps.",
    "Memory: peak resident bytes of two steps in a fresh process, above that process after a "
    "step of a toy model: weights, gradients, optimizer state, activations, scratch. Freed "
    "blocks return to the system at once (glibc left to itself holds back 0 to 40 % more).",
]


@dataclass(frozen=True)
class Candidate:
    """A family's model, ours or that of transformers, in a precision."""

    family: str
    external: bool
    precision: str

    @property
    def label(self) -> str:
        label = families()[self.family].label
        return f"Hugging Face's {label}" if self.external else label


def train(size: Row, vocab_size: int, ctx_len: int, batch_size: int, repeats: int) -> Report:
    """Tokens/s, share of the machine's matmul rate and peak memory of training steps.

    Args:
        size: the keys of a yaml of conf/size.
    """
    check_counts(vocab_size=vocab_size, ctx_len=ctx_len, batch_size=batch_size, repeats=repeats)
    arguments = at_size(size, vocab_size, ctx_len)
    candidates = [Candidate(family, False, p) for p in DTYPES for family in arguments]
    for family, given in arguments.items():
        if hugging_face(empty(family, given)) is not None:
            candidates.append(Candidate(family, True, "32-true"))
    calls: dict[Any, Callable[[], object]] = {
        one: training_step(one, arguments[one.family], batch_size) for one in candidates
    }
    for precision, dtype in DTYPES.items():
        for n in MATMUL_SIZES:
            a = torch.randn(n, n).to(dtype)
            calls[precision, n] = partial(torch.mm, a, a)
    seconds = interleaved(calls, repeats, warmup=2)
    limits = {p: max(2 * n**3 / seconds.median((p, n)) for n in MATMUL_SIZES) for p in DTYPES}
    rows = []
    for one in candidates:
        model = empty(one.family, arguments[one.family])
        step_s, n_tokens = seconds.median(one), batch_size * ctx_len
        rate = step_flops(model, batch_size) / step_s
        row: Row = {"model": one.label, "precision": one.precision}
        row |= {"parameters": count_parameters(model)["total"], "step_s": step_s}
        row |= {"tokens_per_s": n_tokens / step_s, "GFLOP/s": rate / 1e9}
        row |= {"of limit": rate / limits[one.precision]}
        toy = {"candidate": one, "arguments": None, "batch_size": 2}
        full = {"candidate": one, "arguments": arguments[one.family], "batch_size": batch_size}
        row["peak_mem_bytes"] = peak_memory(training_step, toy, full)
        rows.append(row)
    shape = f"L={size['n_layer']} C={size['n_embd']} V={vocab_size} T={ctx_len} B={batch_size}"
    rates = [{"precision": p, "GFLOP/s": limit / 1e9} for p, limit in limits.items()]
    tables = {f"Training step, {shape}": rows, "Tokens/s, ratios": ratios(candidates, seconds)}
    return Report(tables | {"Limit: square matrix products": rates}, list(NOTES))


def ratios(candidates: list[Candidate], seconds: Timings) -> list[Row]:
    """Tokens/s of one model over another's, for each two in the same precision."""
    return [
        {"models": f"{a.label} / {b.label}", "precision": a.precision, "ratio": seconds.ratio(b, a)}
        for a, b in combinations(candidates, 2)
        if a.precision == b.precision
    ]


def empty(family: str, arguments: Row) -> LanguageModel:
    """A family's model without memory."""
    with torch.device("meta"):
        return families()[family].model(**arguments)


def step_flops(model: LanguageModel, batch_size: int) -> int:
    """FLOPs of the matrix products of one training step: forward, and twice that for backward."""
    return 3 * model.matmul_flops_per_token(model.ctx_len) * batch_size * model.ctx_len


def training_step(
    candidate: Candidate, arguments: Row | None, batch_size: int
) -> Callable[[], Tensor]:
    """A new model, ready to take a step: forward, loss, backward, AdamW; the loss is returned.

    Args:
        arguments: of the family's constructor; None makes its toy.
    """
    torch.manual_seed(0)
    family = families()[candidate.family]
    with torch.device("meta" if candidate.external else "cpu"):
        model = family.toy() if arguments is None else family.model(**arguments)
    external = hugging_face(model) if candidate.external else None
    trained: nn.Module = external or model
    if external is None:
        optimizer = make_optimizer(model, peak_lr=1e-3, lr_scale=False, **ADAMW)
    else:
        optimizer = torch.optim.AdamW(external.parameters(), lr=1e-3, **ADAMW)
    trained.train()
    tokens = torch.randint(model.vocab_size, (batch_size, model.ctx_len + 1))
    ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def loss() -> Tensor:
        if external is None:
            return cross_entropy(model.features(ids)[0], model.head, targets, "full")[0]
        logits = external(ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=candidate.precision != "32-true"):
            nats = loss()
        optimizer.zero_grad(set_to_none=True)
        nats.backward()
        optimizer.step()
        return nats.detach()

    return step
