"""Tokenizers behind one interface: bytes, any `tokenizer.json`, BPE trained here, bare ids.

`to_json` describes a tokenizer completely, so a copy of that text in a run directory is all that
decoding or evaluation needs later. A text cannot forge marks of structure: NUL characters (bytes)
are dropped and special tokens (`tokenizer.json`) are read as the characters they are spelled with.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """Text to ids in [0, vocab_size) and back; `eot_id` follows every document."""

    kind: str
    vocab_size: int
    eot_id: int

    @abstractmethod
    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of every text, without end-of-text: 1-d unsigned arrays, in order."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; broken UTF-8 gives U+FFFD.

        End-of-text and ids that stand for no text give nothing: a model whose vocabulary is padded
        may generate them.
        """

    @abstractmethod
    def pieces(self) -> list[bytes] | None:
        """UTF-8 bytes of each id, vocab_size entries; None if ids have no bytes of their own."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What `from_json` needs besides vocab_size."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without end-of-text."""
        return self.encode_arrays([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, without end-of-text."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def token_bytes(self) -> np.ndarray | None:
        """UTF-8 bytes each id decodes to, (vocab_size,) uint32, end-of-text 0; None if unknown."""
        pieces = self.pieces()
        return None if pieces is None else np.array([len(p) for p in pieces], dtype=np.uint32)

    def decode_bytes(self, ids: np.ndarray) -> bytes:
        """The UTF-8 text of the ids, exact where `pieces` are known."""
        pieces = self.pieces()
        if pieces is None:
            return self.decode(ids.tolist()).encode()
        return b"".join([pieces[i] for i in ids.tolist()])

    @property
    def hash(self) -> str:
        """Hex digest of all that determines ids (not of ids that only pad the vocabulary)."""
        text = json.dumps({"kind": self.kind, **self.description()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """The whole tokenizer as one JSON text, read back by `from_json`."""
        fields = {"kind": self.kind, "vocab_size": self.vocab_size, **self.description()}
        return json.dumps(fields, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> "Tokenizer":
        """The tokenizer that `to_json` described; ValueError if the text describes none."""
        kinds = {kind.kind: kind for kind in (BytesTokenizer, JsonTokenizer, IdsTokenizer)}
        try:
            fields = json.loads(text)
            return kinds[fields.pop("kind")](**fields)
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a tokenizer description of this suite ({error!r})") from None


class BytesTokenizer(Tokenizer):
    """UTF-8 bytes as ids; 0 ends a document, so NUL characters in a text are dropped."""

    kind = "bytes"
    eot_id = 0

    def __init__(self, vocab_size: int = 256) -> None:
        if vocab_size != 256:
            raise ValueError(f"the bytes tokenizer has 256 ids, not vocab_size={vocab_size}")
        self.vocab_size = vocab_size

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        raw = [_without_surrogates(text).encode().replace(b"\0", b"") for text in texts]
        return [np.frombuffer(data, dtype=np.uint8) for data in raw]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 < i < 256).decode(errors="replace")

    def decode_bytes(self, ids: np.ndarray) -> bytes:
        return ids.astype(np.uint8).tobytes().replace(b"\0", b"")

    def pieces(self) -> list[bytes]:
        return [b"", *(bytes([i]) for i in range(1, 256))]

    def description(self) -> dict[str, Any]:
        return {}


class JsonTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        tokenizer: the content of its `tokenizer.json`.
        eot: its end-of-text token.
        vocab_size: may exceed the ids in use (models pad their embedding); None: the ids in use.

    Raises:
        ValueError: if the library does not accept it, or eot or vocab_size does not fit it.
    """

    kind = "json"

    def __init__(
        self, tokenizer: dict[str, Any], eot: str = END_OF_TEXT, vocab_size: int | None = None
    ) -> None:
        try:
            self._engine = Engine.from_str(json.dumps(tokenizer))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a tokenizer.json of the tokenizers library: {error}") from None
        self._engine.no_padding()
        self._engine.no_truncation()
        self._engine.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        self._tokenizer, self._eot = tokenizer, eot
        eot_id = self._engine.token_to_id(eot)
        if eot_id is None:
            raise ValueError(
                f"the tokenizer has no token {eot!r}: name its end-of-text token (eot=...)"
            )
        self.eot_id = eot_id
        n_ids = max(self._engine.get_vocab(with_added_tokens=True).values()) + 1
        self.vocab_size = vocab_size or n_ids
        if self.vocab_size < n_ids:
            raise ValueError(
                f"vocab_size={vocab_size} is below the {n_ids} ids of the tokenizer: raise it"
            )

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        clean = [_without_surrogates(text) for text in texts]
        encodings = self._engine.encode_batch_fast(clean, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._engine.decode(list(ids), skip_special_tokens=True)

    def pieces(self) -> list[bytes] | None:
        return self._pieces

    @cached_property
    def _pieces(self) -> list[bytes] | None:
        decoder = self._tokenizer.get("decoder") or {"type": None}
        parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        if [part["type"] for part in parts] != ["ByteLevel"]:
            return None
        special = {i for i, t in self._engine.get_added_tokens_decoder().items() if t.special}
        special.add(self.eot_id)
        pieces = [b""] * self.vocab_size
        alphabet = _byte_level_alphabet()
        for token, i in self._engine.get_vocab(with_added_tokens=True).items():
            if i in special:
                continue
            if all(char in alphabet for char in token):
                pieces[i] = bytes(alphabet[char] for char in token)
            else:  # the decoder takes a token with any other character (an added token) as text
                pieces[i] = token.encode()
        return pieces

    def description(self) -> dict[str, Any]:
        return {"tokenizer": self._tokenizer, "eot": self._eot}


class IdsTokenizer(Tokenizer):
    """Stands for the unknown tokenizer of data that came as ids: no text in, no text out."""

    kind = "ids"

    def __init__(self, vocab_size: int, eot_id: int = 0) -> None:
        self.vocab_size, self.eot_id = vocab_size, eot_id

    def encode_arrays(self, texts: Sequence[str]) -> NoReturn:
        raise ValueError(
            "this data came as ids: give its tokenizer.json (tokenizer=file) to use text"
        )

    def decode(self, ids: Iterable[int]) -> NoReturn:
        self.encode_arrays([])

    def pieces(self) -> None:
        return None

    def description(self) -> dict[str, Any]:
        return {"eot_id": self.eot_id}


def read_tokenizer(
    path: str, eot: str = END_OF_TEXT, vocab_size: int | None = None
) -> JsonTokenizer:
    """The tokenizer in a `tokenizer.json` file; arguments and errors as of `JsonTokenizer`."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer file {file}: give the path of a tokenizer.json")
    try:
        return JsonTokenizer(json.loads(file.read_text(encoding="utf-8")), eot, vocab_size)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def train_bpe(texts: Iterator[str], vocab_size: int, max_chars: int) -> JsonTokenizer:
    """Byte-level BPE of vocab_size ids (0 = end-of-text) from the first max_chars of texts.

    Raises:
        ValueError: if vocab_size cannot hold the 256 bytes, or the texts are too few to reach it.
    """
    if vocab_size < 257:
        raise ValueError(
            f"a BPE needs vocab_size of 257 or more (bytes, end-of-text), got {vocab_size}"
        )
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(_head(texts, max_chars), trainer)
    tokenizer = JsonTokenizer(json.loads(engine.to_str()))
    if tokenizer.vocab_size < vocab_size:
        raise ValueError(
            f"the training text yields only {tokenizer.vocab_size} BPE tokens, not {vocab_size}:"
            " lower the tokenizer's vocab_size"
        )
    return tokenizer


def _head(texts: Iterator[str], limit: int) -> Iterator[str]:
    n_read = 0
    with tqdm(
        desc="reading for BPE", unit=" chars", unit_scale=True, disable=None, leave=False
    ) as bar:
        for text in texts:
            yield _without_surrogates(text[: limit - n_read])
            n_read += len(text)
            bar.update(len(text))
            if n_read >= limit:
                return


def _without_surrogates(text: str) -> str:
    """Joins halves of surrogate pairs, which JSON escapes can smuggle in, or makes them U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _byte_level_alphabet() -> dict[str, int]:
    """Printable Latin-1 stands for itself; characters from U+0100 on for the other bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
