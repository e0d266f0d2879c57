"""lm-eval's own command line, with run directories as a model of it:

    python -m experiments.evaluation.lm_eval_cli run --model rwkv_parity \\
        --model_args run=runs/demo/rwkv4_tiny/seed=0 --tasks arc_easy

All other options are lm-eval's. `--batch_size` is not used: batches are made of `batch_tokens`.
"""

from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from experiments.config.entry import one_line_errors
from experiments.evaluation.adapter import LanguageModelLM
from experiments.runs.run_dir import RunDir
from experiments.runs.trained_model import load_model, load_tokenizer


@register_model("rwkv_parity")
class RunDirLM(LanguageModelLM):
    """A finished run, trained here or converted.

    Args:
        run: its directory.
        checkpoint, dtype, prefix, rolling_ctx, batch_tokens, seed: as in conf/evaluate.yaml.
        device: what lm-eval's --device says; the CPU without it.
        batch_size, max_batch_size: lm-eval's, not used.

    Raises:
        FileNotFoundError, ValueError: if it is no run, has no tokenizer or checkpoint, or for
            another argument than these.
    """

    def __init__(
        self,
        run: str,
        checkpoint: str = "last",
        dtype: str = "float32",
        prefix: str = "eot",
        rolling_ctx: int | str = "trained",
        batch_tokens: int = 8192,
        seed: int = 0,
        device: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(f"rwkv_parity has no model_args {', '.join(unknown)}")
        directory = RunDir(run)
        model = load_model(directory, checkpoint, device or "cpu", dtype)
        super().__init__(model, load_tokenizer(directory), prefix, rolling_ctx, batch_tokens, seed)

    def get_model_info(self) -> dict[str, Any]:
        """What stands in lm-eval's result file: everything of the model that decides scores."""
        from experiments.runs.trained_model import weights_hash

        return self.protocol | {"weights": weights_hash(self.model)}


def main() -> None:
    """Hand the command line to lm-eval; bad input is one line, as with every other command."""
    with one_line_errors():
        cli_evaluate()


if __name__ == "__main__":
    main()
