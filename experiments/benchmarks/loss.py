"""bench=loss: holding the logits whole, or never: time and peak memory of head and cross-entropy.

N tokens, C n_embd, V vocabulary.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import nn

from experiments.benchmarks.measure import Report, check_counts, interleaved, peak_memory
from experiments.training.loss import cross_entropy

TOY = {"n_tokens": 8, "n_embd": 8, "vocab_size": 16}


def loss(n_tokens: int, n_embd: int, vocab_size: int, repeats: int) -> Report:
    """Time and peak memory of loss=full and loss=chunked, in float32 and under bf16 autocast."""
    sizes = {"n_tokens": n_tokens, "n_embd": n_embd, "vocab_size": vocab_size}
    check_counts(**sizes, repeats=repeats)
    cases = list(product(("32-true", "bf16-mixed"), ("full", "chunked")))
    seconds = interleaved(
        {case: loss_step(*case, n_tokens, n_embd, vocab_size) for case in cases}, repeats
    )
    rows = []
    for precision, kind in cases:
        case = {"precision": precision, "kind": kind}
        row = {"precision": precision, "loss": kind, "seconds": seconds.median((precision, kind))}
        row["time over full"] = seconds.ratio((precision, kind), (precision, "full"))
        row["peak_mem_bytes"] = peak_memory(loss_step, case | TOY, case | sizes)
        rows.append(row)
    title = f"Head and cross-entropy, forward and backward, {n_tokens} x {n_embd} x {vocab_size}"
    note = (
        "Memory: peak resident bytes in a fresh process, with features, head and their gradients "
        "(float32), without the libraries."
    )
    return Report({title: rows}, [note])


def loss_step(
    precision: str, kind: str, n_tokens: int, n_embd: int, vocab_size: int
) -> Callable[[], None]:
    """Forward and backward of one loss; gradients of the features and of the head."""
    torch.manual_seed(0)
    x = torch.randn(1, n_tokens, n_embd, requires_grad=True)
    head = nn.Linear(n_embd, vocab_size, bias=False)
    targets = torch.randint(vocab_size, (1, n_tokens))

    def step() -> None:
        x.grad = head.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            nats = cross_entropy(x, head, targets, kind)[0]
        nats.backward()

    return step
