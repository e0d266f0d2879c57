"""The tasks that `evaluate` scores: lm-eval's by name, and our own (`experiments/tasks.py`)."""

import difflib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.entry import one_line

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from experiments.data.token_data import TokenData


class Tasks:
    """The tasks asked for, each loaded once, when it is first needed.

    Args:
        names: lm-eval's names of tasks, groups or tags, or those of `OWN_TASKS`.
        include_path: a folder of further task yaml files, or None.
        seed: of the questions of our own tasks.

    Raises:
        ValueError: for a name that nobody knows, with names like it, or none at all.
    """

    def __init__(self, names: list[str], include_path: str | None, seed: int) -> None:
        from experiments.tasks import OWN_TASKS

        if not names:
            raise ValueError("no task to score: give tasks.tasks=[NAME,...]")
        if include_path is not None and not Path(include_path).is_dir():
            raise FileNotFoundError(f"tasks.include_path={include_path} is not a folder")
        self.names = list(dict.fromkeys(names))
        self.include_path = include_path
        self.seed = seed
        self._own = OWN_TASKS
        self._loaded: dict[tuple[str, str], dict[str, Any] | ValueError] = {}
        for name in self.names:
            if name not in OWN_TASKS and name not in self._manager.all_tasks:
                near = difflib.get_close_matches(name, [*OWN_TASKS, *self._manager.all_tasks], 5)
                hint = f"; like it are {', '.join(near)}" if near else ""
                raise ValueError(f"lm-eval knows no task {name!r}{hint}")

    @cached_property
    def _manager(self) -> "TaskManager":
        """lm-eval's index of task files; reading all of its own takes ten seconds."""
        from lm_eval.tasks import TaskManager

        if self.include_path is not None:
            local = TaskManager(include_path=self.include_path, include_defaults=False)
            if all(name in self._own or name in local.all_tasks for name in self.names):
                return local
        print("reading the index of lm-eval's tasks ...", flush=True)
        return TaskManager(include_path=self.include_path)

    def uses_data(self, name: str) -> bool:
        """True if a task is made from the run's own held-out text."""
        return name in self._own

    def members(self, name: str) -> list[str] | None:
        """Names of the tasks behind a name, None for a group, which must be loaded to tell."""
        if name in self._own:
            return [name]
        entry_ = self._manager.task_index[name]
        if entry_.kind.name == "TAG":
            return sorted(entry_.tags)
        return None if entry_.kind.name == "GROUP" else [name]

    def load(self, name: str, data: "TokenData | None") -> dict[str, Any]:
        """lm-eval's dictionary of task objects for a name; `data` for a task of our own.

        Raises:
            ValueError: if it cannot be built, for want of a network, say.
        """
        key = (name, data.fingerprint if data else "")
        if key not in self._loaded:
            try:
                self._loaded[key] = self._build(name, data)
            except Exception as error:  # task files run code of all kinds
                self._loaded[key] = ValueError(load_failure(error))
        loaded = self._loaded[key]
        if isinstance(loaded, ValueError):
            raise loaded
        return loaded

    def _build(self, name: str, data: "TokenData | None") -> dict[str, Any]:
        from lm_eval.api.task import ConfigurableTask

        if data is None:
            return dict(self._manager.load([name]))
        return {"tasks": {name: ConfigurableTask(config=self._own[name](data, self.seed))}}


def load_failure(error: Exception) -> str:
    """Why a task could not be loaded and what to do, in one line."""
    if isinstance(error, OSError) and not isinstance(error, PermissionError):
        return (
            f"its documents are neither cached here nor can they be downloaded "
            f"({one_line(error)[:160]}): load it once where there is a network and copy HF_HOME, "
            "or describe local files in a task yaml and give its folder as tasks.include_path"
        )
    return one_line(error)[:300]
