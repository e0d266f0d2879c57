"""bench=decode: a token at a time, beside the `rwkv` package, Hugging Face, and the memory's rate.

B batch, T time, C n_embd, V vocabulary, L layers.
"""

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.measure import Report, Row, bar, check_counts, interleaved, paired_ratio
from experiments.benchmarks.train import NAMES, build_model
from experiments.benchmarks.wkv import busy_seconds, freed_memory_kept
from experiments.config.entry import RunFailed
from experiments.conversion.external import plain_rwkv
from models.generation import prefill
from models.language_model import LanguageModel
from models.ops.linear import linear, round_matrices

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by the rwkv package's names
PACKAGE = "rwkv package"
SHORT = 16  # tokens read before decoding, where a state does not grow with them
WIDE = 4096  # inputs of the product that streams
NOTES = [
    "Weights are random. Columns are medians, ratios medians over rounds; candidates take turns in "
    "one process. A step is a call of the model on each row's next token and the choice of the "
    "likeliest id after it.",
    "`read_bytes` is what a step must read: the weights but for the embedding, and a GPT's cache, "
    "which is float32. `limit_ms` is how long the faster stream takes for that, `of limit` the "
    "share of that in the time taken.",
]

Step = Callable[[Any, Any], tuple[Any, Any]]


@dataclass
class Contender:
    """A model in one dtype."""

    name: str
    dtype: str
    weight_bytes: int  # what a step reads of them
    cache_bytes: int  # of each token and row
    read: Callable[[int, int], Any]  # (batch, tokens) -> state after random ones
    step: Step  # next ids, state -> the ids after, state after
    first: Callable[[int], Any]  # batch -> ids to start with


def decode(
    n_embd: int,
    n_layer: int,
    n_head: int,
    vocab_size: int,
    prompt_tokens: int,
    lengths: list[int],
    batch_size: int,
    n_tokens: int,
    stream_mb: int,
    repeats: int,
) -> Report:
    """Tokens/s of decoding and of reading a prompt, and what share of the memory's rate that is.

    Raises:
        ValueError: for settings that are not whole numbers of at least 1.
        RunFailed: if the rwkv package, with the same weights, chooses other tokens than ours.
    """
    sizes = {"n_embd": n_embd, "n_layer": n_layer, "n_head": n_head, "vocab_size": vocab_size}
    check_counts(**sizes, prompt_tokens=prompt_tokens, batch_size=batch_size, n_tokens=n_tokens)
    check_counts(stream_mb=stream_mb, repeats=repeats)
    for length in lengths:
        check_counts(lengths=length)
    sizes["ctx_len"] = max([prompt_tokens, SHORT, *lengths]) + n_tokens
    report, before = Report(notes=list(NOTES)), busy_seconds()
    with freed_memory_kept(), plain_rwkv():
        os.environ["RWKV_JIT_ON"] = "1"  # as it is fastest; plain_rwkv puts back what was there
        found = contenders(sizes, report.notes)
        check_agreement(found, n_tokens)
        cases = [
            (one, 1, length)
            for one in found
            for length in (lengths if "GPT" in one.name else [SHORT])
        ]
        cases += [(one, batch_size, SHORT) for one in found[:4] if one.dtype == "fp32"]
        rows, bars = decoding(cases, stream_mb, n_tokens, repeats, report.notes)
        report.tables["Decoding"] = rows
        readers = [one for one in found if not one.name.startswith("Hugging Face")]
        report.tables["Reading a prompt"], more = reading(readers, prompt_tokens, repeats)
    report.tables["Against what is wanted (of the default sizes)"] = bars + more
    own, others = (now - then for now, then in zip(busy_seconds(), before, strict=True))
    report.notes.append(
        f"Other processes used {max(others, 0) / own:.2f} CPU seconds for each of ours: above 0.05 "
        "or so no figure here can be trusted, as threads that wait for a held-up one suffer most."
    )
    return report


def contenders(sizes: dict[str, int], notes: list[str]) -> list[Contender]:
    """Ours in all dtypes, RWKV-4 first, and what else is installed, with RWKV-4's weights."""
    torch.manual_seed(0)
    ours = {kind: random_model(kind, sizes) for kind in ("rwkv4", "gpt")}
    found = [our_own(kind, ours[kind], dtype) for kind in ours for dtype in DTYPES]
    if find_spec("rwkv"):
        found += rwkv_package(ours["rwkv4"])
    else:
        notes.append("The rwkv package is not installed: pip install rwkv")
    if find_spec("transformers"):
        found += [hugging_face(kind, sizes) for kind in ("hf_rwkv", "hf_gpt_neox")]
    else:
        notes.append("Hugging Face's transformers is not installed: pip install transformers")
    return found


def random_model(kind: str, sizes: dict[str, int]) -> LanguageModel:
    """RWKV-4 or the GPT of its size, none of its weights zero."""
    model = build_model(kind, **sizes)[0]
    assert isinstance(model, LanguageModel)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model.eval()


def our_own(kind: str, model: LanguageModel, dtype: str) -> Contender:
    """A copy of the model, its matrices in dtype."""
    if dtype != "fp32":
        model = copy.deepcopy(model)
        round_matrices(model, DTYPES[dtype])

    def read(batch: int, n: int) -> Any:
        x, state = prefill(model, random_ids(model.vocab_size, batch, n), model.init_state(batch))
        model.head(x)
        return state

    def step(ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, after = model(ids, state)
        return logits[:, -1:].argmax(-1), after

    cache = model.state_bytes(1, 1) if kind == "gpt" else 0
    return Contender(NAMES[kind], dtype, weight_bytes(model), cache, read, step, first_ids)


def rwkv_package(model: LanguageModel) -> list[Contender]:
    """The package with this model's weights in all dtypes, compiled by TorchScript as it is."""
    found = []
    from rwkv.model import RWKV

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        torch.save(model.state_dict(), path.with_suffix(".pth"))
        for dtype in DTYPES:
            theirs = RWKV(model=str(path), strategy=f"cpu {dtype}", verbose=False)
            size = weight_bytes(model) * DTYPES[dtype].itemsize // 4
            found.append(package_contender(theirs, model.vocab_size, dtype, size))
    return found


def package_contender(theirs: Any, vocab_size: int, dtype: str, size: int) -> Contender:
    """The package's model as a contender; it knows no batches."""

    def read(batch: int, n: int) -> Any:
        return theirs.forward(random_ids(vocab_size, 1, n)[0].tolist(), None)[1]

    def step(token: int, state: Any) -> tuple[int, Any]:
        logits, state = theirs.forward([token], state)
        return int(logits.argmax()), state

    return Contender(PACKAGE, dtype, size, 0, read, step, lambda batch: 0)


def hugging_face(kind: str, sizes: dict[str, int]) -> Contender:
    """RwkvForCausalLM, or GPTNeoXForCausalLM with SDPA, as they are initialised."""
    model: Any = build_model(kind, **sizes)[0].eval()
    past = "state" if kind == "hf_rwkv" else "past_key_values"

    def read(batch: int, n: int) -> Any:
        return model(random_ids(sizes["vocab_size"], batch, n), use_cache=True)[past]

    def step(ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        out = model(ids, use_cache=True, **{past: state})
        return out.logits[:, -1:].argmax(-1), out[past]

    cache = 0 if kind == "hf_rwkv" else 8 * sizes["n_layer"] * sizes["n_embd"]
    return Contender(NAMES[kind], "fp32", weight_bytes(model), cache, read, step, first_ids)


def weight_bytes(model: Any) -> int:
    """Of all parameters but the embedding, of which a token reads one row."""
    embedding = model.emb if isinstance(model, LanguageModel) else model.get_input_embeddings()
    read = (p for p in model.parameters() if p is not embedding.weight)
    return sum(p.numel() * p.element_size() for p in read)


def first_ids(batch: int) -> Tensor:
    """Ids (B, 1) to start with."""
    return torch.zeros(batch, 1, dtype=torch.int64)


def random_ids(vocab_size: int, batch: int, n: int) -> Tensor:
    """Ids (B, n), the same in every call."""
    return torch.randint(vocab_size, (batch, n), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def check_agreement(found: list[Contender], n_tokens: int) -> None:
    """Raise RunFailed unless the package, if there, decodes as our RWKV-4 does in float32."""
    theirs = next((one for one in found if one.name == PACKAGE and one.dtype == "fp32"), None)
    if theirs is None:
        return
    written = []
    for one in (found[0], theirs):
        ids, state, mine = one.first(1), one.read(1, SHORT), []
        for _ in range(n_tokens):
            ids, state = one.step(ids, state)
            mine.append(int(ids))
        written.append(mine)
    if written[0] != written[1]:
        raise RunFailed(f"ours decodes {written[0]}, the rwkv package {written[1]}")


def decoding(
    cases: list[tuple[Contender, int, int]],
    stream_mb: int,
    n_tokens: int,
    repeats: int,
    notes: list[str],
) -> tuple[list[Row], list[Row]]:
    """A row for each contender, batch and length, beside the memory's rate; and bars."""
    candidates: dict[str, Callable[[], Any]] = streams(stream_mb)
    rates = list(candidates)
    names = [f"{one.name}, {one.dtype}, {batch}, {length}" for one, batch, length in cases]
    with torch.inference_mode():
        for name, (one, batch, length) in zip(names, cases, strict=True):
            state = one.read(batch, length)
            candidates[name] = partial(seconds_a_step, one, batch, state, n_tokens)
    seconds = interleaved(candidates, repeats, warmup=2)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    best = min(rates, key=lambda name: median[name])
    rate = stream_mb * 2**20 / median[best]
    slower = next(name for name in rates if name != best)
    notes.append(
        f"Streams over {stream_mb} MiB: {best} {rate / 1e9:.1f} GB/s, {slower} "
        f"{stream_mb * 2**20 / median[slower] / 1e9:.1f} GB/s."
    )
    rows = []
    for name, (one, batch, length) in zip(names, cases, strict=True):
        took = median[name]
        size = one.weight_bytes + batch * length * one.cache_bytes
        row: Row = {"model": one.name, "dtype": one.dtype, "batch": batch, "tokens before": length}
        row |= {"tokens_per_s": batch / took, "step_ms": took * 1e3, "read_bytes": size}
        rows.append(row | {"limit_ms": size / rate * 1e3, "of limit": size / rate / took})

    def faster(dtype: str) -> float | None:
        ours = f"{NAMES['rwkv4']}, {dtype}, 1, {SHORT}"
        theirs = f"{PACKAGE}, {dtype}, 1, {SHORT}"
        return paired_ratio(seconds[theirs], seconds[ours]) if theirs in seconds else None

    bars = [bar(f"RWKV-4 / rwkv package, cpu {d}, decoding", faster(d), 3.5) for d in DTYPES]
    batch = max(batch for _, batch, _ in cases)
    single, many = (f"{NAMES['rwkv4']}, fp32, {n}, {SHORT}" for n in (1, batch))
    gain = batch * paired_ratio(seconds[single], seconds[many])
    return rows, [*bars, bar(f"RWKV-4, tokens/s of a batch of {batch} / of one, fp32", gain, 4)]


def streams(stream_mb: int) -> dict[str, Callable[[], Any]]:
    """Two ways to read stream_mb MiB of float32."""
    weight, x = torch.ones(stream_mb * 2**18 // WIDE, WIDE), torch.ones(1, WIDE)

    def product() -> None:
        with torch.inference_mode():
            linear(x, weight)

    return {"torch.sum": weight.sum, "our product of one row": product}


@torch.inference_mode()
def seconds_a_step(one: Contender, batch: int, state: Any, n_tokens: int) -> float:
    """Mean over n_tokens steps from this state, which stays as it is."""
    state, ids = copy.deepcopy(state), one.first(batch)
    start = time.perf_counter()
    for _ in range(n_tokens):
        ids, state = one.step(ids, state)
    return (time.perf_counter() - start) / n_tokens


def reading(found: list[Contender], n: int, repeats: int) -> tuple[list[Row], list[Row]]:
    """A row for each contender, of reading n tokens and the logits of the last; and a bar."""

    def read(one: Contender) -> None:
        with torch.inference_mode():
            one.read(1, n)

    candidates: dict[str, Callable[[], Any]] = {
        f"{one.name}, {one.dtype}": partial(read, one) for one in found
    }
    seconds = interleaved(candidates, repeats, warmup=2)
    rows: list[Row] = []
    for one, times in zip(found, seconds.values(), strict=True):
        row: Row = {"model": one.name, "dtype": one.dtype, "tokens": n}
        rows.append(row | {"tokens_per_s": n / statistics.median(times)})
    ours, theirs = (seconds.get(f"{name}, fp32") for name in (NAMES["rwkv4"], PACKAGE))
    faster = paired_ratio(theirs, ours) if ours and theirs else None
    return rows, [bar("RWKV-4 / rwkv package, cpu fp32, reading a prompt", faster, 1.1)]
