"""Every architecture of conf/model at every size of conf/size, as a run is frozen with it."""

from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir

from experiments.config.entry import CONF_DIR
from experiments.config.targets import resolve
from experiments.runs.freezing import complete
from models.language_model import LanguageModel
from models.sizing import build_empty

MODELS = sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml"))
SIZES = sorted(path.stem for path in (CONF_DIR / "size").glob("*.yaml"))


@cache
def frozen(*overrides: str) -> dict[str, Any]:
    """The config that a command with these overrides would freeze; not to be changed."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return complete(compose("train", overrides=list(overrides)))


def net(model: str, size: str, vocab_size: int, ctx_len: int, *overrides: str) -> dict[str, Any]:
    """Arguments of a model's constructor, and its ``_target_``."""
    given = (f"model={model}", f"size={size}", f"data.vocab_size={vocab_size}")
    budget = (f"ctx_len={ctx_len}", "budget_tokens=1e9")
    return dict(frozen(*given, *budget, *overrides)["model"]["net"])


def empty(model: str, size: str, vocab_size: int, ctx_len: int, *overrides: str) -> LanguageModel:
    """The model without memory."""
    settings = net(model, size, vocab_size, ctx_len, *overrides)
    return build_empty(resolve(settings.pop("_target_"), LanguageModel), settings)
