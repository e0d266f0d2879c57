"""What requests have in common, found by sorting them: a context and its answers, the few-shot
examples of all questions, a passage and its questions, the words that answers begin with.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FEWEST_SHARED = 4  # tokens that are worth a fork
NOTHING = -1  # the target of an input whose prediction nobody asks for

Tokens = tuple[int, ...]


class Segment(NamedTuple):
    """Tokens to run behind those of the segment's parent, for the requests first <= i < last.

    Each input predicts the target at the same index (NOTHING: not asked), whose log-probability
    counts for all these requests. `reach` is the longest way down, its own inputs included. A
    segment without children ends one request, `first`.
    """

    inputs: list[int]
    targets: list[int]
    first: int
    last: int
    reach: int
    children: list["Segment"]


def plan(requests: Sequence[tuple[Tokens, Tokens]]) -> tuple[list[list[int]], list[Segment]]:
    """Merge the common beginnings of (context, answer) pairs.

    Returns:
        For each different pair, in order, the indices at which it stands; and the tree's roots.

    A request is fed all but its answer's last token. Two share what they are fed as long as they
    also ask for the same predictions.
    """
    indices: dict[bytes, list[int]] = {}
    for index, (context, answer) in enumerate(requests):
        fed = np.array(context + answer[:-1], dtype=np.int64)
        asked = np.full(len(fed), NOTHING, dtype=np.int64)
        asked[len(context) - 1 :] = answer
        # big-endian, so that bytes sort as numbers
        indices.setdefault((fed << 32 | asked + 1).astype(">i8").tobytes(), []).append(index)
    ordered = sorted(indices)
    return [indices[key] for key in ordered], _roots([np.frombuffer(k, ">i8") for k in ordered])


class _Group(NamedTuple):
    """Sorted sequences first <= i < last that begin alike, to be made into segments.

    They share (at least) their first `shared` elements, of which the segments above hold the first
    `covered`. The segments made of them go into `siblings`.
    """

    first: int
    last: int
    covered: int
    shared: int
    siblings: list[Segment]


def _roots(sequences: list[np.ndarray]) -> list[Segment]:
    """The tree over sorted sequences of (fed, asked)."""
    lengths = np.array([len(one) for one in sequences])
    with_previous = np.array([0, *map(_n_common, sequences, sequences[1:])])
    roots: list[Segment] = []
    todo = [_Group(0, len(sequences), 0, 0, roots)] if sequences else []
    while todo:  # a stack, as the tree may be deeper than Python's recursion
        group = todo.pop()
        # part the group where a sequence shares no more with its predecessor than all do
        inner = with_previous[group.first + 1 : group.last]
        borders = (group.first + 1 + np.flatnonzero(inner <= group.shared)).tolist()
        for first, last in zip([group.first, *borders], [*borders, group.last], strict=True):
            if last == first + 1:
                end = int(lengths[first])
            else:
                end = int(with_previous[first + 1 : last].min())
                n_rest = float(lengths[first:last].mean()) - end
                if not _worthwhile(end - group.covered, n_rest):
                    todo.append(_Group(first, last, group.covered, end, group.siblings))
                    continue
            reach = int(lengths[first:last].max()) - group.covered
            inputs, targets = _split(sequences[first][group.covered : end])
            segment = Segment(inputs, targets, first, last, reach, [])
            group.siblings.append(segment)
            if last > first + 1:
                todo.append(_Group(first, last, end, end, segment.children))
    return roots


def _worthwhile(n_shared: int, n_rest: float) -> bool:
    # running on from forks costs passes of few tokens; a few words in common do not pay for them
    return n_shared >= FEWEST_SHARED and n_shared >= n_rest / 2


def _split(sequence: np.ndarray) -> tuple[list[int], list[int]]:
    return (sequence >> 32).tolist(), ((sequence & 0xFFFFFFFF) - 1).tolist()


def _n_common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
