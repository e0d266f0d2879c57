"""Log-probabilities of answers after contexts, for any model of the contract.

What several requests begin with (`prefix_tree.py`) is run once: its state (RWKV) or KV cache (GPT)
is forked for each continuation. Logits are computed only where a token of an answer is predicted.

B batch, T time, C n_embd, V vocabulary, N scored positions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.evaluation.prefix_tree import NOTHING, Segment, Tokens, plan
from models.generation import pad_left
from models.language_model import LanguageModel, State, select_rows

SMALL_PASS = 64  # tokens that take about as long as starting a pass
LOGITS_AT_ONCE = 2**24  # elements of (N, V) held at a time: 64 MiB in float32

Item = TypeVar("Item")
Answer = tuple[float, bool]  # log P in nats, and whether greedy decoding gives it


class Unread(NamedTuple):
    """Features (N, C) whose logits are still to be computed, at what they must predict (N,)."""

    x: Tensor
    wanted: Tensor
    owners: list[Segment]


class Scorer:
    """Scores answers with one model.

    Args:
        model: in evaluation mode, on the device and with the type of weights it is to run in;
            log-probabilities are float32, summed in float64, whatever these are.
        batch_tokens: most tokens, padding included, in one forward pass; a single longer sequence
            runs in chunks that pass the state on.

    Raises:
        ValueError: for batch_tokens below 1.
    """

    def __init__(self, model: LanguageModel, batch_tokens: int = 16384):
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
        self.model = model
        self.batch_tokens = batch_tokens
        self.device = model.emb.weight.device
        self._grows = model.state_bytes(1, 2) > model.state_bytes(1, 1)

    @torch.inference_mode()
    def score(
        self,
        requests: Sequence[tuple[Tokens, Tokens]],
        finished: Callable[[dict[int, Answer]], object] = lambda answers: None,
    ) -> list[Answer]:
        """log P(answer | context) and greediness of each request.

        Contexts and answers hold at least one token each, and together at most max_ctx + 1;
        equal requests are run once. `finished` gets requests, by their index, as they are done.

        Raises ValueError where the logits are not finite, as after an overflow in float16.
        """
        indices, roots = plan(requests)
        self._scores = torch.zeros(len(indices), dtype=torch.float64)
        self._greedy = torch.ones(len(indices), dtype=torch.bool)
        self._unread: list[Unread] = []
        self._n_run = 0  # tokens, since answers were last settled
        answers: list[Answer] = [(0.0, True)] * len(requests)
        waiting: list[Segment] = []
        at_once = max(1, LOGITS_AT_ONCE // self.model.vocab_size)

        def settle() -> None:
            self._read(at_once)
            self._n_run = 0
            new = {
                index: (self._scores[segment.first].item(), bool(self._greedy[segment.first]))
                for segment in waiting
                for index in indices[segment.first]
            }
            for index, answer in new.items():
                answers[index] = answer
            waiting.clear()
            finished(new)

        for done in self._run(roots):
            waiting += done
            n_unread = sum(len(one.wanted) for one in self._unread)
            if n_unread >= at_once or self._n_run >= self.batch_tokens:
                settle()
        settle()
        return answers

    def _run(self, roots: list[Segment]) -> Iterator[list[Segment]]:
        """Run a whole tree; segments that end a request, as they are done."""
        alone = [root for root in roots if not root.children]
        for batch in batched(alone, n_inputs, self.batch_tokens):
            self._add(batch, None)
            yield batch
        for batch in self._root_batches([root for root in roots if root.children]):
            _, n_pad = pad_left([root.inputs for root in batch], torch.device("cpu"))
            state = self._add(batch, self.model.init_state(len(batch), n_pad), padded="left")
            yield from self._descend(batch, state, n_inputs(batch[0]))

    def _descend(
        self, parents: list[Segment], state: State | None, n_before: int
    ) -> Iterator[list[Segment]]:
        """Run what follows the parents, which the rows of `state` have seen: n_before tokens."""
        assert state is not None  # state in, state out
        forks = [(row, child) for row, one in enumerate(parents) for child in one.children]
        ends = [(row, child) for row, child in forks if not child.children]
        held = n_before if self._grows else 0  # a forked KV cache holds the parent once more

        def length_of(fork: tuple[int, Segment]) -> int:
            return n_inputs(fork[1])

        for batch in batched(ends, length_of, self.batch_tokens, held):
            segments = [child for _, child in batch]
            if n_inputs(segments[0]):  # else all of them end where their parent does
                self._add(segments, self._forked(state, batch))
            yield segments
        inner: dict[int, list[tuple[int, Segment]]] = {}
        for fork in forks:  # padding would leave a trace in the state behind it: equal lengths only
            if fork[1].children:
                inner.setdefault(n_inputs(fork[1]), []).append(fork)
        for n, alike in inner.items():
            for batch in batched(alike, length_of, self.batch_tokens, held):
                segments = [child for _, child in batch]
                after = self._add(segments, self._forked(state, batch))
                yield from self._descend(segments, after, n_before + n)

    def _forked(self, state: State, forks: list[tuple[int, Segment]]) -> State:
        return select_rows(state, torch.tensor([row for row, _ in forks], device=self.device))

    def _root_batches(self, roots: list[Segment]) -> Iterator[list[Segment]]:
        """Roots to run together: as `batched`, and within max_ctx to all ends once padded."""
        limit = self.model.max_ctx
        for batch in batched(roots, n_inputs, self.batch_tokens):
            fitting: list[Segment] = []
            for root in batch:
                together = [*fitting, root]
                rest = max(one.reach - n_inputs(one) for one in together)
                if fitting and limit is not None and n_inputs(together[0]) + rest > limit:
                    yield fitting
                    together = [root]
                fitting = together
            yield fitting

    def _add(
        self, segments: list[Segment], state: State | None, padded: str = "right"
    ) -> State | None:
        """Run segments as rows, keep what is to be scored of them; the state behind them.

        Padding on the right does no harm where nothing follows: a causal model never looks there.
        """
        B, T = len(segments), max(map(n_inputs, segments))
        ids = torch.zeros(B, T, dtype=torch.int64)
        targets = torch.full((B, T), NOTHING)
        for row, one in enumerate(segments):
            start = T - n_inputs(one) if padded == "left" else 0
            ids[row, start : start + n_inputs(one)] = torch.tensor(one.inputs)
            targets[row, start : start + n_inputs(one)] = torch.tensor(one.targets)
        self._n_run += B * T
        after = state
        for chunk, x, after in self._chunks(ids, state):  # noqa: B007, the last one counts
            b, t = (targets[:, chunk] != NOTHING).nonzero(as_tuple=True)
            if len(b):
                x = x[b.to(self.device), t.to(self.device)]  # (N, C)
                owners = [segments[row] for row in b.tolist()]
                self._unread.append(Unread(x, targets[:, chunk][b, t], owners))
        return after

    def _read(self, at_once: int) -> None:
        """Add up what the features kept so far predict; few large products with the head."""
        if not self._unread:
            return
        x = torch.cat([one.x for one in self._unread])
        wanted = torch.cat([one.wanted for one in self._unread])
        owners = [owner for one in self._unread for owner in one.owners]
        self._unread = []
        for start in range(0, len(x), at_once):
            piece = slice(start, start + at_once)
            for owner, hit, logp in zip(
                owners[piece], *self._predict(x[piece], wanted[piece]), strict=True
            ):
                self._scores[owner.first : owner.last] += logp
                if not hit:
                    self._greedy[owner.first : owner.last] = False

    def _predict(self, x: Tensor, wanted: Tensor) -> tuple[list[bool], list[float]]:
        """Features (N, C), ids (N,) -> are they the likeliest, log-probabilities."""
        wanted = wanted.to(self.device)
        logits = self.model.head(x).float()  # (N, V)
        logp = -F.cross_entropy(logits, wanted, reduction="none")  # twice as fast as logsumexp
        if not logp.isfinite().all():
            raise ValueError("the model's logits are not finite: try dtype=float32, check weights")
        return (logits.argmax(-1) == wanted).tolist(), logp.tolist()

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
            x, state = self.model.features(ids[:, chunk].to(self.device), state)
            yield chunk, x, state


def n_inputs(segment: Segment) -> int:
    """Tokens to run for a segment."""
    return len(segment.inputs)


def batched(
    items: list[Item], length: Callable[[Item], int], limit: int, held: int = 0
) -> Iterator[list[Item]]:
    """Items longest first, as many together as stay within `limit` when padded to the longest.

    Fewer where padding would cost more than another pass. `held` is what each item holds besides.
    """
    batch: list[Item] = []
    longest = real = 0
    for item in sorted(items, key=length, reverse=True):
        n = length(item)
        too_many = (held + longest) * (len(batch) + 1) > limit
        padding = longest * (len(batch) + 1) - real - n
        if batch and (too_many or padding > SMALL_PASS + (real + n) // 4):
            yield batch
            batch, real = [], 0
        if not batch:
            longest = n
        batch.append(item)
        real += n
    if batch:
        yield batch
