"""What ``experiments.generate`` does: texts in, their continuations to standard output."""

import sys
from pathlib import Path
from typing import Any

import torch

from experiments.config.checks import Number, Optional, Rule, check_values
from experiments.generation.generator import Generator
from experiments.generation.state_file import load_state, save_state
from experiments.runs.run_dir import open_external
from models.generation import Past

COUNT = Number(1, whole=True)
SETTINGS: dict[str, Rule] = {
    "max_tokens": Number(0, whole=True),
    "temperature": Number(0),
    "top_k": Optional(COUNT),
    "top_p": Optional(Number(0, above=True, most=1)),
    "repetition_penalty": Number(0, above=True),
    "seed": Number(0, whole=True, most=2**62),
    "batch_size": COUNT,
    "chunk_len": COUNT,
    "n_threads": Optional(COUNT),
}
LONGEST_TITLE = 60  # characters of a prompt above its continuation


def generate(settings: dict[str, Any]) -> None:
    """Do what the keys of conf/generate.yaml say.

    Raises:
        ValueError, FileNotFoundError: for what cannot be done, before any text is written.
    """
    if settings["run"] is None:
        raise ValueError("say which run is to write: run=DIR, a run directory")
    check_values({key: settings[key] for key in SETTINGS}, SETTINGS)
    texts = read_prompts(settings)
    settings = settings | {"stop": as_list(settings["stop"])}
    if "" in settings["stop"]:
        raise ValueError("stop is empty: give the text to stop before, or leave it out")
    state, save = (
        Path(settings[key]) if settings[key] else None for key in ("state", "save_state")
    )
    if (state or save) and len(texts) > 1:
        raise ValueError(f"a state is that of one text: give one prompt, not {len(texts)}")
    if settings["max_tokens"] == 0 and not save:
        raise ValueError("max_tokens=0 writes nothing: give save_state=FILE, or more tokens")
    if save and not save.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {save.parent} to save a state in: make it")
    if settings["n_threads"] is not None:
        torch.set_num_threads(settings["n_threads"])
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    generator = Generator(open_external(settings["run"]), settings)
    if len(texts) > 1:
        continue_all(generator, texts, settings["batch_size"])
    else:
        continue_one(generator, texts, state, save)
    print(generator.cost.text(), file=sys.stderr)


def as_list(given: Any) -> list[str]:
    """Texts that were given as one, as a list, or not at all."""
    if given is None:
        return []
    return [str(text) for text in (given if isinstance(given, list) else [given])]


def read_prompts(settings: dict[str, Any]) -> list[str]:
    """The texts to continue, in order; none with a saved state alone.

    Raises:
        ValueError, FileNotFoundError: if there is none, more than one source, or an empty one.
    """
    prompts, file = as_list(settings["prompt"]), settings["prompts_file"]
    if prompts and file is not None:
        raise ValueError("give either prompt=TEXT or prompts_file=FILE")
    if file is not None:
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no prompts_file {file}")
        try:
            prompts = Path(file).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError:
            raise ValueError(f"prompts_file {file} is not UTF-8 text: convert it") from None
    elif prompts == ["-"]:
        prompts = [sys.stdin.read()]
    for number, text in enumerate(prompts, 1):
        if not text:
            raise ValueError(f"prompt {number} is empty: give at least one character to go on from")
    if not prompts and settings["state"] is None:
        raise ValueError(
            "nothing to go on from: give prompt=TEXT, prompt=- (standard input), "
            "prompts_file=FILE or state=FILE"
        )
    return prompts


def continue_one(
    generator: Generator, texts: list[str], state: Path | None, save: Path | None
) -> None:
    """Continue one text, from a saved state where given, and save the state after it."""
    past, unread = load_state(state, generator.model) if state else (None, [])
    before = past.ids[0] if past else []
    (prompt,) = generator.encode(texts, unread, len(before))
    generation, (new,) = generator.write([prompt], 0, past, lambda row, text: show(text))
    if generator.max_tokens:
        show("\n")
    if save:
        ids, n_read = before + prompt + new, generation.n_read
        after = Past(generation.state, [ids[:n_read]])
        save_state(save, after, ids[n_read:], generator.model)


def continue_all(generator: Generator, texts: list[str], batch_size: int) -> None:
    """Continue several texts, a batch at a time, each under a line that names it."""
    prompts = generator.encode(texts, [], 0)
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        made = [""] * len(batch)

        def gather(row: int, text: str, made: list[str] = made) -> None:
            made[row] += text

        generator.write(batch, first, None, gather)
        for number, (text, new) in enumerate(zip(texts[first:], made, strict=False), first + 1):
            title = " ".join(text.split())
            if len(title) > LONGEST_TITLE:
                title = f"{title[: LONGEST_TITLE - 3]}..."
            show(f"--- {number}: {title}\n{new}\n")


def show(text: str) -> None:
    """Text to standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
