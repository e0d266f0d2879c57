"""Text from a run: ``python -m experiments.generate run=DIR prompt=TEXT key=value ...``.

The new text goes to standard output as it comes, and what it cost to standard error at the end.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from experiments.config.entry import as_typed, entry
from experiments.config.identity import plain
from experiments.runs.run_dir import RunDir

if TYPE_CHECKING:
    from experiments.generation.generator import Writer
    from models.generation import Sampling

MANY = ("prompt", "stop")  # arguments that may be given more than once
AS_TYPED = (*MANY, "run", "prompts_file", "state", "save_state")


def read_prompts(cfg: dict[str, Any]) -> list[str]:
    """The texts to go on from, in order; none with a saved state alone.

    Raises:
        ValueError, FileNotFoundError: if there is none, more than one source, or an empty one.
    """
    given, file = cfg["prompt"], cfg["prompts_file"]
    if given is not None and file is not None:
        raise ValueError("give either prompt=TEXT or prompts_file=FILE")
    if file is not None:
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no prompts_file {file}")
        try:
            given = Path(file).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError:
            raise ValueError(f"prompts_file {file} is not UTF-8 text: convert it") from None
    elif given is None:
        given = []
    prompts = [str(text) for text in (given if isinstance(given, list) else [given])]
    if file is None and prompts == ["-"]:
        prompts = [sys.stdin.read()]
    for number, text in enumerate(prompts, 1):
        if not text:
            raise ValueError(f"prompt {number} is empty: give at least one character to go on from")
    if not prompts and cfg["state"] is None:
        raise ValueError(
            "nothing to go on from: give prompt=TEXT, prompt=- (standard input), "
            "prompts_file=FILE or state=FILE"
        )
    return prompts


def check(cfg: dict[str, Any]) -> "Sampling":
    """How to draw, once all settings that need no model were found to be possible ones."""
    from models.generation import Sampling

    for name, least in (("max_tokens", 0), ("batch_size", 1), ("chunk_len", 1), ("n_threads", 1)):
        value = cfg[name]
        if value is None and name == "n_threads":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if not isinstance(cfg["seed"], int) or not 0 <= cfg["seed"] < 2**62:
        raise ValueError(f"seed must be a whole number from 0 to below 2^62, got {cfg['seed']!r}")
    numbers = ("temperature", "top_k", "top_p", "repetition_penalty")
    for name in numbers:
        value = cfg[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number and not (value is None and name.startswith("top")):
            raise ValueError(f"{name} must be a number, got {value!r}")
    return Sampling(**{name: cfg[name] for name in numbers})


def write_one(writer: "Writer", texts: list[str], state: Path | None, save: Path | None) -> None:
    """Go on with one text, from a saved state where given, and save the state after it."""
    from experiments.generation.state_file import load_state, save_state
    from models.generation import Past

    past, unread = load_state(state, writer.model) if state else (None, [])
    before = past.ids[0] if past else []
    (prompt,) = writer.encode(texts, unread, len(before))
    if writer.cfg["max_tokens"] == 0:
        after, left = writer.read(prompt, past), []
    else:
        going, (new,) = writer.write([prompt], 0, past, lambda row, text: show(text))
        show("\n")
        ids = before + prompt + new
        after, left = Past(going.state, [ids[: going.n_read]]), ids[going.n_read :]
    if save:
        save_state(save, after, left, writer.model)


def write_all(writer: "Writer", texts: list[str], batch_size: int) -> None:
    """Go on with several texts, a batch at a time, each under a line that names it."""
    prompts = writer.encode(texts, [], 0)
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        made = [""] * len(batch)

        def gather(row: int, text: str, made: list[str] = made) -> None:
            made[row] += text

        writer.write(batch, first, None, gather)
        for number, (text, new) in enumerate(zip(texts[first:], made, strict=False), first + 1):
            start = " ".join(text.split())
            short = start if len(start) <= 60 else f"{start[:57]}..."
            show(f"--- {number}: {short}\n{new}\n")


def show(text: str) -> None:
    """Text to standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def generate(cfg: dict[str, Any]) -> None:
    """Do what a configuration of conf/generate.yaml says.

    Raises:
        ValueError, FileNotFoundError: for what cannot be done, before any text is written.
    """
    if cfg["run"] is None:
        raise ValueError("say which run is to write: run=DIR, a run directory")
    sampling = check(cfg)
    texts = read_prompts(cfg)
    stop = cfg["stop"]
    stops = [str(one) for one in ([stop] if isinstance(stop, str) else stop or [])]
    if "" in stops:
        raise ValueError("stop is empty: give the text to stop before, or leave it out")
    state, save = (Path(cfg[key]) if cfg[key] else None for key in ("state", "save_state"))
    if (state or save) and len(texts) > 1:
        raise ValueError(f"a state is that of one text: give one prompt, not {len(texts)}")
    if cfg["max_tokens"] == 0 and not save:
        raise ValueError("max_tokens=0 writes nothing: give save_state=FILE, or more tokens")
    run = RunDir(cfg["run"])

    import torch

    from experiments.generation.generator import Writer
    from experiments.generation.state_file import check_writable

    if save:
        check_writable(save)
    cfg = cfg | {"stop": stops}
    if cfg["n_threads"] is not None:
        torch.set_num_threads(cfg["n_threads"])
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    writer = Writer(run, cfg, sampling)
    if len(texts) > 1:
        write_all(writer, texts, cfg["batch_size"])
    else:
        write_one(writer, texts, state, save)
    print(writer.cost.text(), file=sys.stderr)


def main() -> None:
    typed, sys.argv[1:] = as_typed(sys.argv[1:], AS_TYPED, MANY)

    @entry("generate")
    def task(cfg: DictConfig) -> None:
        generate(plain(cfg) | typed)

    task()


if __name__ == "__main__":
    main()
