"""Log-probabilities of answers after contexts, for any model of the contract.

A context that several answers share is run once and its state (RWKV) or KV cache (GPT) is forked
for each answer; logits are computed only where a token of an answer is predicted.

B batch, T time, C n_embd, V vocabulary, N scored positions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from models.generation import pad_left
from models.language_model import LanguageModel, State, select_rows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOGITS_AT_ONCE = 2**24  # elements of (N, V) held at a time: 64 MiB in float32

Tokens = tuple[int, ...]
Item = TypeVar("Item")


class Row(NamedTuple):
    """One sequence to run: its last inputs predict `targets`, whose sum goes to `answer`."""

    inputs: Tokens
    targets: Tokens
    answer: int


class Shared(NamedTuple):
    """A context that several rows continue; each row starts with what follows it."""

    context: Tokens
    rows: list[Row]


class Scorer:
    """Scores answers with one model.

    Args:
        model: in evaluation mode, on the device it is to run on.
        dtype: float32, or what autocast computes matrix products in; log-probabilities are
            float32, summed in float64, either way.
        batch_tokens: most tokens, padding included, in one forward pass; a single longer sequence
            runs in chunks that pass the state on.

    Raises:
        ValueError: for another dtype, or batch_tokens below 1.
    """

    def __init__(self, model: LanguageModel, dtype: str = "float32", batch_tokens: int = 16384):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
        self.model = model
        self.dtype = dtype
        self.batch_tokens = batch_tokens
        self.device = model.emb.weight.device

    @torch.inference_mode()
    def score(
        self, requests: Sequence[tuple[Tokens, Tokens]], advance: Callable[[int], object]
    ) -> list[tuple[float, bool]]:
        """(log P(answer | context) in nats, whether each of its tokens is the likeliest).

        Contexts and answers hold at least one token each, and together at most max_ctx + 1;
        equal requests are run once. `advance(n)` is called when n more of them are done.
        """
        # context -> answer -> its number
        groups: dict[Tokens, dict[Tokens, int]] = {}
        numbers: list[int] = []
        total = 0
        for context, answer in requests:
            numbers.append(groups.setdefault(context, {}).setdefault(answer, total))
            total = max(total, numbers[-1] + 1)
        scores = torch.zeros(total, dtype=torch.float64)
        greedy = torch.ones(total, dtype=torch.bool)
        alone, shared = plan(groups)
        for rows in batched(alone, row_length, self.batch_tokens):
            self._score_rows(rows, None, scores, greedy)
            advance(len(rows))
        for some in shared_batches(shared, self.batch_tokens, self.model.max_ctx):
            self._score_shared(some, scores, greedy)
            advance(sum(len(one.rows) for one in some))
        answers = list(zip(scores.tolist(), greedy.tolist(), strict=True))
        return [answers[number] for number in numbers]

    def autocast(self) -> torch.autocast:
        """The context in which the model runs."""
        enabled = self.dtype != "float32"
        return torch.autocast(self.device.type, DTYPES[self.dtype] if enabled else None, enabled)

    def _score_shared(self, some: list[Shared], scores: Tensor, greedy: Tensor) -> None:
        """Run the contexts together, then their rows from forks of the states."""
        ids, n_pad = pad_left([list(one.context) for one in some], torch.device("cpu"))
        state: State | None = self.model.init_state(len(some), n_pad)
        for *_, after in self._chunks(ids, state):
            state = after
        assert state is not None  # state in, state out
        forks = [(owner, row) for owner, one in enumerate(some) for row in one.rows]
        length = ids.shape[1]  # a forked KV cache holds the context once more
        for batch in batched(forks, lambda fork: length + row_length(fork[1]), self.batch_tokens):
            owners = torch.tensor([owner for owner, _ in batch], device=self.device)
            rows = [row for _, row in batch]
            self._score_rows(rows, select_rows(state, owners), scores, greedy)

    def _score_rows(
        self, rows: Sequence[Row], state: State | None, scores: Tensor, greedy: Tensor
    ) -> None:
        """Add each row's log-probabilities to `scores`, and clear `greedy` where it missed."""
        B, T = len(rows), max(map(row_length, rows))
        ids = torch.zeros(B, T, dtype=torch.int64)
        targets = torch.full((B, T), -1)
        for i, row in enumerate(rows):  # padding on the right: a causal model never looks there
            n = len(row.inputs)
            ids[i, :n] = torch.tensor(row.inputs)
            targets[i, n - len(row.targets) : n] = torch.tensor(row.targets)
        answers = torch.tensor([row.answer for row in rows])
        step = max(1, LOGITS_AT_ONCE // self.model.vocab_size)
        for chunk, x, _ in self._chunks(ids, state):
            b, t = (targets[:, chunk] >= 0).nonzero(as_tuple=True)
            wanted = targets[:, chunk][b, t]
            x = x[b.to(self.device), t.to(self.device)]  # (N, C)
            for start in range(0, len(b), step):
                piece = slice(start, start + step)
                hit, logp = self._predict(x[piece], wanted[piece])
                owners = answers[b[piece]]
                scores.index_add_(0, owners, logp)
                greedy[owners[~hit]] = False

    def _predict(self, x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, C), ids (N,) -> are they the likeliest (N,), log-probabilities (N,)."""
        wanted = wanted.to(self.device)
        with self.autocast():
            logits = self.model.head(x)  # (N, V)
        logits = logits.float()
        logp = logits.gather(-1, wanted[:, None]).squeeze(-1) - logits.logsumexp(-1)
        return (logits.argmax(-1) == wanted).cpu(), logp.cpu().double()

    def _chunks(
        self, ids: Tensor, state: State | None
    ) -> Iterator[tuple[slice, Tensor, State | None]]:
        """Ids (B, T) in chunks of at most batch_tokens: where, features (B, t, C), state after."""
        B, T = ids.shape
        size = max(1, self.batch_tokens // B)
        if size < T and state is None:
            state = self.model.init_state(B)
        for start in range(0, T, size):
            chunk = slice(start, start + size)
            with self.autocast():
                x, state = self.model.features(ids[:, chunk].to(self.device), state)
            yield chunk, x, state


def row_length(row: Row) -> int:
    """Tokens to run for a row."""
    return len(row.inputs)


def plan(groups: dict[Tokens, dict[Tokens, int]]) -> tuple[list[Row], list[Shared]]:
    """Split requests into rows that run whole, and contexts that run once for several rows."""
    alone: list[Row] = []
    shared: list[Shared] = []
    for context, answers in groups.items():
        fork = len(context) > 1 and len(answers) > 1
        head = context[-1:] if fork else context  # its last token predicts the first of each
        rows = [Row(head + answer[:-1], answer, number) for answer, number in answers.items()]
        if fork:
            shared.append(Shared(context[:-1], rows))
        else:
            alone += rows
    return alone, shared


def batched(items: list[Item], length: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Items longest first, as many together as stay within `limit` when padded to the longest."""
    items = sorted(items, key=length, reverse=True)
    start = 0
    while start < len(items):
        n = max(1, limit // max(1, length(items[start])))
        yield items[start : start + n]
        start += n


def shared_batches(shared: list[Shared], limit: int, max_ctx: int | None) -> Iterator[list[Shared]]:
    """Contexts to run together: padded within `limit`, and within max_ctx before any row."""
    batch: list[Shared] = []
    for one in sorted(shared, key=lambda one: len(one.context), reverse=True):
        together = [*batch, one]
        n_context = len(together[0].context)
        longest = n_context + max(row_length(row) for each in together for row in each.rows)
        too_long = max_ctx is not None and longest > max_ctx
        if batch and (too_long or len(together) * n_context > limit):
            yield batch
            together = [one]
        batch = together
    if batch:
        yield batch
