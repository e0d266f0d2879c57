"""Published zero-shot scores (published/*.csv, a value a row) and how far ours are from them.

`flops_per_token` of a row follows the rule of our own manifests: training FLOPs of every matrix
product and of mixing over time at the training context, the embedding look-up not counted.
Tokens are empty where they are not known for sure, as for the two RWKV-4 models that were tuned
further at a longer context; those cannot be drawn against FLOPs.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import formats as fmt
from analysis.study import NothingToShowError, Study, mean_scores
from analysis.table import Column, Table

FOLDER = Path(__file__).with_name("published")
SIZE_TOLERANCE = 0.03
# the published families whose architecture is that of one of ours
SAME_FAMILY = {
    "rwkv4": ("RWKV-4", "RWKV-4 before tuning"),
    "gpt": ("Pythia v0", "Pythia v1", "Pythia v1 deduped"),
}
DRAWN = ("RWKV-4", "Pythia v0", "Pythia v1", "GPT-Neo", "OPT", "BLOOM")


@cache
def load_published() -> pd.DataFrame:
    """Every published value: family, model, parameters, training_tokens, flops_per_token, task
    (lm-eval's name), metric (lm-eval's bare name), value (accuracies as fractions), n_documents
    of the official split, source, and `flops` of training. NaN where not known."""
    frame = pd.concat([pd.read_csv(file) for file in sorted(FOLDER.glob("*.csv"))])
    return frame.assign(flops=frame["training_tokens"] * frame["flops_per_token"])


def published_lines(x: str, low: float, high: float, metrics: dict[str, str]) -> pd.DataFrame:
    """What to draw beside ours: of each family the sizes with `x` ("parameters" or "flops") between
    low and high, for the tasks and (bare) metrics given; one value a size and task, that of
    EleutherAI/pythia where the RWKV paper has one too."""
    frame = load_published()
    frame = frame[frame["family"].isin(DRAWN) & frame[x].between(low, high)]
    frame = frame[frame["task"].map(metrics) == frame["metric"]]
    frame = frame.drop_duplicates(["family", "parameters", "task"])  # pythia.csv is read first
    sizes = frame.groupby(["family", "task"])[x].transform("size")
    return frame[sizes > 1].sort_values(["family", "parameters"])


def published_notes(drawn: pd.DataFrame) -> list[str]:
    """What a reader must know of some published lines."""
    if not drawn["family"].eq("RWKV-4").any():
        return []
    return ["The paper's RWKV-4 3B and 14B were tuned at contexts of 4096 and 8192."]


def published_gap(study: Study) -> Table:
    """Our score beside each published one of the same family, size, task and metric."""
    runs, scores, _ = study.scored()
    scores = mean_scores(scores)
    scores["metric"] = scores["metric"].str.removesuffix(",none")
    scores["is_converted"] = scores["model"].isin(runs.loc[runs["converted"], "model"])
    published = load_published().add_prefix("published/")
    on = (["task", "metric"], ["published/task", "published/metric"])
    pairs = scores.merge(published, left_on=on[0], right_on=on[1])
    families = zip(pairs["family"], pairs["published/family"], strict=True)
    same = [
        published_family in SAME_FAMILY.get(family, ()) for family, published_family in families
    ]
    size = (pairs["published/parameters"] / pairs["parameters/total"] - 1).abs()
    pairs = pairs[np.array(same, bool) & (size <= SIZE_TOLERANCE)].reset_index(drop=True)
    if pairs.empty:
        raise NothingToShowError(
            "no score of ours has a published one of the same family, size (3 %), task and metric"
        )
    frame = pairs.drop(columns="is_converted").assign(**_gaps(pairs))
    columns = [
        Column("task", "task"),
        Column("metric", "metric"),
        Column("model", "model"),
        Column("score ± s.e.", lambda r: fmt.plus_minus(r["score"], r["stderr"], fmt.number)),
        Column("published model", "published/model"),
        Column("published", "published/value", fmt.number),
        Column("gap", "gap", lambda gap: ("+" if gap > 0 else "") + fmt.number(gap)),
        Column("gap in s.e.", "gap_in_se", lambda x: fmt.fixed(x, 1, "+")),
        Column("s.e. of", "error_of"),
        Column("documents", "documents"),
        Column("source", "published/source"),
    ]
    notes = [
        "Gap: ours minus published. s.e. of `ours`: the model was converted, so if it is that "
        "checkpoint both saw the same weights and documents, and our standard error is only a "
        "yardstick; likewise for a perplexity, whose published error is not known. `both`: two "
        "models; errors added in squares, the published one from its accuracy and number of "
        "documents, as if the documents were not the same: the true error is usually smaller.",
        "Harness, prompts and prefix of the published scores differ from ours in part: the paper's "
        "author put a newline before each request. Same size: total parameters within 3 %.",
    ]
    return Table("Published scores beside ours", frame, columns, notes)


def _gaps(pairs: pd.DataFrame) -> dict[str, pd.Series]:
    value, n = pairs["published/value"], pairs["published/n_documents"]
    gap = pairs["score"] - value
    known = (pairs["metric"] != "perplexity") & n.notna()
    both = known & ~pairs["is_converted"].astype(bool)
    published_variance = (value * (1 - value) / n).where(both, 0.0)
    error = np.sqrt(pairs["stderr"] ** 2 + published_variance)
    fewer = pairs["subset"].eq(True) | (pairs["n_documents"] < n)
    docs = [fmt.documents(*row) for row in zip(pairs["n_documents"], fewer, strict=True)]
    return {
        "gap": gap,
        "error": error,
        "gap_in_se": (gap / error).where(error > 0),
        "error_of": both.map({True: "both", False: "ours"}),
        "documents": pd.Series(docs, pairs.index),
    }
