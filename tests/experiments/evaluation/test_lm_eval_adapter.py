"""The adapter against brute force (each request alone, whole) and lm-eval's `hf` backend."""

import json
import re

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import nn

from experiments.data.tokenizer import BytesTokenizer, JsonTokenizer, Tokenizer
from experiments.evaluation.adapter import LanguageModelLM
from experiments.evaluation.options import GenerationOptions
from models.gpt.model import GPT
from models.language_model import LanguageModel
from models.rwkv4.model import RWKV4

TEXT = "the cat and the hat and the bat sat on a mat; " * 20
PAIRS = [
    ("the cat", " sat on a mat"),
    ("the cat", " and the bat"),
    ("the cat", " a"),  # one token with the bytes tokenizer's context shared by three answers
    ("the hat and", " the"),
    ("", "the cat"),  # no context
    ("the cat ", "sat"),  # its space belongs to the answer
    (" ", "mat"),  # a context of nothing but spaces
    ("grüße: ", "日本 ✓"),
    ("a", "b"),
    ("the cat", " sat on a mat"),  # the same request again
]


def randomised(model: LanguageModel) -> LanguageModel:
    """Weights large enough that predictions differ; RWKV-4 starts with most of its at zero."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif "bias" in name:
            nn.init.normal_(parameter, std=0.1)
    nn.init.normal_(model.head.weight, std=0.5)
    return model.eval()


def rwkv(vocab_size: int = 256, ctx_len: int = 48) -> LanguageModel:
    return randomised(RWKV4(vocab_size, n_layer=2, n_embd=16, ctx_len=ctx_len))


def gpt(vocab_size: int = 256, ctx_len: int = 48) -> LanguageModel:
    return randomised(GPT(vocab_size, n_layer=2, n_embd=16, n_head=2, ctx_len=ctx_len))


FAMILIES = pytest.mark.parametrize("build", [rwkv, gpt])


@pytest.fixture(scope="module")
def bpe() -> JsonTokenizer:
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator([TEXT], trainer)
    return JsonTokenizer(json.loads(engine.to_str()))


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


@torch.no_grad()
def brute_force(model: LanguageModel, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """log P and greediness from one forward pass over the whole sequence, alone."""
    logits, _ = model(torch.tensor([context + answer])[:, :-1])
    logp = logits[0].double().log_softmax(-1)[len(context) - 1 :]
    greedy = logp.argmax(-1).tolist() == answer
    return sum(logp[i, token].item() for i, token in enumerate(answer)), greedy


def expected(
    model: LanguageModel, tokenizer: Tokenizer, context: str, answer: str, prefix: int
) -> tuple[float, bool]:
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, answer = context[:-spaces], context[-spaces:] + answer
    before = tokenizer.encode(context)
    whole = tokenizer.encode(context + answer)
    return brute_force(model, before or [prefix], whole[len(before) :])


@FAMILIES
@pytest.mark.parametrize("batch_tokens", [1, 40, 16384])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_loglikelihood_equals_brute_force(build, batch_tokens, kind, bpe) -> None:
    tokenizer = BytesTokenizer() if kind == "bytes" else bpe
    model = build(tokenizer.vocab_size)
    lm = LanguageModelLM(model, tokenizer, batch_tokens=batch_tokens)
    scores = lm.loglikelihood(requests("loglikelihood", PAIRS))
    for (context, answer), (score, greedy) in zip(PAIRS, scores, strict=True):
        want, want_greedy = expected(model, tokenizer, context, answer, tokenizer.eot_id)
        assert score == pytest.approx(want, abs=1e-4), (context, answer)
        assert greedy == want_greedy
    assert scores[0] == scores[-1]
    assert lm.n_truncated == 0


def test_merges_across_the_border_are_scored_as_the_whole_text_is_encoded(bpe) -> None:
    border = next(
        (TEXT[:i], TEXT[i : i + 6])
        for i in range(5, 60)
        if TEXT[i - 1] != " "
        and bpe.encode(TEXT[: i + 6])[: len(bpe.encode(TEXT[:i]))] != bpe.encode(TEXT[:i])
    )
    lm = LanguageModelLM(rwkv(270), bpe)
    before, after = lm._encode_pair(*border)
    assert before == bpe.encode(border[0])
    assert before + after != bpe.encode("".join(border))  # lm-eval's rule, kept: no re-alignment
    ((score, _),) = lm.loglikelihood(requests("loglikelihood", [border]))
    assert score == pytest.approx(brute_force(lm.model, before, after)[0], abs=1e-4)


@FAMILIES
def test_too_long_contexts_are_cut_on_the_left_for_gpt_alone(build) -> None:
    model, tokenizer = build(ctx_len=16), BytesTokenizer()
    lm = LanguageModelLM(model, tokenizer)
    context, answers = "0123456789abcdefghijklmnopqrstuvwxyz", ("A", "BCD", "x" * 16)
    scores = lm.loglikelihood(requests("loglikelihood", [(context, a) for a in answers]))
    for answer, (score, _) in zip(answers, scores, strict=True):
        seen = context if model.max_ctx is None else context[-(17 - len(answer)) :]
        want, _ = brute_force(model, tokenizer.encode(seen), tokenizer.encode(answer))
        assert score == pytest.approx(want, abs=1e-4)
    assert lm.n_truncated == (0 if model.max_ctx is None else 3)
    if model.max_ctx is not None:
        with pytest.raises(ValueError, match="answer of 17 tokens is longer than this gpt"):
            lm.loglikelihood(requests("loglikelihood", [(context, "y" * 17)]))


@FAMILIES
@pytest.mark.parametrize("prefix", ["eot", "newline", "none"])
def test_prefix_rules(build, prefix) -> None:
    model, tokenizer = build(), BytesTokenizer()
    lm = LanguageModelLM(model, tokenizer, prefix=prefix)
    text = tokenizer.encode("a cat")
    first = {"eot": [0], "newline": [10], "none": []}[prefix]
    context, answer = (first, text) if first else (text[:1], text[1:])
    want, _ = brute_force(model, context, answer)
    assert lm.loglikelihood(requests("loglikelihood", [("", "a cat")]))[0][0] == pytest.approx(
        want, abs=1e-4
    )
    (rolling,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("a cat",)]))
    assert rolling == pytest.approx(want, abs=1e-4)
    assert lm.protocol["prefix"] == prefix


def test_a_prefix_the_text_has_is_not_doubled_and_one_token_is_still_scored() -> None:
    model = rwkv()
    lm = LanguageModelLM(model, BytesTokenizer(), prefix="newline")
    two, one = lm.loglikelihood(requests("loglikelihood", [("", "\na"), ("", "\n")]))
    assert two[0] == pytest.approx(brute_force(model, [10], [97])[0], abs=1e-4)
    assert one[0] == pytest.approx(brute_force(model, [10], [10])[0], abs=1e-4)
    lm = LanguageModelLM(model, BytesTokenizer(), prefix="none")
    with pytest.raises(ValueError, match="leaves no token to score"):
        lm.loglikelihood(requests("loglikelihood", [("", "a")]))


@FAMILIES
@pytest.mark.parametrize("length", [0, 1, 11, 12, 13, 24, 25, 40])
def test_rolling_windows_score_every_token_once(build, length) -> None:
    model, text = build(ctx_len=12), TEXT[:length]
    ids = [0, *BytesTokenizer().encode(text)]
    want = 0.0
    for start in range(0, length, 12):  # predict ids[start + 1 : end], the last window backed up
        end = min(start + 12, length)
        context = ids[max(0, end - 12) : start + 1]
        want += brute_force(model, context, ids[start + 1 : end + 1])[0]
    lm = LanguageModelLM(model, BytesTokenizer())
    assert lm.rolling_ctx == 12
    (got,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    assert got == pytest.approx(want, abs=1e-4)


def test_rolling_over_all_a_model_may_see() -> None:
    text = TEXT[:100]
    model = rwkv(ctx_len=12)
    lm = LanguageModelLM(model, BytesTokenizer(), rolling_ctx="max", batch_tokens=7)
    (got,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    assert got == pytest.approx(brute_force(model, [0], list(text.encode()))[0], abs=1e-3)
    assert LanguageModelLM(gpt(ctx_len=12), BytesTokenizer(), rolling_ctx="max").rolling_ctx == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": "bos"}, "prefix must be eot, newline or none"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
        ({"rolling_ctx": 0}, "rolling_ctx must be"),
        ({"rolling_ctx": 49}, "more than this gpt may see"),
    ],
)
def test_bad_options_are_one_line(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModelLM(gpt(), BytesTokenizer(), **options)


def test_a_tokenizer_of_another_model_is_refused(bpe) -> None:
    with pytest.raises(ValueError, match="270 ids but the model knows 256"):
        LanguageModelLM(gpt(256), bpe)


class Alphabet(LanguageModel):
    """Predicts, with certainty, the byte after the last one; a model whose text is known."""

    family = "toy"
    max_ctx = None

    def __init__(self) -> None:
        super().__init__(vocab_size=256, n_layer=1, n_embd=256, n_ffn=1, ctx_len=16)
        self.emb = nn.Embedding(256, 256)
        self.head = nn.Linear(256, 256, bias=False)
        nn.init.eye_(self.emb.weight)
        self.head.weight.data = 50 * torch.eye(256).roll(1, 0)

    def features(self, ids, state=None):
        return self.emb(ids), state

    def init_state(self, batch_size, n_pad=None):
        return {"nothing": torch.zeros(batch_size, 1)}

    def state_bytes(self, batch_size, n_tokens):
        return 4 * batch_size


def test_generation_stops_at_strings_and_honours_the_limit() -> None:
    lm = LanguageModelLM(Alphabet().eval(), BytesTokenizer(), batch_tokens=30)
    asked = [
        ("xyz a", {"until": ["g"], "max_gen_toks": 20}),
        ("a", {"until": ["hij", "ef"], "max_gen_toks": 20}),
        ("k", {"until": [], "max_gen_toks": 3}),
        ("longer prompt a", {"until": "fgh", "max_gen_toks": 20, "do_sample": False}),
        ("", {"until": ["\x04"], "max_gen_toks": 20}),
        ("a", {"until": ["b"], "max_gen_toks": 5}),
    ]
    texts = lm.generate_until(requests("generate_until", asked))
    assert texts == ["bcdef", "bcd", "lmn", "bcde", "\x01\x02\x03", ""]


def test_generation_of_characters_beyond_ascii_stops_inside_none() -> None:
    class Echo(Alphabet):
        def __init__(self) -> None:
            super().__init__()
            cycle = "é✓".encode()
            self.head.weight.data.zero_()
            for here, there in zip(cycle, cycle[1:] + cycle[:1], strict=True):
                self.head.weight.data[there, here] = 50.0

    lm = LanguageModelLM(Echo().eval(), BytesTokenizer())
    asked = [("é", {"until": ["é"], "max_gen_toks": 12}), ("✓", {"until": [], "max_gen_toks": 5})]
    assert lm.generate_until(requests("generate_until", asked)) == ["✓", "é✓"]


def test_a_prompt_that_is_asked_for_several_times_is_sampled_several_times() -> None:
    class Dice(Alphabet):
        def __init__(self) -> None:
            super().__init__()
            self.head.weight.data.zero_()  # every byte is as likely

    sampled = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    greedy = {"until": [], "max_gen_toks": 6}
    asked = requests("generate_until", [("a", sampled)] * 4 + [("a", greedy)] * 2)
    texts = LanguageModelLM(Dice().eval(), BytesTokenizer()).generate_until(asked)
    assert len(set(texts[:4])) == 4
    assert texts[4] == texts[5]
    again = LanguageModelLM(Dice().eval(), BytesTokenizer(), batch_tokens=1)
    assert again.generate_until(asked) == texts


def test_generation_options() -> None:
    greedy = GenerationOptions.parse({"until": "\n", "do_sample": False, "temperature": 0.7})
    assert greedy == GenerationOptions(("\n",), 256, 0.0, None, None)
    assert GenerationOptions.parse({"do_sample": True}).temperature == 1.0
    assert GenerationOptions.parse({"temperature": 0.5}).temperature == 0.5
    assert GenerationOptions.parse({"max_new_tokens": 7}).max_tokens == 7
    with pytest.raises(ValueError, match="num_beams is not supported"):
        GenerationOptions.parse({"num_beams": 4})
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        LanguageModelLM(gpt(), BytesTokenizer()).generate_until(
            requests("generate_until", [("a", {"until": [], "max_gen_toks": 48})])
        )


HF_NAMES = {
    "rwkv4": [
        (r"^emb\.", "rwkv.embeddings."),
        (r"^blocks\.", "rwkv.blocks."),
        (r"^ln_out\.", "rwkv.ln_out."),
        (r"\.ln0\.", ".pre_ln."),
        (r"\.att\.", ".attention."),
        (r"\.ffn\.", ".feed_forward."),
        (r"time_mix_k$", "time_mix_key"),
        (r"time_mix_v$", "time_mix_value"),
        (r"time_mix_r$", "time_mix_receptance"),
    ],
    "gpt": [
        (r"^emb\.", "gpt_neox.embed_in."),
        (r"^blocks\.", "gpt_neox.layers."),
        (r"^ln_out\.", "gpt_neox.final_layer_norm."),
        (r"^head\.", "lm_head."),
        (r"\.ln1\.", ".input_layernorm."),
        (r"\.ln2\.", ".post_attention_layernorm."),
        (r"\.att\.qkv\.", ".attention.query_key_value."),
        (r"\.att\.output\.", ".attention.dense."),
        (r"\.ffn\.up\.", ".mlp.dense_h_to_4h."),
        (r"\.ffn\.down\.", ".mlp.dense_4h_to_h."),
    ],
}


def hf_name(name: str, family: str) -> str:
    for pattern, replacement in HF_NAMES[family]:
        name = re.sub(pattern, replacement, name)
    return name


def hf_twin(model: LanguageModel) -> nn.Module:
    """The same weights in Hugging Face's implementation."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, RwkvConfig, RwkvForCausalLM

    sizes = {"vocab_size": model.vocab_size, "hidden_size": model.n_embd}
    sizes |= {"num_hidden_layers": model.n_layer, "bos_token_id": 0, "eos_token_id": 0}
    if isinstance(model, RWKV4):
        config = RwkvConfig(**sizes, context_length=model.ctx_len, rescale_every=0)
        twin = RwkvForCausalLM(config)
    else:
        assert isinstance(model, GPT)
        twin = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                **sizes,
                num_attention_heads=model.n_head,
                intermediate_size=model.n_ffn,
                max_position_embeddings=model.ctx_len,
            )
        )
    weights = {hf_name(k, model.family): v for k, v in model.state_dict().items()}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not [name for name in missing if "rotary" not in name and "attention.bias" not in name]
    return twin.eval()


@pytest.mark.slow
@FAMILIES
def test_every_score_equals_that_of_lm_evals_hf_backend(build, bpe) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    engine = Engine.from_str(json.dumps(bpe.description()["tokenizer"]))
    eot = "<|endoftext|>"
    theirs = HFLM(
        pretrained=hf_twin(model := build(270, ctx_len=32)),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=engine, eos_token=eot, bos_token=eot, pad_token=eot
        ),
        max_length=32,
        batch_size=4,
        device="cpu",
    )
    ours = LanguageModelLM(model, bpe, rolling_ctx=32)
    long = " ".join(f"{word} {i}" for i, word in enumerate(TEXT.split()[:60]))
    pairs = [pair for pair in PAIRS if pair[0] != " "]  # their backend cannot score that one
    if model.max_ctx is not None:
        pairs += [(long, " mat"), (long, " cat and a hat")]
    asked = requests("loglikelihood", pairs)
    want = theirs.loglikelihood(asked, disable_tqdm=True)
    got = ours.loglikelihood(asked)
    assert [g for g, _ in got] == pytest.approx([w for w, _ in want], abs=1e-4)
    assert [g for _, g in got] == [w for _, w in want]
    asked = requests("loglikelihood_rolling", [(long,), ("the cat",), ("日本語 ✓ grüße",)])
    want_rolling = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(want_rolling, abs=1e-4)
    options = {"until": ["q"], "max_gen_toks": 10, "do_sample": False}
    asked = requests("generate_until", [("the cat", options)])
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
