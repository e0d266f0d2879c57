"""Train the run that a directory's frozen config describes: ``python -m experiments.fit RUN_DIR``.

``experiments.train`` starts this in a fresh process for every run; so do DDP's ranks and SLURM.
Nothing but the frozen config decides what happens here.
"""

import signal

if __name__ == "__main__":  # imports take seconds: Ctrl-C in them ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys

from experiments.config.entry import one_line_errors
from experiments.runs.run_dir import RunDir
from experiments.system.signals import die_with_parent
from experiments.training.fit import attempt


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m experiments.fit RUN_DIR")
    die_with_parent()
    with one_line_errors():
        attempt(RunDir(sys.argv[1]))


if __name__ == "__main__":
    main()
