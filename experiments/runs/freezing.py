"""What a composed config leaves open, filled in before it is frozen into a run directory.

The vocabulary of a tokenizer file, the width that gives a family its size, and the learning rate
that a search found: whatever is read from elsewhere is read once, here.
"""

import functools
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.config.checks import check_config
from experiments.config.identity import model_name, plain


def complete(config: DictConfig) -> dict[str, Any]:
    """Check a composed config and fill in what it leaves open.

    Returns:
        The config as plain values, as `fit` reads it.

    Raises:
        ValueError, OSError: if nothing could be trained with it.
    """
    if config.data.vocab_size is None:  # the tokenizer file knows it
        from experiments.data.prepare import prepare

        config.data.vocab_size = prepare(config.data, config.paths.data).vocab_size
    if "from" in config.optim and config.optim.peak_lr is None:
        suite = Path(config.paths.runs) / config.optim["from"]
        config.optim.peak_lr = searched_rate(suite, model_name(config))
    check_config(config)
    frozen = plain(config)
    frozen["model"].pop("own", None)  # recipes that were chosen from stand in optim and schedule
    if frozen["match"] is not None and frozen["model"]["net"].get("n_ffn") is None:
        frozen["model"] |= sized(frozen)
    return frozen


def sized(frozen: dict[str, Any]) -> dict[str, Any]:
    """The keys ``net`` (with its n_ffn) and ``match`` of a config's model.

    Raises:
        ValueError: if the model cannot be of the size that was asked for.
    """
    net = frozen["model"]["net"]
    shape = {key: frozen["size"][key] for key in frozen["size"] if key.startswith("n_")}
    given = {"vocab_size": net["vocab_size"], "ctx_len": net["ctx_len"], **shape}
    found = solved(json.dumps(net), json.dumps(given), frozen["size"]["reference"], frozen["match"])
    if abs(found["deviation"]) > frozen["match_tolerance"]:
        raise ValueError(
            f"{model_name(frozen)} comes no nearer to its size than {found['deviation']:+.1%} "
            f"({found['found']:,} {found['by']} where {found['wanted']:,} are wanted): change its "
            f"shape, or allow it with match_tolerance={abs(found['deviation']):.2g} or more"
        )
    n_ffn = found.pop("n_ffn")
    return {"net": net | {"n_ffn": n_ffn}, "match": found}


@functools.cache
def _solved(net: str, given: str, reference: str, by: str) -> Any:
    from experiments.config.targets import resolve
    from models.families import families
    from models.language_model import LanguageModel
    from models.sizing import build_empty, solve

    if reference not in families():
        raise ValueError(f"size.reference is {reference!r}: choose {', '.join(families())}")
    settings = {k: v for k, v in json.loads(net).items() if k not in ("_target_", "n_ffn")}
    architecture = resolve(json.loads(net)["_target_"], LanguageModel)
    return solve(
        architecture, settings, build_empty(families()[reference].model, json.loads(given)), by
    )


def solved(net: str, given: str, reference: str, by: str) -> dict[str, Any]:
    """A `Match` as the values that are frozen; JSON texts go in, so that they can be remembered."""
    match = _solved(net, given, reference, by)
    return {
        "by": match.by,
        "n_ffn": match.n_ffn,
        "wanted": match.wanted,
        "found": match.found,
        "deviation": round(match.deviation, 6),
    }


def searched_rate(suite: Path, model: str) -> float:
    """The peak learning rate with the lowest final held-out loss, averaged over seeds.

    Args:
        suite: the folder of a search's runs, which vary ``optim.peak_lr``.
        model: the name of the model, rwkv4_tiny for one.

    Raises:
        ValueError: if the search has no finished run of this model.
    """
    losses = defaultdict(list)
    for result in sorted(suite.glob(f"{model}/*/result.json")):
        config = OmegaConf.load(result.with_name("config.yaml"))
        loss = json.loads(result.read_text(encoding="utf-8"))["val/loss"]
        losses[float(OmegaConf.select(config, "optim.peak_lr"))].append(loss)
    if not losses:
        raise ValueError(
            f"optim=searched found no finished run of {model} in {suite}: train the search first "
            f"(experiment={suite.name}), name another with optim.from=SUITE, or give optim.peak_lr"
        )
    return min(losses, key=lambda rate: statistics.fmean(losses[rate]))
