"""A run that continues texts: its model, its tokenizer, and what its tokens cost."""

import time
from collections.abc import Callable
from typing import Any

import torch

from experiments.generation.text_stream import TextStream
from experiments.runs.run_dir import RunDir
from experiments.runs.trained_model import load_model, load_tokenizer
from experiments.system.machine import usable_device
from models.generation import Generation, Past, Sampling, check_prompts, check_room


class Cost:
    """Tokens and seconds of prefill (the prompts, to the first new token) and of decoding."""

    def __init__(self) -> None:
        self.n_new = 0
        self.parts = {"prefill": (0, 0.0), "decode": (0, 0.0)}

    def add(self, part: str, n_tokens: int, start: float) -> None:
        """Count n_tokens that took from `start`, a time of `time.perf_counter`, to now."""
        n, seconds = self.parts[part]
        self.parts[part] = (n + n_tokens, seconds + time.perf_counter() - start)

    def text(self) -> str:
        """One line for a person."""
        shown = [f"{self.n_new} new tokens"]
        for part, (n, seconds) in self.parts.items():
            if n:
                shown.append(f"{part} {n} in {seconds:.3g} s ({n / seconds:,.1f} tokens/s)")
        return "; ".join(shown)


class Generator:
    """A run's model and tokenizer, and the settings under which it continues texts.

    Args:
        settings: the keys of conf/generate.yaml.

    Raises:
        ValueError, FileNotFoundError: if the run or its tokenizer cannot be used.
    """

    def __init__(self, run: RunDir, settings: dict[str, Any]) -> None:
        self.tokenizer = load_tokenizer(run)
        device = usable_device(settings["device"])
        self.model = load_model(run, settings["checkpoint"], device, settings["dtype"])
        if self.tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"{run.tokenizer_file} makes {self.tokenizer.vocab_size} ids but the "
                f"model knows {self.model.vocab_size}: it is not the tokenizer the model was "
                "trained with"
            )
        drawn = ("temperature", "top_k", "top_p", "repetition_penalty")
        self.sampling = Sampling(**{name: settings[name] for name in drawn})
        self.seed: int = settings["seed"]
        self.stops: list[str] = settings["stop"]
        self.max_tokens: int = settings["max_tokens"]
        self.chunk_len: int = settings["chunk_len"]
        self.cost = Cost()

    def encode(self, texts: list[str], unread: list[int], n_read: int) -> list[list[int]]:
        """Ids of each text, after those a state has not read; all within the model's context.

        No text at all continues from the state alone. Raises ValueError for what cannot be run.
        """
        prompts = [unread + ids for ids in self.tokenizer.encode_batch(texts or [""])]
        if not texts and not unread:
            raise ValueError("nothing is left of the saved text to go on from: give prompt=TEXT")
        if [] in prompts:
            raise ValueError(
                f"prompt {prompts.index([]) + 1} has no token: give a text to go on from"
            )
        check_prompts(self.model, prompts)
        check_room(self.model, n_read + max(map(len, prompts)), self.max_tokens)
        return prompts

    def write(
        self,
        prompts: list[list[int]],
        first: int,
        past: Past | None,
        show: Callable[[int, str], object],
    ) -> tuple[Generation, list[list[int]]]:
        """Continue a batch of prompts; with max_tokens=0 they are only read.

        Args:
            first: the number of the first prompt among all, which decides the seeds.
            past: the state to continue from, for a batch of one.
            show: called with a row and the text of it that is new, as it comes.

        Returns:
            The generation, whose state is that of the row that ended last; new ids of each row.
        """
        seeds = [self.seed + first + row for row in range(len(prompts))]
        generation = Generation(
            self.model,
            prompts,
            self.sampling,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            vocab_size=self.tokenizer.vocab_size,
            past=past,
            chunk_len=self.chunk_len,
        )
        streams = [TextStream(self.tokenizer, self.stops) for _ in prompts]
        new: list[list[int]] = [[] for _ in prompts]
        part, n_tokens = "prefill", sum(map(len, prompts))
        while generation.rows:
            start = time.perf_counter()
            drawn = generation.step()
            self.cost.add(part, n_tokens, start)
            ended = []
            for row, token in drawn:
                at_end = token == self.tokenizer.eot_id or self.max_tokens == 0
                if not at_end:
                    new[row].append(token)
                    show(row, streams[row].push(token))
                if at_end or streams[row].stopped or len(new[row]) == self.max_tokens:
                    show(row, streams[row].finish())
                    ended.append(row)
            generation.end(ended)
            part, n_tokens = "decode", len(generation.rows)
        self.cost.n_new += sum(map(len, new))
        return generation, new
