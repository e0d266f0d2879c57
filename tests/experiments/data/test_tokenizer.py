import json
import random

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.tokenizer import (
    BytesTokenizer,
    IdsTokenizer,
    JsonTokenizer,
    Tokenizer,
    read_tokenizer,
    train_bpe,
)

WORDS = [
    "def",
    "return",
    "self",
    "état",
    "日本語",
    "naïve",
    "for",
    "🙂",
    "x1",
    "==",
    "\n    ",
    "  ",
]


def corpus(n_documents: int = 300) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=60)) for _ in range(n_documents)]


@pytest.fixture(scope="module")
def bpe() -> JsonTokenizer:
    return train_bpe(iter(corpus()), vocab_size=320, max_chars=10**9)


@pytest.fixture(scope="module")
def with_added_tokens() -> JsonTokenizer:
    """Like GPT-NeoX's: special end-of-text and padding, runs of spaces as added tokens."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(corpus(), trainer)
    engine.add_tokens(["   ", "    ", "日本"])
    return JsonTokenizer(json.loads(engine.to_str()), vocab_size=320)


@given(st.text())
def test_bytes_are_utf8_without_nul(text: str) -> None:
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text)
    assert bytes(ids) == text.encode().replace(b"\0", b"")
    assert tokenizer.decode(ids) == text.replace("\0", "")
    assert tokenizer.eot_id not in ids


def test_bytes_decode_leaves_out_separators_and_replaces_broken_utf8() -> None:
    tokenizer = BytesTokenizer()
    ids = [*"é".encode(), 0, *"日".encode()[:2]]
    assert tokenizer.decode(ids) == "é�"
    assert tokenizer.decode_bytes(np.array(ids, dtype=np.uint8)) == bytes(i for i in ids if i)
    sizes = tokenizer.token_bytes()
    assert sizes is not None
    assert sizes.tolist() == [0] + [1] * 255


def test_generated_ids_without_text_give_nothing() -> None:
    trained = train_bpe(iter(corpus()), 300, 10**6)
    fields = json.loads(trained.to_json())
    padded = JsonTokenizer(fields["tokenizer"], fields["eot"], 320)
    for tokenizer in (BytesTokenizer(), padded):
        ids = tokenizer.encode("text")
        beyond = [tokenizer.vocab_size, tokenizer.vocab_size - 1 + 10**6]
        padding = [] if tokenizer.kind == "bytes" else [300, 319]
        assert tokenizer.decode([*ids[:1], *beyond, *padding, *ids[1:]]) == "text"


@given(st.text())
def test_byte_level_ids_count_the_bytes_of_any_text(
    with_added_tokens: JsonTokenizer, text: str
) -> None:
    ids = with_added_tokens.encode(text)
    sizes = with_added_tokens.token_bytes()
    assert sizes is not None
    assert sizes[ids].sum() == len(text.encode())
    assert with_added_tokens.decode(ids) == text
    assert with_added_tokens.decode_bytes(np.array(ids, dtype=int)) == text.encode()


def test_special_tokens_cannot_be_forged_and_have_no_bytes(
    with_added_tokens: JsonTokenizer,
) -> None:
    text = "a<|endoftext|>b<|padding|>"
    ids = with_added_tokens.encode(text)
    assert with_added_tokens.eot_id == 0
    assert {0, 1}.isdisjoint(ids)
    assert with_added_tokens.decode([*ids, 0, 1]) == text
    sizes = with_added_tokens.token_bytes()
    assert sizes is not None
    assert sizes[[0, 1]].tolist() == [0, 0]
    assert sizes[304:].tolist() == [0] * 16  # ids that only pad the vocabulary
    spaces = with_added_tokens.encode("x    y")
    assert any(sizes[i] == 4 for i in spaces)


def test_lone_surrogates_become_replacement_characters(bpe: JsonTokenizer) -> None:
    for tokenizer in (bpe, BytesTokenizer()):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a�b"
        assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"


def test_batches_equal_single_texts(bpe: JsonTokenizer) -> None:
    texts = [*corpus(5), ""]
    assert bpe.encode_batch(texts) == [bpe.encode(text) for text in texts]
    assert BytesTokenizer().encode_batch(texts)[0] == list(texts[0].encode())


def test_training_is_deterministic_and_compresses(bpe: JsonTokenizer) -> None:
    again = train_bpe(iter(corpus()), vocab_size=320, max_chars=10**9)
    assert again.to_json() == bpe.to_json()
    assert again.hash == bpe.hash
    assert bpe.vocab_size == 320
    text = corpus(1)[0]
    assert len(bpe.encode(text)) < 0.6 * len(text.encode())


def test_training_reads_no_more_than_max_chars() -> None:
    def texts():  # type: ignore[no-untyped-def]
        yield from corpus()
        raise AssertionError("read on")

    train_bpe(texts(), vocab_size=300, max_chars=5000)


@pytest.mark.parametrize("name", ["bytes", "bpe", "padded", "ids"])
def test_description_is_self_contained(
    name: str, bpe: JsonTokenizer, with_added_tokens: JsonTokenizer
) -> None:
    tokenizer = {
        "bytes": BytesTokenizer(),
        "bpe": bpe,
        "padded": with_added_tokens,
        "ids": IdsTokenizer(1000, eot_id=3),
    }[name]
    copy = Tokenizer.from_json(tokenizer.to_json())
    assert (copy.vocab_size, copy.eot_id, copy.hash) == (
        tokenizer.vocab_size,
        tokenizer.eot_id,
        tokenizer.hash,
    )
    if name != "ids":
        assert copy.encode("naïve 日本語") == tokenizer.encode("naïve 日本語")


def test_hash_ignores_padding_and_sees_content(bpe: JsonTokenizer) -> None:
    fields = json.loads(bpe.to_json())["tokenizer"]
    assert JsonTokenizer(fields, vocab_size=512).hash == bpe.hash
    other = train_bpe(iter(corpus()), vocab_size=321, max_chars=10**9)
    assert other.hash != bpe.hash


def test_tokenizer_without_byte_alphabet_knows_no_bytes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(str(tmp_path / "tokenizer.json"), eot="[UNK]")
    assert tokenizer.token_bytes() is None
    assert tokenizer.decode_bytes(np.array([1, 1])) == b"a a"


def test_errors_are_one_line(tmp_path, bpe: JsonTokenizer) -> None:  # type: ignore[no-untyped-def]
    broken = tmp_path / "broken.json"
    broken.write_text('{"model": 1}')
    fields = json.loads(bpe.to_json())["tokenizer"]
    cases = [
        (lambda: read_tokenizer(str(tmp_path / "none.json")), "no tokenizer file"),
        (lambda: read_tokenizer(str(broken)), "not a tokenizer.json"),
        (lambda: JsonTokenizer(fields, eot="<s>"), "no token '<s>'"),
        (lambda: JsonTokenizer(fields, vocab_size=100), "below the 320 ids"),
        (lambda: train_bpe(iter(["abc"]), 256, 10**6), "257 or more"),
        (lambda: train_bpe(iter(["abc"]), 400, 10**6), "yields only"),
        (lambda: BytesTokenizer(512), "256 ids"),
        (lambda: IdsTokenizer(10).encode("a"), "came as ids"),
        (lambda: IdsTokenizer(10).decode([1]), "came as ids"),
        (lambda: Tokenizer.from_json("{}"), "not a tokenizer description"),
        (lambda: Tokenizer.from_json("[]"), "not a tokenizer description"),
        (lambda: Tokenizer.from_json('{"kind": "bytes"'), "not a tokenizer description"),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
