"""Text from a run: ``python -m experiments.generate run=DIR prompt=TEXT key=value ...``.

The new text goes to standard output as it comes, and what it cost to standard error at the end.
"""

import sys

from omegaconf import DictConfig

from experiments.config.entry import as_typed, entry
from experiments.config.identity import plain

MANY = ("prompt", "stop")  # arguments that may be given more than once
AS_TYPED = (*MANY, "run", "prompts_file", "state", "save_state")


def main() -> None:
    typed, sys.argv[1:] = as_typed(sys.argv[1:], AS_TYPED, MANY)

    @entry("generate")
    def task(cfg: DictConfig) -> None:
        from experiments.generation.texts import generate

        generate(plain(cfg) | typed)

    task()


if __name__ == "__main__":
    main()
