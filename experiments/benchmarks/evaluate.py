"""bench=evaluate: zero-shot scoring beside lm-eval's own `hf` backend, on the same weights.

Random weights of one shape, in our models and in Hugging Face's; both score the same requests.
The harness's work on texts and metrics is the same for both and not timed.
"""

import logging
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from experiments.benchmarks.measure import Report, Row, bar, check_counts, interleaved, paired_ratio
from experiments.evaluation.prefix_tree import NOTHING, Segment, plan
from experiments.evaluation.tasks import Tasks
from models import convert
from models.gpt.model import GPT
from models.language_model import LanguageModel
from models.rwkv4.model import RWKV4

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from experiments.data.tokenizer import Tokenizer
    from experiments.evaluation.adapter import LanguageModelLM

# how many times as many requests a second as lm-eval's hf backend
WANTED = {
    ("rwkv4", "arc_easy"): 5.0,
    ("rwkv4", "lambada_openai"): 3.0,
    ("gpt", "arc_easy"): 3.0,
    ("gpt", "lambada_openai"): 2.0,
}
CLOSE = 1e-3  # nats that a request's log-likelihood may differ by
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
    n_embd: int,
    n_layer: int,
    n_head: int,
    ctx_len: int,
    hf_batch_sizes: list[int],
    repeats: int,
) -> Report:
    """Speed and equality of both families on each task.

    Raises:
        ValueError: without transformers, or if the pack has no tokenizer or lacks a task.
    """
    check_counts(n_documents=n_documents, repeats=repeats, n_embd=n_embd, n_layer=n_layer)
    if pack is None:
        raise ValueError(
            "give the documents, pack=DIR: python -m experiments.prefetch tasks=base "
            "tasks.tasks=[arc_easy,lambada_openai] tokenizer_file=FILE out=DIR makes them"
        )
    if not hf_batch_sizes:
        raise ValueError("hf_batch_sizes is empty: give the batch sizes of the hf backend to try")
    if find_spec("transformers") is None:
        raise ValueError("bench=evaluate compares with transformers: pip install -e '.[dev]'")
    from experiments.data.tokenizer import read_tokenizer
    from experiments.system.machine import measured_flops

    asked = Tasks(task_names, None, 0, pack)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    assert asked.pack is not None
    if asked.pack.tokenizer is None:
        raise ValueError(f"{pack} has no tokenizer: make it with tokenizer_file=FILE")
    tokenizer = read_tokenizer(str(asked.pack.tokenizer))
    rate = measured_flops(torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    V = tokenizer.vocab_size
    models = [
        RWKV4(V, n_layer, n_embd, ctx_len=ctx_len),
        GPT(V, n_layer, n_embd, n_head, ctx_len=ctx_len),
    ]
    rows: list[Row] = []
    equal: list[Row] = []
    bars: list[Row] = []
    for model in models:
        ours, theirs = backends(randomised(model), tokenizer, hf_batch_sizes)
        for name in asked.names:
            task = asked.load(name, None)["tasks"][name]
            task.build_all_requests(limit=n_documents)
            row, same = compare(ours, theirs, task, repeats, rate)
            rows.append({"model": model.family, "task": name} | row)
            equal.append({"model": model.family, "task": name} | same)
            what = f"{model.family} on {name}: requests/s over lm-eval's hf backend"
            if (model.family, name) in WANTED:
                bars.append(bar(what, row["ratio"], WANTED[model.family, name]))
    worst = max(row["largest difference"] for row in equal)
    bars.append(bar("largest difference of a log-likelihood, nats", worst, CLOSE, at_most=True))
    return Report(
        {"Speed, float32": rows, "Equality": equal, "Against what is wanted": bars}, list(NOTES)
    )


def randomised(model: LanguageModel) -> LanguageModel:
    """Weights whose predictions differ from token to token: no tensor is left at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        model.head.weight.mul_(2)
    return model.eval()


def backends(
    model: LanguageModel, tokenizer: "Tokenizer", batch_sizes: list[int]
) -> "tuple[LanguageModelLM, dict[int, HFLM]]":
    """Our adapter, and lm-eval's hf backend at each batch size, on the same weights."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from experiments.evaluation.adapter import LanguageModelLM

    fields = convert.hf_config(model, tokenizer.eot_id, "float32")
    kind = f"hf_{fields['model_type']}"
    twin = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    newest = {theirs: newer for newer, theirs in convert.ALIASES.get(kind, {}).items()}
    names = {name: convert.outside_name(name, kind) for name in model.state_dict()}
    weights = {newest.get(names[k], names[k]): v for k, v in model.state_dict().items()}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not [name for name in missing if convert.file_name(name, kind)]
    described = tokenizer.description()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_engine(described["tokenizer"]),
        **{f"{role}_token": described["eot"] for role in ("bos", "eos", "pad")},
    )
    theirs = {
        n: HFLM(
            pretrained=twin.eval(),
            tokenizer=fast,
            max_length=model.ctx_len,
            batch_size=n,
            device="cpu",
        )
        for n in batch_sizes
    }
    return LanguageModelLM(model, tokenizer), theirs


def _engine(tokenizer: dict[str, Any]) -> Any:
    import json

    from tokenizers import Tokenizer as Engine

    return Engine.from_str(json.dumps(tokenizer))


def compare(
    ours: "LanguageModelLM", theirs: "dict[int, HFLM]", task: Any, repeats: int, rate: float
) -> tuple[Row, Row]:
    """Speeds of a task's requests, and how equal the answers are."""
    from experiments.evaluation.journal import Journal

    requests = list(task.instances)
    answers: dict[str, list[tuple[float, bool]]] = {}

    def run(name: str, backend: Any) -> None:
        if backend is ours:
            ours.journal = Journal()  # or it would only look the answers up
        answers[name] = backend.loglikelihood(requests, disable_tqdm=True)

    candidates: dict[str, Callable[[], Any]] = {"ours": partial(run, "ours", ours)}
    candidates |= {str(n): partial(run, str(n), one) for n, one in theirs.items()}
    for backend in (ours, *theirs.values()):  # a whole round to warm up would take minutes
        backend.loglikelihood(requests[:4], disable_tqdm=True)
    seconds = interleaved(candidates, repeats, warmup=0)
    best = min((str(n) for n in theirs), key=lambda name: statistics.median(seconds[name]))
    n_tokens, n_scored, floor = work(ours, requests, rate)
    mine = statistics.median(seconds["ours"])
    row = {
        "requests": len(requests),
        "tokens given": sum(len(x) + len(y) - 1 for x, y in encoded(ours, requests)),
        "tokens run": n_tokens,
        "tokens scored": n_scored,
        "ours, requests/s": len(requests) / mine,
        "hf, requests/s": len(requests) / statistics.median(seconds[best]),
        "hf's batch": int(best),
        "ratio": paired_ratio(seconds[best], seconds["ours"]),
        "time / limit": mine / floor,
    }
    pairs = list(zip(answers["ours"], answers[best], strict=True))
    same = {
        "largest difference": max(abs(a[0] - b[0]) for a, b in pairs),
        "greedy alike": all(a[1] == b[1] for a, b in pairs),
        "acc, ours": accuracy(task, answers["ours"]),
        "acc, hf": accuracy(task, answers[best]),
    }
    return row, same


def encoded(
    lm: "LanguageModelLM", requests: "list[Instance]"
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Context and answer of each request, as ids."""
    return [(lm.fit(before, after), tuple(after)) for _, before, after in lm.encode(requests)]


def work(lm: "LanguageModelLM", requests: "list[Instance]", rate: float) -> tuple[int, int, float]:
    """Tokens run, tokens scored, and the least seconds of their matrix products."""
    todo: list[Segment] = list(plan(encoded(lm, requests))[1])
    n_tokens = n_scored = 0
    while todo:
        segment = todo.pop()
        n_tokens += len(segment.inputs)
        n_scored += sum(target != NOTHING for target in segment.targets)
        todo += segment.children
    model = lm.model
    head = 2 * model.vocab_size * model.n_embd
    body = model.matmul_flops_per_token(n_tokens // max(1, len(requests))) - head
    return n_tokens, n_scored, (n_tokens * body + n_scored * head) / rate


def accuracy(task: Any, answers: list[tuple[float, bool]]) -> float:
    """The task's `acc` over its documents."""
    by_document: dict[int, list[tuple[int, tuple[float, bool]]]] = {}
    for instance, answer in zip(task.instances, answers, strict=True):
        by_document.setdefault(instance.doc_id, []).append((instance.idx, answer))
    documents = {instance.doc_id: instance.doc for instance in task.instances}
    scores = [
        task.process_results(documents[number], [answer for _, answer in sorted(one)])["acc"]
        for number, one in by_document.items()
    ]
    return float(statistics.mean(map(float, scores)))
