"""Text out of ids as they come: whole characters only, and never a part of a stop string."""

import codecs
from collections.abc import Sequence

from experiments.data.tokenizer import Tokenizer

WINDOW = 16  # ids decoded together at most, where ids have no bytes of their own


class TextStream:
    """Turns the ids of one text into its characters, at a cost for each that does not grow.

    An incomplete character, and what may become a stop string, is held back until the next ids
    decide. `stopped` is true once a stop string was complete; it and what follows are never given.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False
        pieces = tokenizer.pieces()
        self._characters = _Decoded(tokenizer) if pieces is None else _Joined(pieces)

    def push(self, token: int) -> str:
        """The text that is certain after one more id, which may be none."""
        return "" if self.stopped else self._settle(self._characters.push(token), final=False)

    def finish(self) -> str:
        """What was held back, when no more ids come."""
        return "" if self.stopped else self._settle(self._characters.finish(), final=True)

    def _settle(self, text: str, final: bool) -> str:
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        n = 0 if final else max((self._begun(stop) for stop in self._stops), default=0)
        settled = self._held[: len(self._held) - n]
        self._held = self._held[len(settled) :]
        return settled

    def _begun(self, stop: str) -> int:
        """Length of the longest beginning of a stop string that the held text ends with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class _Joined:
    """For tokenizers whose ids stand for bytes each."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._pieces[token])

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Decoded:
    """For all others: an id's text is what it adds to that of the few ids before it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._given: list[int] = []  # the last ids whose text was given: how the next is read
        self._open: list[int] = []

    def push(self, token: int) -> str:
        self._open.append(token)
        text = self._added()
        if (not text or text.endswith("\ufffd")) and len(self._open) < WINDOW:
            return ""
        self._given, self._open = self._open, []
        return text

    def finish(self) -> str:
        return self._added()

    def _added(self) -> str:
        before = self._tokenizer.decode(self._given)
        return self._tokenizer.decode(self._given + self._open)[len(before) :]
