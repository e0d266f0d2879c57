"""bench=decode: a token at a time, beside the `rwkv` package, Hugging Face, and the memory's rate.

B batch, T time.
"""

import copy
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks.measure import Report, Row, check_counts, interleaved, steady
from experiments.benchmarks.models import (
    at_size,
    copy_weights,
    has_package,
    hugging_face,
    with_random_weights,
)
from experiments.config.entry import RunFailed
from experiments.conversion.external import plain_rwkv
from models.families import families
from models.generation import prefill
from models.language_model import LanguageModel
from models.ops.linear import linear, round_matrices

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by the rwkv package's names
SHORT = 16  # tokens read before decoding, where a state does not grow with them
STREAM_INPUTS = 4096  # of the product that streams
NOTES = [
    "Weights are random, the same in every implementation of a family. Columns are medians; "
    "candidates take turns in one process. A step is a call of the model on each row's next token "
    "and the choice of the likeliest id after it.",
    "`read_bytes` is what a step must read: the weights but for the embedding, and the state. "
    "`limit_ms` is how long the faster stream takes for that, `of limit` the share of that in the "
    "time taken.",
]


@dataclass
class Candidate:
    """One implementation of a family's model, in one dtype.

    Attributes:
        model: the family's model in our code, which knows the sizes of its state.
        weight_bytes: what a step reads of the weights.
        read: (batch, tokens) -> the state after so many random tokens.
        step: (ids (B, 1), state) -> the ids after, and the state after.
        ours: whether it is our code, which alone is measured with a batch.
    """

    name: str
    dtype: str
    model: LanguageModel
    weight_bytes: int
    read: Callable[[int, int], Any]
    step: Callable[[Tensor, Any], tuple[Tensor, Any]]
    ours: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}"


def decode(
    size: Row,
    vocab_size: int,
    lengths: list[int],
    batch_size: int,
    n_tokens: int,
    stream_mb: int,
    repeats: int,
) -> Report:
    """Tokens/s of decoding, and what share of the memory's rate that is.

    Args:
        size: the keys of a yaml of conf/size.
        lengths: tokens read before decoding, for families whose state grows with them.

    Raises:
        ValueError: for settings that are not whole numbers of at least 1.
        RunFailed: if an implementation with the same weights chooses other tokens than ours.
    """
    check_counts(vocab_size=vocab_size, batch_size=batch_size, n_tokens=n_tokens)
    check_counts(stream_mb=stream_mb, repeats=repeats)
    for length in lengths:
        check_counts(lengths=length)
    ctx_len = max([SHORT, *lengths]) + n_tokens
    report = Report(notes=list(NOTES))
    with steady(report), plain_rwkv(), torch.inference_mode():
        os.environ["RWKV_JIT_ON"] = "1"  # as it is fastest; plain_rwkv puts back what was there
        found = []
        for family, arguments in at_size(size, vocab_size, ctx_len).items():
            found += implementations(with_random_weights(family, arguments))
        check_agreement(found, n_tokens)
        cases = [(one, 1, length) for one in found for length in lengths_of(one, lengths)]
        cases += [(one, batch_size, SHORT) for one in found if one.dtype == "fp32" and one.ours]
        streams, rows = decoding(cases, stream_mb, n_tokens, repeats)
        report.tables["Decoding"] = rows
        report.tables[f"Limit: reading {stream_mb} MiB"] = streams
    return report


def lengths_of(one: Candidate, lengths: list[int]) -> list[int]:
    """The lengths at which a candidate is measured: one where its state does not grow."""
    grows = one.model.state_bytes(1, 2) > one.model.state_bytes(1, 1)
    return lengths if grows else [SHORT]


def implementations(model: LanguageModel) -> list[Candidate]:
    """Ours in all dtypes, float32 first, and what else is installed, all with these weights."""
    found = [of_ours(model, dtype) for dtype in DTYPES]
    external = hugging_face(model)
    if external is not None:
        copy_weights(model, external)
        found.append(of_hugging_face(model, external.eval()))
    if has_package(model):
        found += of_rwkv_package(model)
    return found


def label(model: LanguageModel) -> str:
    """What tables call the model's family."""
    return families()[model.family].label


def of_ours(model: LanguageModel, dtype: str) -> Candidate:
    """A copy of the model, its matrices in dtype."""
    rounded = round_matrices(copy.deepcopy(model), DTYPES[dtype])

    def read(batch: int, n: int) -> Any:
        ids, state = random_ids(model.vocab_size, batch, n), rounded.init_state(batch)
        x, state = prefill(rounded, ids, state)
        rounded.head(x)
        return state

    def step(ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, after = rounded(ids, state)
        return logits[:, -1:].argmax(-1), after

    size = weight_bytes(rounded, rounded.emb)
    return Candidate(label(model), dtype, model, size, read, step, ours=True)


def of_hugging_face(model: LanguageModel, external: Any) -> Candidate:
    """Transformers' model, in float32; its state is whatever its output carries but logits."""

    def read(batch: int, n: int) -> Any:
        return state_of(external(random_ids(model.vocab_size, batch, n), use_cache=True))

    def step(ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        out = external(ids, use_cache=True, **state)
        return out.logits[:, -1:].argmax(-1), state_of(out)

    def state_of(out: Any) -> Any:
        return {key: out[key] for key in ("state", "past_key_values") if key in out}

    size = weight_bytes(external, external.get_input_embeddings())
    return Candidate(f"Hugging Face's {label(model)}", "fp32", model, size, read, step)


def of_rwkv_package(model: LanguageModel) -> list[Candidate]:
    """The package with this model's weights in all dtypes, compiled by TorchScript as it is."""
    from rwkv.model import RWKV

    def read(package: Any, batch: int, n: int) -> Any:
        return package.forward(random_ids(model.vocab_size, 1, n)[0].tolist(), None)[1]

    def step(package: Any, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = package.forward([int(ids)], state)
        return logits.argmax().view(1, 1), state

    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        torch.save(model.state_dict(), path.with_suffix(".pth"))
        for dtype in DTYPES:
            package = RWKV(model=str(path), strategy=f"cpu {dtype}", verbose=False)
            size = weight_bytes(model, model.emb) * DTYPES[dtype].itemsize // 4
            calls = partial(read, package), partial(step, package)
            found.append(Candidate("rwkv package", dtype, model, size, *calls))
    return found


def weight_bytes(model: nn.Module, embedding: nn.Module) -> int:
    """Of all parameters but the embedding, of which a token reads one row."""
    read = (p for p in model.parameters() if p is not embedding.weight)
    return sum(p.numel() * p.element_size() for p in read)


def random_ids(vocab_size: int, batch: int, n: int) -> Tensor:
    """Ids (B, T = n), the same in every call."""
    return torch.randint(vocab_size, (batch, n), generator=torch.Generator().manual_seed(0))


def check_agreement(found: list[Candidate], n_tokens: int) -> None:
    """Raise RunFailed unless all float32 candidates of a model decode the same tokens."""
    chosen: dict[LanguageModel, list[int]] = {}
    for one in found:
        if one.dtype != "fp32":
            continue
        ids, state, new = first_ids(1), one.read(1, SHORT), []
        for _ in range(n_tokens):
            ids, state = one.step(ids, state)
            new.append(int(ids))
        expected = chosen.setdefault(one.model, new)  # ours comes first
        if new != expected:
            raise RunFailed(f"{one.name} decodes {new} where ours decodes {expected}")


def first_ids(batch: int) -> Tensor:
    """Ids (B, 1) to start with."""
    return torch.zeros(batch, 1, dtype=torch.int64)


def decoding(
    cases: list[tuple[Candidate, int, int]], stream_mb: int, n_tokens: int, repeats: int
) -> tuple[list[Row], list[Row]]:
    """A row for each way to stream through memory, and one for each candidate, batch and length."""
    weight = torch.ones(stream_mb * 2**18 // STREAM_INPUTS, STREAM_INPUTS)
    x = torch.ones(1, STREAM_INPUTS)
    streams: dict[str, Callable[[], Any]] = {
        "torch.sum": weight.sum,
        "our product of one row": partial(linear, x, weight),
    }
    keys = [(str(one), one.dtype, batch, length) for one, batch, length in cases]
    candidates: dict[Any, Callable[[], Any]] = dict(streams)
    for key, (one, batch, length) in zip(keys, cases, strict=True):
        state = one.read(batch, length)
        candidates[key] = partial(seconds_a_step, one, batch, state, n_tokens)
    seconds = interleaved(candidates, repeats, warmup=2)
    rates = {name: stream_mb * 2**20 / seconds.median(name) for name in streams}
    limit = max(rates.values())
    ours: dict[Any, Any] = {}  # by what two candidates must share to be compared
    rows = []
    for key, (one, batch, length) in zip(keys, cases, strict=True):
        took = seconds.median(key)
        n_bytes = one.weight_bytes + one.model.state_bytes(batch, length)
        row: Row = {"model": one.name, "dtype": one.dtype, "batch": batch, "tokens before": length}
        row |= {"tokens_per_s": batch / took, "step_ms": took * 1e3, "read_bytes": n_bytes}
        row |= {"limit_ms": n_bytes / limit * 1e3, "of limit": n_bytes / limit / took}
        first = ours.setdefault((one.model, *key[1:]), key)
        rows.append(row | {"time over ours": seconds.ratio(key, first)})
    return [{"stream": name, "GB/s": rate / 1e9} for name, rate in rates.items()], rows


def seconds_a_step(one: Candidate, batch: int, state: Any, n_tokens: int) -> float:
    """Mean over n_tokens steps from this state, which stays as it is."""
    state, ids = copy.deepcopy(state), first_ids(batch)
    start = time.perf_counter()
    for _ in range(n_tokens):
        ids, state = one.step(ids, state)
    return (time.perf_counter() - start) / n_tokens
