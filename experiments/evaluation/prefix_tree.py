"""What requests have in common, found by sorting them: a context and its answers, the worked
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

    Each input predicts the target in the same place (NOTHING: not asked), whose log-probability
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
    """(context, answer) pairs -> for each different one, in order, its places; and the roots.

    A request is fed all but its answer's last token. Two share what they are fed as long as they
    also ask for the same predictions.
    """
    places: dict[bytes, list[int]] = {}
    for place, (context, answer) in enumerate(requests):
        fed = np.array(context + answer[:-1], dtype=np.int64)
        asked = np.full(len(fed), NOTHING, dtype=np.int64)
        asked[len(context) - 1 :] = answer
        # big-endian, so that bytes sort as numbers
        places.setdefault((fed << 32 | asked + 1).astype(">i8").tobytes(), []).append(place)
    ordered = sorted(places)
    return [places[key] for key in ordered], _roots([np.frombuffer(k, ">i8") for k in ordered])


def _roots(sequences: list[np.ndarray]) -> list[Segment]:
    """The tree over sorted sequences of (fed, asked)."""
    if not sequences:
        return []
    lengths = np.array([len(one) for one in sequences])
    common = np.zeros(len(sequences) + 1, dtype=np.int64)  # of each with the one before it
    for i in range(1, len(sequences)):
        common[i] = _n_common(sequences[i - 1], sequences[i])
    roots: list[Segment] = []
    # requests first <= i < last, alike up to `at`, of which the parent has the first `start`
    todo = [(0, len(sequences), 0, 0, roots)]
    while todo:
        first, last, start, at, siblings = todo.pop()
        borders = first + 1 + np.flatnonzero(common[first + 1 : last] <= at)
        for a, b in zip([first, *borders.tolist()], [*borders.tolist(), last], strict=True):
            end = int(lengths[a]) if b == a + 1 else int(common[a + 1 : b].min())
            if b > a + 1 and not _worthwhile(end - start, float(lengths[a:b].mean()) - end):
                todo.append((a, b, start, end, siblings))
                continue
            reach = int(lengths[a:b].max()) - start
            segment = Segment(*_split(sequences[a][start:end]), a, b, reach, [])
            siblings.append(segment)
            if b > a + 1:
                todo.append((a, b, end, end, segment.children))
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
