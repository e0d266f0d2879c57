"""Any model of the contract as an lm-eval language model: loglikelihood, rolling, generate_until.

Tokens, prefixes and truncation are those of lm-eval's own `hf` backend, so that scores compare;
the arithmetic is in `scoring.py` and `models/generation.py`.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from experiments.data.tokenizer import Tokenizer
from experiments.evaluation.journal import Journal, request_key
from experiments.evaluation.options import GenerationOptions, Prompt, prefix_token, rolling_window
from experiments.evaluation.prefix_tree import Tokens
from experiments.evaluation.scoring import Scorer, batched
from experiments.generation.text_stream import TextStream
from experiments.system import ranks
from models.generation import generate
from models.language_model import LanguageModel

Request = tuple[Any, list[int], list[int]]  # texts (what lm-eval caches by), context, continuation
Item = TypeVar("Item", bound=tuple)  # a request whose first part is tokens
Finished = Callable[[dict[int, Any]], object]  # takes answers by the index of their request


class LanguageModelLM(TemplateLM):
    """A `LanguageModel` and its tokenizer behind lm-eval's interface.

    Args:
        model: in evaluation mode, on the device and with the type of weights it is to run in.
        tokenizer: the one it was trained with.
        prefix: what stands before a text that has no context: "eot", "newline", or "none" (then
            the first token only conditions the rest and is not scored itself).
        batch_tokens: see `Scorer`.
        rolling_ctx: window of loglikelihood_rolling in tokens: "trained" (the model's ctx_len,
            the same for both families), "max" (all the model may see: a whole document in one
            pass where max_ctx is None), or a number.
        seed: of the sampling in generate_until, where a task asks for sampling.

    Raises:
        ValueError: for an unknown option, a window longer than the model's, or a tokenizer that
            lacks the prefix or does not fit the vocabulary.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        prefix: str = "eot",
        rolling_ctx: int | str = "trained",
        batch_tokens: int = 16384,
        seed: int = 0,
    ):
        super().__init__()
        if tokenizer.vocab_size > model.vocab_size:
            raise ValueError(
                f"the tokenizer makes {tokenizer.vocab_size} ids but the model knows "
                f"{model.vocab_size}: it is not the tokenizer the model was trained with"
            )
        self.model = model
        self.codec = tokenizer
        self.prefix = prefix
        self._prefix_id = prefix_token(tokenizer, prefix)
        self.rolling_ctx = rolling_window(model, rolling_ctx)
        self.scorer = Scorer(model, batch_tokens)
        self.seed = seed
        self.journal = Journal()  # of the task being scored; set another for each task
        self.n_truncated = 0  # requests that lost tokens on the left since construction
        self._device = self.scorer.device

    @property
    def protocol(self) -> dict[str, Any]:
        """What of this adapter decides the scores, for the record beside them."""
        return {
            "prefix": self.prefix,
            "tokenizer": self.codec.hash[:16],
            "dtype": str(self.model.head.weight.dtype).removeprefix("torch."),
            "device": self.device.type,
            "max_ctx": self.model.max_ctx,
            "rolling_ctx": self.rolling_ctx,
        }

    @property
    def eot_token_id(self) -> int:
        return self.codec.eot_id

    @property
    def prefix_token_id(self) -> int | None:
        return self._prefix_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text; no tokenizer of the suite adds special tokens by itself."""
        return self.codec.encode(string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log P(continuation | context) in nats, whether greedy decoding gives it) per request.

        Raises:
            ValueError: if a continuation has no token of its own to score.
        """
        return self._loglikelihood_tokens(self.encode(requests), disable_tqdm=disable_tqdm)

    def encode(self, requests: list[Instance]) -> list[Request]:
        """Texts, context and continuation of loglikelihood requests, before any is cut.

        Raises:
            ValueError: if a continuation has no token of its own to score.
        """
        pairs: list[Request] = []
        for request in requests:
            context, continuation = request.args
            if context:
                before, after = self._encode_pair(context, continuation)
            else:
                before, after = [], self.tok_encode(continuation)
            if not before:  # nothing, or only spaces, which went over to the continuation
                before, after = self._behind_prefix(after)
            if not after:
                raise ValueError(
                    f"{continuation[:40]!r} after {context[-40:]!r} leaves no token to score: "
                    f"it merges into the text before it, or is one token and prefix={self.prefix}"
                )
            pairs.append(((context, continuation), before, after))
        return pairs

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log P(text) in nats, each token scored once, in lm-eval's windows of `rolling_ctx`."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            for before, after in self._windows(self.tok_encode(request.args[0])):
                windows.append((None, before, after))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (score, _) in zip(owners, scores, strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations as text, cut before the first stop string; greedy unless told to sample.

        A sampled text depends on the seed, its prompt, its options and how many equal requests came
        before it (lm-eval's `repeats`) alone.

        Raises:
            ValueError: for an option it does not know, or more tokens than the context holds.
        """
        parsed = [GenerationOptions.parse(request.args[1]) for request in requests]
        seen: Counter[tuple[Tokens, GenerationOptions]] = Counter()
        prompts: list[Prompt] = []
        for request, options in zip(requests, parsed, strict=True):
            prompt = tuple(self._prompt(request.args[0], options))
            if not prompt:
                raise ValueError(f"an empty prompt and prefix={self.prefix}: nothing to start from")
            prompts.append((prompt, options, seen[prompt, options]))
            seen[prompt, options] += options.temperature > 0  # greedy texts are all the same
        texts = self._answers(
            prompts, lambda one: len(one[0]), self._generate_all, "generating", disable_tqdm
        )
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(self.fit(before, after), tuple(after)) for _, before, after in requests]

        def run(pairs: list[tuple[Tokens, Tokens]], finished: Finished) -> None:
            self.scorer.score(pairs, finished)

        answers = self._answers(
            pairs, lambda pair: len(pair[0] + pair[1]), run, "loglikelihoods", disable_tqdm
        )
        answers = [(score, greedy) for score, greedy in answers]
        for (texts, *_), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _answers(
        self,
        requests: list[Item],
        cost: Callable[[Item], int],
        run: Callable[[list[Item], Finished], None],
        what: str,
        disable_tqdm: bool,
    ) -> list[Any]:
        """What the journal has; the rest is run, by all processes together, and goes there."""
        keys = [request_key(what, request) for request in requests]
        missing = {
            k: r for k, r in zip(keys, requests, strict=True) if k not in self.journal.answers
        }
        # in order, so that what requests have in common is run by one process
        ordered = sorted(missing, key=lambda key: missing[key][0])
        share = ranks.share(ordered, lambda key: cost(missing[key]))
        new: dict[str, Any] = {}
        quiet = disable_tqdm or not sys.stderr.isatty()
        with tqdm(total=len(share), desc=what, unit="req", disable=quiet, leave=False) as bar:

            def finished(answers: dict[int, Any]) -> None:
                some = {share[index]: answer for index, answer in answers.items()}
                self.journal.add(some)
                new.update(some)
                bar.update(len(some))

            run([missing[key] for key in share], finished)
        for part in ranks.gather(new):
            self.journal.answers |= part
        return [self.journal.answers[key] for key in keys]

    def _generate_all(self, requests: list[Prompt], finished: Finished) -> None:
        alike: dict[GenerationOptions, list[int]] = {}
        for index, (_, options, _) in enumerate(requests):
            alike.setdefault(options, []).append(index)
        for options, indices in alike.items():

            def cost(index: int, options: GenerationOptions = options) -> int:
                return len(requests[index][0]) + options.max_tokens

            for batch in batched(indices, cost, self.scorer.batch_tokens):
                texts = self._generate([requests[index] for index in batch], options)
                finished(dict(zip(batch, texts, strict=True)))

    def _generate(self, requests: list[Prompt], options: GenerationOptions) -> list[str]:
        streams = [TextStream(self.codec, options.until) for _ in requests]
        texts = [""] * len(requests)

        def stopped(row: int, new: list[int]) -> bool:
            texts[row] += streams[row].push(new[-1])
            return streams[row].stopped

        generators = [
            torch.Generator(self.device).manual_seed(
                int(request_key(self.seed, prompt, number)[:12], 16)
            )
            for prompt, _, number in requests
        ]
        generate(
            self.model,
            [list(prompt) for prompt, *_ in requests],
            options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            generator=generators,
            eot_id=self.eot_token_id,
            vocab_size=self.codec.vocab_size,
            stop=stopped,
        )
        return [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]

    def _prompt(self, context: str, options: GenerationOptions) -> list[int]:
        tokens = self.tok_encode(context)
        if not tokens and self._prefix_id is not None:
            tokens = [self._prefix_id]
        if self.model.max_ctx is None:
            return tokens
        room = self.model.max_ctx - options.max_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks={options.max_tokens} leaves no room for a prompt in this "
                f"{self.model.family}'s context of {self.model.max_ctx} tokens: lower it "
                "(tasks.gen_kwargs.max_gen_toks=N)"
            )
        self.n_truncated += len(tokens) > room
        return tokens[-room:]

    def _behind_prefix(self, tokens: list[int]) -> tuple[list[int], list[int]]:
        """Context and continuation of a text that stands alone; a prefix it has is not doubled."""
        starts_with_it = len(tokens) > 1 and tokens[0] == self._prefix_id
        if self._prefix_id is None or starts_with_it:
            return tokens[:1], tokens[1:]
        return [self._prefix_id], tokens

    def _windows(self, tokens: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        first = self._prefix_id
        if first is None:
            first, tokens = (tokens[0], tokens[1:]) if tokens else (0, [])
        size = self.rolling_ctx or max(len(tokens), 1)
        for window in get_rolling_token_windows(tokens, first, size, context_len=1):
            yield make_disjoint_window(window)

    def fit(self, context: list[int], continuation: list[int]) -> Tokens:
        """The context, cut on the left to what the model may see besides the continuation."""
        limit = self.model.max_ctx
        if limit is None or len(context) + len(continuation) <= limit + 1:
            return tuple(context)  # the last token of the continuation is never an input
        if len(continuation) > limit:
            raise ValueError(
                f"an answer of {len(continuation)} tokens is longer than this "
                f"{self.model.family}'s context of {limit}"
            )
        self.n_truncated += 1
        return tuple(context[len(continuation) - limit - 1 :])
