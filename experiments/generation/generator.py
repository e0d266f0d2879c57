"""A run that writes: its model, its tokenizer, and what its tokens cost."""

import time
from collections.abc import Callable
from typing import Any

import torch

from experiments.generation.text_stream import TextStream
from experiments.runs.run_dir import RunDir
from experiments.runs.trained_model import load_model, load_tokenizer
from models.generation import Generation, Past, Sampling, check_prompts, check_room, prefill


def usable_device(name: str) -> str:
    """The device of that name; auto is a GPU where there is one, else the CPU.

    Raises:
        ValueError: if there is none, or it cannot be used.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"device={name} cannot be used here ({reason}): take cpu") from None
    return name


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


class Writer:
    """A run's model and tokenizer, and the settings under which it goes on with texts.

    Raises:
        ValueError, FileNotFoundError: if the run or its tokenizer cannot be used.
    """

    def __init__(self, run: RunDir, cfg: dict[str, Any], sampling: Sampling) -> None:
        self.tokenizer = load_tokenizer(run)
        device = usable_device(cfg["device"])
        self.model = load_model(run, cfg["checkpoint"], device, cfg["dtype"])
        if self.tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"{run.path / 'tokenizer.json'} makes {self.tokenizer.vocab_size} ids but the "
                f"model knows {self.model.vocab_size}: it is not the tokenizer the model was "
                "trained with"
            )
        self.cfg = cfg
        self.sampling = sampling
        self.cost = Cost()

    def encode(self, texts: list[str], unread: list[int], n_read: int) -> list[list[int]]:
        """Ids of each text, after those a state has not read; all within the model's context.

        No text at all goes on from the state alone. Raises ValueError for what cannot be run.
        """
        prompts = [unread + ids for ids in self.tokenizer.encode_batch(texts or [""])]
        if not texts and not unread:
            raise ValueError("nothing is left of the saved text to go on from: give prompt=TEXT")
        if [] in prompts:
            raise ValueError(
                f"prompt {prompts.index([]) + 1} has no token: give a text to go on from"
            )
        check_prompts(self.model, prompts)
        check_room(self.model, n_read + max(map(len, prompts)), self.cfg["max_tokens"])
        return prompts

    def read(self, prompt: list[int], past: Past | None) -> Past:
        """The state after a prompt, of which nothing is drawn."""
        state, before = (past.state, past.ids[0]) if past else (self.model.init_state(1), [])
        ids = torch.tensor([prompt], device=self.model.emb.weight.device)
        start = time.perf_counter()
        with torch.inference_mode():
            _, state = prefill(self.model, ids, state, self.cfg["chunk_len"])
        self.cost.add("prefill", len(prompt), start)
        return Past(state, [before + prompt])

    def write(
        self,
        prompts: list[list[int]],
        first: int,
        past: Past | None,
        show: Callable[[int, str], object],
    ) -> tuple[Generation, list[list[int]]]:
        """Go on with a batch of prompts; `show(row, text)` gets the text of each as it comes.

        `first` is the number of the first prompt among all. Returns the new ids of each row, and
        the generation, whose state is that of the row that ended last.
        """
        seeds = [self.cfg["seed"] + first + row for row in range(len(prompts))]
        going = Generation(
            self.model,
            prompts,
            self.sampling,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            vocab_size=self.tokenizer.vocab_size,
            past=past,
            chunk_len=self.cfg["chunk_len"],
        )
        streams = [TextStream(self.tokenizer, self.cfg["stop"]) for _ in prompts]
        new: list[list[int]] = [[] for _ in prompts]
        part, n_tokens = "prefill", sum(map(len, prompts))
        while going.rows:
            start = time.perf_counter()
            drawn = going.step()
            self.cost.add(part, n_tokens, start)
            ended = []
            for row, token in drawn:
                if token != self.tokenizer.eot_id:
                    new[row].append(token)
                    show(row, streams[row].push(token))
                full = streams[row].stopped or len(new[row]) == self.cfg["max_tokens"]
                if full or token == self.tokenizer.eot_id:
                    show(row, streams[row].finish())
                    ended.append(row)
            going.end(ended)
            part, n_tokens = "decode", len(going.rows)
        self.cost.n_new += sum(map(len, new))
        return going, new
