"""``continue_to=TOKENS``: a run that begins where a finished one ended, with a larger budget.

It has a directory of its own, beside the one of the same command without ``continue_to``, which it
only reads. The schedule of the learning rate is that of the new budget from the first new step on.
"""

from pathlib import Path

from experiments.config.identity import config_difference, plain
from experiments.runs.checkpoints.files import BEST, check, checkpoint_to_resume, duplicate
from experiments.runs.run_dir import RunDir
from experiments.system.files import write_text


def continued_run(run: RunDir) -> RunDir | None:
    """The finished run that a run continues, or None if it starts from nothing.

    Raises:
        ValueError: if that run is not there, not finished, or of another config.
    """
    if run.config.continue_to is None:
        return None
    name = run.config.continues
    path = run.path.parent / Path(name).name
    if not (path / "config.yaml").is_file() or not RunDir(path).finished:
        raise ValueError(
            f"continue_to={run.config.continue_to} resumes {path}, which is not finished: "
            "run the same command without continue_to first"
        )
    before = RunDir(path)
    differences = config_difference(plain(before.config), plain(run.config))
    differences = [line for line in differences if not line.startswith("continue")]
    if differences:
        raise ValueError(f"{path} has another config ({'; '.join(differences[:5])}): use its own")
    return before


def starting_point(run: RunDir, is_global_zero: bool) -> Path | None:
    """The checkpoint to resume from: the run's own, else that of the run it continues, else None.

    Raises:
        ValueError: if there is one, but damaged; or as `continued_run`.
    """
    checkpoint = checkpoint_to_resume(run.checkpoints)
    before = None if checkpoint else continued_run(run)
    if before is None:
        return checkpoint
    last = before.checkpoint("last")
    check(last)
    if is_global_zero:
        run.checkpoints.mkdir(exist_ok=True)
        duplicate(before.checkpoint("best"), run.checkpoints / BEST)
        write_text(run.metrics_file, before.metrics_file.read_text("utf-8"))
    return last
