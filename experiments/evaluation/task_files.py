"""A task file of lm-eval's: what it says, as data and as code, and the task made on given rows."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.evaluation.squad_metrics import stand_in

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

# Names of one data set on the hub: sets were moved, and a version of lm-eval names either.
SAME_DATA = (
    ("baber/piqa", "ybisk/piqa", "piqa"),
    ("aps/super_glue", "super_glue"),
    ("allenai/ai2_arc", "ai2_arc"),
    ("Rowan/hellaswag", "hellaswag"),
    ("allenai/winogrande", "winogrande"),
    ("allenai/openbookqa", "openbookqa"),
    ("allenai/sciq", "sciq"),
)


def data_set_names(path: str | None) -> list[str | None]:
    """A data set's name on the hub, and then the others it has or had."""
    same = next((names for names in SAME_DATA if path in names), ())
    return list(dict.fromkeys([path, *same]))


def definition(file: Path, root: Path) -> dict[str, Any]:
    """What a task file says, includes merged, as plain data; none of its code is imported.

    A function is the text `!function FILE.NAME`, the file relative to `root`, the (resolved) folder
    of task files.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    text = json.dumps(load_yaml(file, resolve_func=False), default=str)
    # lm-eval gives a function as an absolute path, which is another one on every machine
    return json.loads(text.replace(json.dumps(f"{root}/")[:-1], '"!function '))


def task_config(file: Path) -> dict[str, Any]:
    """What `ConfigurableTask` takes, from a task file; imports the code the file names.

    Raises:
        ValueError: if the task is a Python class.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config = load_yaml(file)
    except ImportError as error:
        if not (error.name or "").startswith("transformers"):
            raise
        with stand_in():
            config = load_yaml(file)
    if "class" in config:
        raise ValueError(f"task {config['task']} is a Python class, which a pack cannot hold")
    if not isinstance(config.get("metadata", {}), dict):
        config["metadata"] = {"_metadata": config["metadata"]}
    return {k: v for k, v in config.items() if k not in ("tag", "group", "task_list")}


def scored_split(config: dict[str, Any]) -> str:
    """The split a task is scored on: its test split, else its validation split."""
    split = config.get("test_split") or config.get("validation_split")
    if split is None:
        raise ValueError(f"task {config['task']} names neither a test nor a validation split")
    return split


def fewshot_split(config: dict[str, Any]) -> str | None:
    """The split few-shot examples are drawn from, None if they stand in the definition itself."""
    given = config.get("fewshot_config") or {}
    if split := given.get("split") or config.get("fewshot_split"):
        return split
    if given.get("samples") is not None:
        return None
    return config.get("training_split") or config.get("validation_split") or scored_split(config)


def task_from_rows(config: dict[str, Any], rows: "dict[str, Dataset]") -> "ConfigurableTask":
    """The task of a config on given rows, split -> rows; a split that is not given is empty.

    Asking it for few-shot examples of a split that is not given raises ValueError.
    """
    from lm_eval.api.samplers import ContextSampler
    from lm_eval.api.task import ConfigurableTask

    class NoExamples(ContextSampler):
        def sample(self, n: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
            if n > 0:
                raise ValueError(
                    f"the pack has no rows of split {examples!r} for few-shot examples: make it "
                    "with tasks.num_fewshot set, on a machine with a network"
                )
            return []

    examples, empty = fewshot_split(config), rows[scored_split(config)].select([])
    named = {config.get(f"{use}_split") for use in ("test", "validation", "training", "fewshot")}
    splits = {split: rows.get(split, empty) for split in named | {examples} if split}
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: splits})
    if examples is not None and examples not in rows:
        task.sampler = NoExamples()
    return task
