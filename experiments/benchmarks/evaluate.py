"""bench=evaluate: zero-shot scoring beside lm-eval's own `hf` backend, on the same weights.

Random weights of one size, in our models and in Hugging Face's; both score the same requests.
The harness's work on texts and metrics is the same for both and not timed.
"""

import json
import logging
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from experiments.benchmarks.measure import Report, Row, check_counts, interleaved
from experiments.benchmarks.models import at_size, copy_weights, hugging_face, with_random_weights
from experiments.data.tokenizer import Tokenizer, read_tokenizer
from experiments.evaluation.prefix_tree import NOTHING, Segment, plan
from experiments.evaluation.tasks import Tasks
from experiments.system.machine import measured_flops
from models.families import families
from models.language_model import LanguageModel

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from experiments.evaluation.adapter import LanguageModelLM

NOTES = [
    "Requests a second: all requests of the documents, over the median of the repeats; the hf "
    "backend's at the fastest of its batch sizes. Candidates take turns in one process.",
    "`run` is what we run: shared beginnings once, logits only where a token is scored. The limit "
    "is the time of its matrix products at the measured matmul rate.",
]


def evaluation(
    pack: str | None,
    task_names: list[str],
    n_documents: int,
    size: Row,
    ctx_len: int,
    hf_batch_sizes: list[int],
    repeats: int,
) -> Report:
    """Speed and equality of every family that transformers has, on each task.

    Args:
        pack: made by `experiments.prefetch`, with a tokenizer.
        size: the keys of a yaml of conf/size.

    Raises:
        ValueError: without transformers, or if the pack has no tokenizer or lacks a task.
    """
    check_counts(n_documents=n_documents, repeats=repeats, ctx_len=ctx_len)
    if pack is None:
        raise ValueError(
            "give the documents, pack=DIR: python -m experiments.prefetch tasks=base "
            "tasks.tasks=[arc_easy,lambada_openai] tokenizer_file=FILE out=DIR makes them"
        )
    if not hf_batch_sizes:
        raise ValueError("hf_batch_sizes is empty: give the batch sizes of the hf backend to try")
    if find_spec("transformers") is None:
        raise ValueError("bench=evaluate compares with transformers: pip install -e '.[dev]'")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    asked = Tasks(task_names, None, 0, pack)
    assert asked.pack is not None
    if asked.pack.tokenizer is None:
        raise ValueError(f"{pack} has no tokenizer: make it with tokenizer_file=FILE")
    tokenizer = read_tokenizer(str(asked.pack.tokenizer))
    rate = measured_flops(torch.device("cpu"), torch.float32)
    rows = []
    for family, arguments in at_size(size, tokenizer.vocab_size, ctx_len).items():
        model = with_random_weights(family, arguments)
        with torch.no_grad():
            model.head.weight.mul_(2)
        external = hf_backends(model, tokenizer, hf_batch_sizes)
        if external is None:
            continue
        from experiments.evaluation.adapter import LanguageModelLM

        ours = LanguageModelLM(model, tokenizer)
        for name in asked.names:
            task = asked.load(name, None)["tasks"][name]
            task.build_all_requests(limit=n_documents)
            row = {"model": families()[family].label, "task": name}
            rows.append(row | compare(ours, external, task.instances, repeats, rate))
    return Report({"Zero-shot scoring, float32": rows}, list(NOTES))


def hf_backends(
    model: LanguageModel, tokenizer: Tokenizer, batch_sizes: list[int]
) -> "dict[int, HFLM] | None":
    """lm-eval's hf backend at each batch size, on the model's weights; None if it has no twin."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer as Engine
    from transformers import PreTrainedTokenizerFast

    external = hugging_face(model, tokenizer.eot_id)
    if external is None:
        return None
    copy_weights(model, external)
    described = tokenizer.description()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Engine.from_str(json.dumps(described["tokenizer"])),
        **{f"{role}_token": described["eot"] for role in ("bos", "eos", "pad")},
    )
    shared: Any = {"tokenizer": fast, "max_length": model.ctx_len, "device": "cpu"}
    return {n: HFLM(pretrained=external.eval(), batch_size=n, **shared) for n in batch_sizes}


def compare(
    ours: "LanguageModelLM",
    external: "dict[int, HFLM]",
    requests: "list[Instance]",
    repeats: int,
    rate: float,
) -> Row:
    """Speeds of a task's requests, and how equal the answers are.

    Args:
        external: the hf backend by batch size.
        rate: FLOP/s of matrix products.
    """
    from experiments.evaluation.journal import Journal

    answers: dict[Any, list[tuple[float, bool]]] = {}

    def run(name: Any, backend: Any) -> None:
        ours.journal = Journal()  # or it would only look the answers up
        answers[name] = backend.loglikelihood(requests, disable_tqdm=True)

    backends: dict[Any, Any] = {"ours": ours, **external}
    for backend in backends.values():  # a whole round to warm up would take minutes
        backend.loglikelihood(requests[:4], disable_tqdm=True)
    candidates = {name: partial(run, name, backend) for name, backend in backends.items()}
    seconds = interleaved(candidates, repeats, warmup=0)
    best = min(external, key=seconds.median)
    pairs = [(ours.fit(before, after), tuple(after)) for _, before, after in ours.encode(requests)]
    n_tokens, n_scored = work(plan(pairs)[1])
    limit_s = matmul_flops(ours.model, n_tokens, n_scored, len(requests)) / rate
    both = list(zip(answers["ours"], answers[best], strict=True))
    return {
        "requests": len(requests),
        "tokens given": sum(len(context) + len(answer) - 1 for context, answer in pairs),
        "tokens run": n_tokens,
        "tokens scored": n_scored,
        "ours, requests/s": len(requests) / seconds.median("ours"),
        "hf, requests/s": len(requests) / seconds.median(best),
        "hf's batch": best,
        "ratio": seconds.ratio(best, "ours"),
        "time / limit": seconds.median("ours") / limit_s,
        "largest difference, nats": max(abs(a[0] - b[0]) for a, b in both),
        "greedy alike": all(a[1] == b[1] for a, b in both),
    }


def work(roots: list[Segment]) -> tuple[int, int]:
    """Tokens that a plan runs, and those that it scores."""
    todo = list(roots)
    n_tokens = n_scored = 0
    while todo:
        segment = todo.pop()
        n_tokens += len(segment.inputs)
        n_scored += sum(target != NOTHING for target in segment.targets)
        todo += segment.children
    return n_tokens, n_scored


def matmul_flops(model: LanguageModel, n_tokens: int, n_scored: int, n_requests: int) -> int:
    """The least FLOPs of matrix products for so many tokens run and scored."""
    head = 2 * model.vocab_size * model.n_embd
    body = model.matmul_flops_per_token(n_tokens // max(1, n_requests)) - head
    return n_tokens * body + n_scored * head
