"""bench=train: a training step of both families beside Hugging Face's models of the same sizes.

B batch, T time, C n_embd, V vocabulary, L layers.
"""

import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.benchmarks.measure import (
    Report,
    Row,
    bar,
    check_counts,
    interleaved,
    paired_ratio,
    peak_memory,
)
from experiments.training.loss import cross_entropy
from experiments.training.optimizer import make_optimizer
from models.gpt.model import GPT
from models.language_model import LanguageModel, count_parameters
from models.ops.wkv import live_backend
from models.rwkv4.model import RWKV4
from models.sizing import solve

TOY = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64, "ctx_len": 8, "batch_size": 2}
NAMES = {
    "rwkv4": "RWKV-4",
    "gpt": "GPT",
    "hf_rwkv": "Hugging Face RWKV",
    "hf_gpt_neox": "Hugging Face GPT-NeoX, SDPA",
}
MATMUL_SIZES = (1024, 2048)
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}


def train(
    n_embd: int,
    wide_n_embd: int,
    n_layer: int,
    n_head: int,
    vocab_size: int,
    ctx_len: int,
    batch_size: int,
    repeats: int,
    warmup: int,
) -> Report:
    """Tokens/s, share of the machine's matmul rate and peak memory of training steps."""
    sizes = {"n_layer": n_layer, "n_head": n_head, "vocab_size": vocab_size, "ctx_len": ctx_len}
    sizes["batch_size"] = batch_size
    check_counts(**sizes, n_embd=n_embd, wide_n_embd=wide_n_embd, repeats=repeats, warmup=warmup)
    report = Report()
    kinds = [kind for kind in NAMES if not kind.startswith("hf_") or find_spec("transformers")]
    if len(kinds) < len(NAMES):
        report.notes.append("transformers is not installed: its models are left out.")
    narrow, wide = {**sizes, "n_embd": n_embd}, {**sizes, "n_embd": wide_n_embd}
    shape = f"L={n_layer} V={vocab_size} T={ctx_len} B={batch_size}"
    speeds, bars = speed(kinds, narrow, repeats, warmup)
    shares, rates, share_bars = matmul_share(wide, repeats, warmup)
    report.tables = {
        f"Training step, C={n_embd} {shape}, float32": speeds,
        f"Matrix products, C={wide_n_embd} {shape}": shares,
        "Measured rate of square matrix products": rates,
        "Against what is wanted (of the default shape)": bars + share_bars,
    }
    report.notes += [
        f"WKV: {live_backend('cpu')}. A step is forward, loss, backward and fused AdamW; models "
        "take turns in one process. Columns are medians; ratios are medians over rounds.",
        "Memory: peak resident bytes of two steps in a fresh process, above that process after a "
        "step of a toy model: weights, gradients, optimizer state, activations, scratch. Freed "
        "blocks return to the system at once (glibc left to itself holds back 0 to 40 % more).",
        "Matmul rate: the best median of square products, taking turns with the steps.",
    ]
    return report


def speed(
    kinds: list[str], sizes: dict[str, int], repeats: int, warmup: int
) -> tuple[list[Row], list[Row]]:
    """A row a model, and the rows of the comparison between them."""
    seconds = interleaved(
        {kind: training_step(kind, "32-true", **sizes) for kind in kinds}, repeats, warmup=warmup
    )
    memory = {}
    for kind in kinds:
        chosen = {"kind": kind, "precision": "32-true"}
        memory[kind] = peak_memory(training_step, chosen | TOY, chosen | sizes)
    tokens = sizes["batch_size"] * sizes["ctx_len"]
    rows = []
    for kind in kinds:
        step_s = statistics.median(seconds[kind])
        size = count_parameters(build_model(kind, **sizes)[0])["total"]
        row = {"model": NAMES[kind], "parameters": size, "step_s": step_s}
        row |= {"tokens_per_s": tokens / step_s, "peak_mem_bytes": memory[kind]}
        rows.append(row)

    def faster(kind: str, other: str) -> float | None:
        known = kind in seconds and other in seconds
        return paired_ratio(seconds[other], seconds[kind]) if known else None

    ours, theirs = memory["rwkv4"], memory.get("hf_rwkv")
    bars = [
        bar("RWKV-4 / Hugging Face RWKV, tokens/s", faster("rwkv4", "hf_rwkv"), 3.5),
        bar("RWKV-4 / GPT, tokens/s", faster("rwkv4", "gpt"), 0.85),
        bar("GPT / Hugging Face GPT-NeoX, tokens/s", faster("gpt", "hf_gpt_neox"), 1.1),
        bar("RWKV-4 / Hugging Face RWKV, peak memory", ours / theirs if ours and theirs else None,
            0.5, at_most=True),
    ]  # fmt: skip
    return rows, bars


def matmul_share(
    sizes: dict[str, int], repeats: int, warmup: int
) -> tuple[list[Row], list[Row], list[Row]]:
    """FLOP/s of the models' matrix products over what the machine does on plain ones."""
    wanted = {"32-true": 0.6, "bf16-mixed": 0.4}
    dtypes = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
    candidates: dict[str, Callable[[], Any]] = {}
    flops: dict[str, int] = {}
    for precision in wanted:
        for n in MATMUL_SIZES:
            a = torch.randn(n, n).to(dtypes[precision])
            candidates[f"{precision}/{n}"] = partial(torch.mm, a, a)
            flops[f"{precision}/{n}"] = 2 * n**3
        for kind in ("rwkv4", "gpt"):
            candidates[f"{precision}/{kind}"] = training_step(kind, precision, **sizes)
            flops[f"{precision}/{kind}"] = matmul_flops(kind, sizes)
    seconds = interleaved(candidates, repeats, warmup)
    rate = {name: flops[name] / statistics.median(seconds[name]) for name in candidates}
    rates = [
        {"precision": p, "size": f"{n}^3", "GFLOP/s": rate[f"{p}/{n}"] / 1e9}
        for p in wanted
        for n in MATMUL_SIZES
    ]
    rows, bars = [], []
    for precision, least in wanted.items():
        best = max(rate[f"{precision}/{n}"] for n in MATMUL_SIZES)
        for kind in ("rwkv4", "gpt"):
            name = f"{precision}/{kind}"
            share = rate[name] / best
            row: Row = {"model": NAMES[kind], "precision": precision}
            row |= {"step_s": statistics.median(seconds[name]), "GFLOP/s": rate[name] / 1e9}
            rows.append({**row, "share": share})
            bars.append(bar(f"{NAMES[kind]}, share of the matmul rate, {precision}", share, least))
    return rows, rates, bars


def matmul_flops(kind: str, sizes: dict[str, int]) -> int:
    """FLOPs of the matrix products of one training step: forward, and twice that for backward."""
    with torch.device("meta"):
        model = build_model(kind, **sizes)[0]
    assert isinstance(model, LanguageModel)
    tokens = sizes["batch_size"] * sizes["ctx_len"]
    return 3 * model.matmul_flops_per_token(sizes["ctx_len"]) * tokens


def build_model(
    kind: str, n_embd: int, n_layer: int, n_head: int, vocab_size: int, ctx_len: int, **_: int
) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """One of NAMES, and its loss (ids, targets) -> mean nats; the GPTs have RWKV-4's size."""
    with torch.device("meta"):
        rwkv4 = RWKV4(vocab_size, n_layer, n_embd, ctx_len)
    sizes = {"vocab_size": vocab_size, "n_layer": n_layer, "n_embd": n_embd, "ctx_len": ctx_len}
    n_ffn = solve(GPT, {"n_head": n_head}, rwkv4, "non_embedding").n_ffn
    matched: dict[str, int] = sizes | {"n_head": n_head, "n_ffn": n_ffn}
    if kind in ("rwkv4", "gpt"):
        ours = RWKV4(vocab_size, n_layer, n_embd, ctx_len) if kind == "rwkv4" else GPT(**matched)
        return ours, lambda ids, targets: cross_entropy(
            ours.features(ids)[0], ours.head, targets, "full"
        )[0]
    theirs = hugging_face(kind, matched, rwkv4.n_ffn)
    return theirs, lambda ids, targets: F.cross_entropy(
        theirs(ids, use_cache=False).logits.flatten(0, 1).float(), targets.flatten()
    )


def hugging_face(kind: str, sizes: dict[str, Any], n_ffn: int) -> nn.Module:
    """Hugging Face's RWKV, or its GPT-NeoX with fused attention, of the sizes given."""
    import transformers

    common = {
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["n_embd"],
        "num_hidden_layers": sizes["n_layer"],
    }
    if kind == "hf_rwkv":
        context = {"context_length": sizes["ctx_len"], "intermediate_size": n_ffn}
        return transformers.RwkvForCausalLM(transformers.RwkvConfig(**common, **context))
    config = transformers.GPTNeoXConfig(
        **common,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # of every config
        num_attention_heads=sizes["n_head"],
        intermediate_size=sizes["n_ffn"],
        max_position_embeddings=sizes["ctx_len"],
    )
    return transformers.GPTNeoXForCausalLM(config)


def training_step(kind: str, precision: str, batch_size: int, **sizes: int) -> Callable[[], None]:
    """A model of NAMES, ready to take a step: forward, loss, backward, AdamW."""
    torch.manual_seed(0)
    model, loss = build_model(kind, **sizes)
    model.train()
    if isinstance(model, LanguageModel):
        optimizer = make_optimizer(model, peak_lr=1e-3, lr_scale=False, **ADAMW)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **ADAMW)
    tokens = torch.randint(sizes["vocab_size"], (batch_size, sizes["ctx_len"] + 1))
    ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    mixed = precision != "32-true"

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            nats = loss(ids, targets)
        optimizer.zero_grad(set_to_none=True)
        nats.backward()
        optimizer.step()

    return step
