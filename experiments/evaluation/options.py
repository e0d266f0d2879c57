"""Options of the lm-eval adapter: a task's generation options, the prefix, the rolling window."""

from typing import Any, NamedTuple

from experiments.data.tokenizer import Tokenizer
from experiments.evaluation.prefix_tree import Tokens
from models.language_model import LanguageModel


class GenerationOptions(NamedTuple):
    """lm-eval's generation_kwargs, as far as this suite's generator knows them."""

    until: tuple[str, ...]
    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None

    @classmethod
    def parse(cls, kwargs: dict[str, Any]) -> "GenerationOptions":
        """Read a task's options; ValueError names one that would be ignored."""
        rest = dict(kwargs)
        until = rest.pop("until", None) or []
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        limits = [rest.pop(name) for name in names if rest.get(name) is not None]
        temperature = rest.pop("temperature", None)
        do_sample = rest.pop("do_sample", None)
        if do_sample is None:
            do_sample = bool(temperature)
        top_k, top_p = rest.pop("top_k", None), rest.pop("top_p", None)
        unknown = [name for name, value in rest.items() if value is not None]
        if unknown:
            raise ValueError(
                f"generation option {', '.join(unknown)} is not supported; supported are until, "
                "max_gen_toks, do_sample, temperature, top_k, top_p"
            )
        return cls(
            until=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
            max_tokens=int(limits[0]) if limits else 256,  # lm-eval's default
            temperature=float(1.0 if temperature is None else temperature) if do_sample else 0.0,
            top_k=top_k,
            top_p=top_p,
        )


Prompt = tuple[Tokens, GenerationOptions, int]  # the number counts equal requests before it


def prefix_token(tokenizer: Tokenizer, prefix: str) -> int | None:
    """The id that stands before a text without context, None for no prefix."""
    if prefix == "none":
        return None
    if prefix == "eot":
        return tokenizer.eot_id
    if prefix != "newline":
        raise ValueError(f"prefix must be eot, newline or none, got {prefix!r}")
    ids = tokenizer.encode("\n")
    if len(ids) != 1:
        raise ValueError(f"prefix=newline: this tokenizer makes {len(ids)} tokens of a line end")
    return ids[0]


def rolling_window(model: LanguageModel, rule: int | str) -> int | None:
    """Tokens of one rolling window under a rule; None: the whole document.

    Raises:
        ValueError: for an unknown rule, or a number beyond what the model may see.
    """
    if rule == "trained":
        return model.ctx_len
    if rule == "max":
        return model.max_ctx
    if not isinstance(rule, int) or rule < 1:
        raise ValueError(f"rolling_ctx must be trained, max or a number of tokens, got {rule!r}")
    if model.max_ctx is not None and rule > model.max_ctx:
        raise ValueError(
            f"rolling_ctx={rule} is more than this {model.family} may see ({model.max_ctx})"
        )
    return rule
