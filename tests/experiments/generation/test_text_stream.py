"""TextStream: whole characters as they come, and nothing of a stop string."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from experiments.data.tokenizer import BytesTokenizer, JsonTokenizer, Tokenizer, read_tokenizer
from experiments.generation.text_stream import TextStream


def word_tokenizer() -> JsonTokenizer:
    """One whose ids are not bytes: words with a mark for the space before them."""
    engine = Engine(models.BPE(unk_token="<unk>", byte_fallback=True))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = ["<unk>", "<|endoftext|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special[:2], show_progress=False)
    engine.train_from_iterator(["the cat sat on the mat", "an öl of é"] * 3, trainer)
    engine.add_tokens(special[2:])
    return JsonTokenizer(json.loads(engine.to_str()))


@pytest.mark.parametrize("make", [BytesTokenizer, word_tokenizer])
def test_a_stream_is_the_text_up_to_its_first_stop(make: Any) -> None:
    tokenizer: Tokenizer = make()
    draw = random.Random(0)
    texts = ["the cat sat on the mat", "an öl of é", "é€😀 the öl", "aaab aab aab", "cat"]
    for _ in range(300):
        text = " ".join(draw.choice(texts) for _ in range(draw.randint(1, 3)))
        ids = tokenizer.encode(text)
        text = tokenizer.decode(ids)
        starts = [draw.randrange(len(text)) for _ in range(draw.randint(0, 2))]
        stops = [text[start : start + draw.randint(1, 6)] for start in starts] + ["aab!", "é?"]
        stream = TextStream(tokenizer, stops)
        given = ""
        for token in ids:
            given += stream.push(token)
            assert text.startswith(given)  # nothing is ever taken back
            assert not any(stop in given for stop in stops)
        given += stream.finish()
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        assert stream.stopped == bool(ends)
        if ends and make is BytesTokenizer:  # the first stop to be whole, in whole characters
            first = [stop for stop in stops if text[: min(ends)].endswith(stop)]
            assert given == text[: min(ends) - max(map(len, first))]
        elif not ends:
            assert given == text


def test_a_character_is_held_back_until_it_is_whole() -> None:
    stream = TextStream(BytesTokenizer())
    assert [stream.push(byte) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert stream.push(0xC3) == ""
    assert stream.finish() == "\ufffd"
    stream = TextStream(BytesTokenizer(), ["END"])
    assert [stream.push(byte) for byte in b"xENEND"] == ["x", "", "", "EN", "", ""]
    assert stream.stopped
    assert stream.push(65) == stream.finish() == ""


def test_a_stream_of_byte_level_bpe_is_its_decoded_text(neox_tokenizer_json: Path) -> None:
    tokenizer = read_tokenizer(str(neox_tokenizer_json))
    text = "naïve 😀😀 — 漢字かな\n\tdef f(x):  return x\ufffd" * 3
    stream = TextStream(tokenizer)
    given = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(given) + stream.finish() == text
    assert "" in given  # an id that ended within a character
