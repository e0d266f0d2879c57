"""Sampling, and generation over the contract: one path for every architecture.

B rows still running, T prompt length after padding, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.language_model import LanguageModel, select_rows


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Next ids (B,) from logits (B, V): the likeliest at temperature 0, else drawn.

    Only the `top_k` likeliest tokens, and of those the fewest whose probabilities reach `top_p`,
    can be drawn. Raises ValueError for settings that leave nothing to draw.
    """
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature {temperature} must be >= 0, and top_k {top_k} >= 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if temperature == 0:
        return logits.argmax(-1)
    scores, ids = (logits.float() / temperature).sort(dim=-1, descending=True, stable=True)
    p = scores.softmax(-1)
    if top_k is not None:
        p[:, top_k:] = 0
    if top_p is not None:
        p = p / p.sum(-1, keepdim=True)
        p[p.cumsum(-1) - p >= top_p] = 0  # what comes before a token already reaches top_p
    drawn = torch.multinomial(p, 1, generator=generator)
    return ids.gather(-1, drawn).squeeze(-1)


def pad_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts -> ids (B, T) filled with 0 on the left, and n_pad (B,) or None if none was."""
    lengths = [len(prompt) for prompt in prompts]
    T = max(lengths)
    ids = torch.zeros(len(prompts), T, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, T - len(prompt) :] = torch.tensor(prompt)
    n_pad = None if min(lengths) == T else T - torch.tensor(lengths, device=device)
    return ids.to(device), n_pad


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    eot_id: int | None = None,
    vocab_size: int | None = None,
    stop: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continue each prompt by up to max_new_tokens ids; the prompts may differ in length.

    Only ids below `vocab_size` are drawn: a model may have more than its tokenizer knows.
    A row ends before `eot_id`, or once `stop(row, its new ids)`, called after every new id, is
    true: a caller streams and looks for stop strings there. Raises ValueError for a prompt that
    is empty or not of the model's vocabulary, and past the model's max_ctx.
    """
    _check(model, prompts, max_new_tokens)
    new: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens == 0:
        return new
    ids, n_pad = pad_left(prompts, model.emb.weight.device)
    state = model.init_state(len(prompts), n_pad)
    running = list(range(len(prompts)))
    while True:
        x, after = model.features(ids, state)
        assert after is not None  # state in, state out
        logits = model.head(x[:, -1])[:, :vocab_size]
        drawn = sample(logits, temperature, top_k, top_p, generator)
        kept = []
        for place, (row, token) in enumerate(zip(running, drawn.tolist(), strict=True)):
            if token == eot_id:
                continue
            new[row].append(token)
            stopped = stop is not None and stop(row, new[row])
            if not stopped and len(new[row]) < max_new_tokens:
                kept.append(place)
        if not kept:
            return new
        if len(kept) < len(running):
            rows = torch.tensor(kept, device=ids.device)
            after, drawn = select_rows(after, rows), drawn[rows]
            running = [running[place] for place in kept]
        ids, state = drawn[:, None], after


def _check(model: LanguageModel, prompts: list[list[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty; give at least one token to start from")
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise ValueError(
                f"prompt {row} has ids from {min(prompt)} to {max(prompt)}; "
                f"the model's vocabulary is 0 to {model.vocab_size - 1}"
            )
    # the last new id is never fed back
    length = max(map(len, prompts), default=0) + max_new_tokens - 1
    if model.max_ctx is not None and length > model.max_ctx:
        raise ValueError(
            f"the longest prompt and {max_new_tokens} new tokens make {length} positions; "
            f"this {model.family} model ends at {model.max_ctx}"
        )
