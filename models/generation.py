"""Sampling, and generation over the contract: one path for every architecture.

B rows still running, T prompt length after padding, C n_embd, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.language_model import LanguageModel, State, select_rows

CHUNK_LEN = 512  # tokens of a prompt in one forward pass
FEW = 1024  # likeliest ids that mostly hold any top_p


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen from logits.

    The logits of ids that were seen are divided by `repetition_penalty` where positive and
    multiplied by it where negative (Keskar et al. 2019, arXiv 1909.05858, as it is used today).
    Then the likeliest id is taken at `temperature` 0; else one is drawn from the `top_k` likeliest,
    and of those from the fewest whose probabilities reach `top_p`.

    Raises ValueError for settings that leave nothing to draw.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a number from 0 on, got {self.temperature}")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k must be a whole number of at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty must be above 0 (1: none), got {self.repetition_penalty}"
            )


class Past(NamedTuple):
    """A state to go on from, and the ids that each of its rows has read."""

    state: State
    ids: list[list[int]]


Generators = torch.Generator | Sequence[torch.Generator] | None


def sample(
    logits: Tensor, how: Sampling, generator: Generators = None, seen: Tensor | None = None
) -> Tensor:
    """Next ids (B,) from logits (B, V); `seen` (B, V) bool marks the ids that are penalised.

    Each row takes one uniform number from its own generator, or all from one, and the id in whose
    share of the probability it falls: shares lie in the order of ids, so that logits which differ
    by a rounding (those of a row alone and in a batch) draw the same.
    """
    if seen is not None and how.repetition_penalty != 1:
        penalty = how.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    if how.temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()  # at most 0 before they are divided: no temperature overflows
    p = ((logits - logits.amax(-1, keepdim=True)) / how.temperature).softmax(-1)
    if how.top_k is not None or (how.top_p is not None and how.top_p < 1):
        p = _likeliest(p, how.top_k, how.top_p)
    bounds = p.cumsum(-1)
    bounds = bounds / bounds[:, -1:]  # ends at 1, which no uniform number reaches
    u = _uniform(len(p), generator).to(p.device)
    return torch.searchsorted(bounds, u[:, None], right=True).squeeze(-1)


def _likeliest(p: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Probabilities (B, V) with 0 outside the top_k likeliest, and outside top_p of those."""
    V = p.shape[-1]
    top, ids = p.topk(min(top_k or FEW, V), dim=-1)
    if top_p is not None:
        if top_k is None and (top.sum(-1) < top_p).any():
            top, ids = p.topk(V, dim=-1)  # all, which takes long for a large vocabulary
        share = top_p if top_k is None else top_p * top.sum(-1, keepdim=True)
        before = top.cumsum(-1) - top  # of likelier ids
        top = top.masked_fill(before >= share, 0)
    return torch.zeros_like(p).scatter_(-1, ids, top)


def _uniform(n: int, generator: Generators) -> Tensor:
    """Uniform numbers (n,) float64 in [0, 1): from one generator, or one from each of n."""
    if generator is None or isinstance(generator, torch.Generator):
        device = None if generator is None else generator.device
        return torch.rand(n, dtype=torch.float64, generator=generator, device=device)
    return torch.cat(
        [torch.rand(1, dtype=torch.float64, generator=g, device=g.device) for g in generator]
    )


def pad_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts -> ids (B, T) filled with 0 on the left, and n_pad (B,) or None if none was."""
    lengths = [len(prompt) for prompt in prompts]
    T = max(lengths)
    ids = torch.zeros(len(prompts), T, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, T - len(prompt) :] = torch.tensor(prompt)
    n_pad = None if min(lengths) == T else T - torch.tensor(lengths, device=device)
    return ids.to(device), n_pad


def prefill(
    model: LanguageModel, ids: Tensor, state: State, chunk_len: int = CHUNK_LEN
) -> tuple[Tensor, State]:
    """Read ids (B, T) in chunks of at most chunk_len: features of the last (B, C), state after.

    No more than one chunk's activations are held at a time. Raises ValueError for chunk_len < 1.
    """
    if chunk_len < 1:
        raise ValueError(f"chunk_len must be at least 1, got {chunk_len}")
    for chunk in ids.split(chunk_len, dim=1):
        x, after = model.features(chunk, state)
        assert after is not None  # state in, state out
        state = after
    return x[:, -1], state


def reset_rows(model: LanguageModel, state: State, rows: Tensor, n_read: int) -> State:
    """A state of n_read positions whose rows (N,) int64 have read nothing; the others stay.

    A row of fixed size is as it was at first. In a cache, its positions so far become padding: it
    starts anew, but the batch as a whole stays within the model's max_ctx.
    """
    fresh = model.init_state(len(rows))
    fixed = all(state[name].shape[1:] == value.shape[1:] for name, value in fresh.items())
    B = len(next(iter(state.values())))
    n_pad = state.get("n_pad", torch.zeros(B, dtype=torch.int64, device=rows.device))
    new = dict(state)
    if fixed:
        new |= {name: state[name].index_copy(0, rows, value) for name, value in fresh.items()}
    if "n_pad" in state or not fixed:
        new["n_pad"] = n_pad.index_fill(0, rows, 0 if fixed else n_read)
    return new


class Generation:
    """Prompts that a model continues together, one id a step, and the state they are in.

    `rows` are the numbers of the prompts still running, `state` is theirs in that order: it has
    read `n_read` positions, which is all but the ids that the last step drew.

    Args:
        prompts: ids, of any lengths; together with `past` of one length.
        generator: one for all rows, or one for each prompt: then a row gets what it gets alone.
        vocab_size: only ids below it are drawn; a model may have more than its tokenizer knows.
        past: a state to go on from, a row for each prompt.
        chunk_len: most tokens of a prompt read at a time.

    Raises:
        ValueError: for a prompt that is empty or not of the model's vocabulary.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        generator: Generators = None,
        vocab_size: int | None = None,
        past: Past | None = None,
        chunk_len: int = CHUNK_LEN,
    ):
        check_prompts(model, prompts)
        device = model.emb.weight.device
        self._unread, n_pad = pad_left(prompts, device)
        if past is not None and (n_pad is not None or len(past.ids) != len(prompts)):
            raise ValueError("a state needs one prompt for each of its rows, all of one length")
        self.model = model
        self.sampling = sampling
        self.rows = list(range(len(prompts)))
        self.state = past.state if past else model.init_state(len(prompts), n_pad)
        self.n_read = len(past.ids[0]) if past else 0
        self._generator = generator
        self._vocab_size = vocab_size
        self._chunk_len = chunk_len
        self._seen = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(len(prompts), model.vocab_size, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self._seen[row, prompt + (past.ids[row] if past else [])] = True
            self._seen = self._seen[:, :vocab_size].to(device)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """Read what is unread (first the prompts) and draw: (row, id) for each running row.

        Raises ValueError when the logits are not finite, as after an overflow in float16.
        """
        x, state = prefill(self.model, self._unread, self.state, self._chunk_len)
        if "n_pad" in state and not state["n_pad"].any():
            state = {name: value for name, value in state.items() if name != "n_pad"}
        self.state = state
        self.n_read += self._unread.shape[1]
        logits = self.model.head(x)[:, : self._vocab_size]
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite: try dtype=float32, check weights")
        drawn = sample(logits, self.sampling, self._generator, self._seen)
        self._unread = drawn[:, None]
        if self._seen is not None:
            self._seen.scatter_(1, self._unread, True)
        return list(zip(self.rows, drawn.tolist(), strict=True))

    @torch.inference_mode()
    def end(self, rows: Sequence[int]) -> None:
        """Go on without these rows; the last to end stay in `state`."""
        kept = [place for place, row in enumerate(self.rows) if row not in rows]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in kept]
        if not kept:
            return
        places = torch.tensor(kept, device=self._unread.device)
        self.state = select_rows(self.state, places)
        self._unread = self._unread[places]
        if self._seen is not None:
            self._seen = self._seen[places]
        if self._generator is not None and not isinstance(self._generator, torch.Generator):
            self._generator = [self._generator[place] for place in kept]


def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    generator: Generators = None,
    eot_id: int | None = None,
    vocab_size: int | None = None,
    stop: Callable[[int, list[int]], bool] | None = None,
    chunk_len: int = CHUNK_LEN,
) -> list[list[int]]:
    """Continue each prompt by up to max_new_tokens ids; the prompts may differ in length.

    A row ends before `eot_id`, or once `stop(row, its new ids)`, called after every new id, is
    true. See `Sampling` and `Generation` for the rest and for what raises ValueError; so does
    what would go past the model's max_ctx, before anything is computed.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    check_prompts(model, prompts)
    check_room(model, max(map(len, prompts), default=0), max_new_tokens)
    new: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens == 0:
        return new
    going = Generation(
        model, prompts, sampling,
        generator=generator, vocab_size=vocab_size, chunk_len=chunk_len,
    )  # fmt: skip
    while going.rows:
        ended = []
        for row, token in going.step():
            if token == eot_id:
                ended.append(row)
                continue
            new[row].append(token)
            stopped = stop is not None and stop(row, new[row])
            if stopped or len(new[row]) == max_new_tokens:
                ended.append(row)
        going.end(ended)
    return new


def check_prompts(model: LanguageModel, prompts: list[list[int]]) -> None:
    """Raise ValueError for a prompt that is empty or has ids the model does not know."""
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty; give at least one token to start from")
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise ValueError(
                f"prompt {row} has ids from {min(prompt)} to {max(prompt)}; "
                f"the model's vocabulary is 0 to {model.vocab_size - 1}"
            )


def check_room(model: LanguageModel, n_tokens: int, max_new_tokens: int) -> None:
    """Raise ValueError if n_tokens and max_new_tokens after them go past the model's max_ctx."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    length = n_tokens + max(max_new_tokens - 1, 0)  # the last new id is never fed back
    if model.max_ctx is not None and length > model.max_ctx:
        raise ValueError(
            f"{n_tokens} tokens and {max_new_tokens} new ones make {length} positions; "
            f"this {model.family} model ends at {model.max_ctx}"
        )
