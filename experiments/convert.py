"""Take in or give out a checkpoint: ``python -m experiments.convert source=PATH target=PATH``.

From a `.pth`, a `.safetensors` or a folder in Hugging Face's format to a run directory, which
evaluate, generate and benchmark take like any other; or from a run directory to one of those.
"""

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.config.checks import Flag, Number, OneOf, Optional, Rule, check_values
from experiments.config.entry import as_typed, entry
from experiments.config.identity import plain

RULES: dict[str, Rule] = {
    "ctx_len": Optional(Number(1, whole=True)),
    "training_tokens": Optional(Number(1, whole=True)),
    "dtype": OneOf(None, "float32", "bfloat16", "float16"),
    "checkpoint": OneOf("last", "best"),
    "rescaled": OneOf(None, True, False),
    "check": Flag(),
}
ENDINGS = (".pth", ".safetensors")
PATHS = ("source", "target", "tokenizer_file")
OF_IMPORT = ("tokenizer_file", "ctx_len", "training_tokens", "rescaled")


def convert(settings: dict[str, Any]) -> None:
    """Convert as the keys of conf/convert.yaml say.

    Raises:
        FileNotFoundError, ValueError: for what is wrong with them, or with the files they name.
    """
    check_values(settings, RULES)
    source, target = (Path(str(settings.pop(key))).expanduser() for key in ("source", "target"))
    if not source.exists():
        raise FileNotFoundError(f"there is no source={source}")
    if target.exists():
        raise ValueError(f"target={target} exists: choose another name, or remove it")
    is_run = (source / "config.yaml").is_file()
    if not is_run and target.suffix in ENDINGS:
        raise ValueError(
            f"source={source} is no run directory, and only a run is written as a {target.suffix}: "
            "convert it to a run directory first (target=runs/NAME/MODEL/LABEL)"
        )

    from experiments.conversion.exchange import export_checkpoint, import_checkpoint

    if is_run:
        for key in OF_IMPORT:
            if settings.pop(key) is not None:
                raise ValueError(f"{key}= is for external checkpoints: {source} is a run")
        export_checkpoint(source, target, **settings)
        return
    if settings.pop("checkpoint") != "last":
        raise ValueError(f"checkpoint= is for runs: {source} is external and has only one")
    if settings["tokenizer_file"] is not None:
        settings["tokenizer_file"] = Path(str(settings["tokenizer_file"])).expanduser()
    import_checkpoint(source, target, **settings)


def main() -> None:
    typed, sys.argv[1:] = as_typed(sys.argv[1:], PATHS)

    @entry("convert")
    def task(cfg: DictConfig) -> None:
        convert(plain(cfg) | typed)

    task()


if __name__ == "__main__":
    main()
