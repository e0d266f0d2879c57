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
    train_bpe,
)

WORDS = ["def", "return", "état", "日本語", "naïve", "🙂", "x1", "==", "\n    ", "  "]


def corpus(n_documents: int = 300) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=60)) for _ in range(n_documents)]


@pytest.fixture(scope="module")
def bpe() -> JsonTokenizer:
    return train_bpe(iter(corpus()), vocab_size=320, max_chars=10**9)


@pytest.fixture(scope="module")
def neox_like() -> JsonTokenizer:
    """Like GPT-NeoX's: special end-of-text and padding, runs of spaces as added tokens, padded."""
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


@given(st.text())
def test_byte_level_ids_count_the_bytes_of_any_text(neox_like: JsonTokenizer, text: str) -> None:
    ids = neox_like.encode(text)
    sizes = neox_like.token_bytes()
    assert sizes is not None
    assert sizes[ids].sum() == len(text.encode())
    assert neox_like.decode(ids) == text
    assert neox_like.decode_bytes(np.array(ids, dtype=int)) == text.encode()


def test_ids_without_text_give_nothing(neox_like: JsonTokenizer) -> None:
    for tokenizer in (BytesTokenizer(), neox_like):
        ids = tokenizer.encode("text")
        without = [tokenizer.eot_id, tokenizer.vocab_size, 10**6]
        without += [] if tokenizer.kind == "bytes" else [1, 310]  # special, padding
        assert tokenizer.decode([*ids[:1], *without, *ids[1:]]) == "text"


def test_special_tokens_cannot_be_forged_and_have_no_bytes(neox_like: JsonTokenizer) -> None:
    text = "a<|endoftext|>b<|padding|>    c"
    ids = neox_like.encode(text)
    assert neox_like.eot_id == 0
    assert {0, 1}.isdisjoint(ids)
    assert neox_like.decode([*ids, 0, 1]) == text
    sizes = neox_like.token_bytes()
    assert sizes is not None
    assert sizes[[0, 1]].tolist() == [0, 0]
    assert sizes[304:].tolist() == [0] * 16  # ids that only pad the vocabulary
    assert any(sizes[i] == 4 for i in ids)  # the spaces


def test_lone_surrogates_become_replacement_characters(bpe: JsonTokenizer) -> None:
    for tokenizer in (bpe, BytesTokenizer()):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a�b"
        assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"


def test_training_is_deterministic_compresses_and_reads_max_chars(bpe: JsonTokenizer) -> None:
    assert train_bpe(iter(corpus()), vocab_size=320, max_chars=10**9).to_json() == bpe.to_json()
    text = corpus(1)[0]
    assert len(bpe.encode(text)) < 0.6 * len(text.encode())
    documents = iter(corpus())
    train_bpe(documents, vocab_size=300, max_chars=5000)
    assert len(list(documents)) > 250


@pytest.mark.parametrize("name", ["bytes", "bpe", "padded", "ids"])
def test_description_is_self_contained(
    name: str, bpe: JsonTokenizer, neox_like: JsonTokenizer
) -> None:
    made = {"bytes": BytesTokenizer(), "bpe": bpe, "padded": neox_like, "ids": IdsTokenizer(9, 3)}
    one = made[name]
    copy = Tokenizer.from_json(one.to_json())
    assert (copy.vocab_size, copy.eot_id, copy.hash) == (one.vocab_size, one.eot_id, one.hash)
    if name != "ids":
        assert copy.encode("naïve 日本語") == one.encode("naïve 日本語")


def test_hash_ignores_padding_and_sees_content(bpe: JsonTokenizer) -> None:
    assert JsonTokenizer(bpe.description()["tokenizer"], vocab_size=512).hash == bpe.hash
    assert train_bpe(iter(corpus()), vocab_size=321, max_chars=10**9).hash != bpe.hash


@pytest.mark.parametrize("text", ["{}", "[]", '{"kind": "bytes"', '{"kind": "bytes", "x": 1}'])
def test_a_damaged_description_is_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="not a tokenizer description") as caught:
        Tokenizer.from_json(text)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_a_tokenizer_is_one_line(bpe: JsonTokenizer) -> None:
    content = bpe.description()["tokenizer"]
    with pytest.raises(ValueError, match="no token '<s>'"):
        JsonTokenizer(content, eot="<s>")
    with pytest.raises(ValueError, match="below the 320 ids"):
        JsonTokenizer(content, vocab_size=100)
