"""The tasks that `evaluate` scores: lm-eval's by name, and our own (`held_out_tasks.py`).

Rows come from the hub or, without any network, from a pack; what a task asks and how it is scored
is always the installed lm-eval's, or in a file of the user's.
"""

import difflib
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config.entry import one_line
from experiments.evaluation.held_out_tasks import OWN_TASKS
from experiments.evaluation.pack import Pack, content_hash
from experiments.evaluation.task_files import (
    data_set_names,
    definition,
    scored_split,
    task_config,
    task_from_rows,
)
from experiments.system.files import sha256

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from experiments.data.token_data import TokenData


class Tasks:
    """The tasks asked for, each loaded once, when it is first needed.

    Args:
        names: lm-eval's names of tasks, groups or tags, or those of `OWN_TASKS`; or one alone.
        include_path: a folder of further task yaml files, or None.
        seed: of the questions of our own tasks.
        pack: a folder that `experiments.prefetch` made, or None for the hub and its cache. With a
            pack a group stands for its tasks, without an average.
        n_documents: rows of whole official splits by task, where known.

    Raises:
        ValueError: for a name that nobody knows, with names like it, or none at all; for a pack
            that is damaged, lacks a task, or was made for another definition of one.
    """

    def __init__(
        self,
        names: list[str] | str,
        include_path: str | None,
        seed: int,
        pack: str | Path | None = None,
        n_documents: dict[str, int] | None = None,
    ) -> None:
        if not names:
            raise ValueError("no task to score: give tasks.tasks=[NAME,...]")
        if include_path is not None and not Path(include_path).is_dir():
            raise FileNotFoundError(f"tasks.include_path={include_path} is not a folder")
        self.names = list(dict.fromkeys([names] if isinstance(names, str) else map(str, names)))
        self.include_path = include_path
        self.seed = seed
        self.pack = Pack(pack) if pack is not None else None
        self._n_documents = n_documents or {}
        self._loaded: dict[tuple[str, str], dict[str, Any] | ValueError] = {}
        if self.pack is not None:
            self._check_pack(self.pack)
            return
        for name in self.names:
            if name not in OWN_TASKS and name not in self._manager.all_tasks:
                like = difflib.get_close_matches(name, [*OWN_TASKS, *self._manager.all_tasks], 5)
                hint = f"; like it are {', '.join(like)}" if like else ""
                raise ValueError(f"lm-eval knows no task {name!r}{hint}")

    def _check_pack(self, pack: Pack) -> None:
        """Expand the groups among `names`, and compare the pack with what is installed."""
        expanded = [leaf for name in self.names for leaf in pack.groups.get(name, [name])]
        self.names = list(dict.fromkeys(expanded))
        packed = [name for name in self.names if name not in OWN_TASKS]
        if lacking := [name for name in packed if name not in pack.tasks]:
            raise ValueError(
                f"{pack.path} has no task {', '.join(lacking)}: it has {', '.join(pack.tasks)}"
            )
        if pack.lm_eval != version("lm-eval"):
            raise ValueError(
                f"{pack.path} was made with lm-eval {pack.lm_eval}, here is {version('lm-eval')}: "
                "install that version, or make the pack again with this one"
            )
        for name in packed:
            here, there = definition(*self.task_file(name)), pack.tasks[name]["definition"]
            keys = sorted(here.keys() | there.keys())
            if differ := [key for key in keys if here.get(key) != there.get(key)]:
                raise ValueError(
                    f"task {name} is not defined here as in {pack.path} ({', '.join(differ)} "
                    "differ): use the task files the pack was made with, or make it again"
                )

    @cached_property
    def _local(self) -> "TaskManager | None":
        """The index of the user's own task files."""
        from lm_eval.tasks import TaskManager

        if self.include_path is None:
            return None
        return TaskManager(include_path=self.include_path, include_defaults=False)

    @cached_property
    def _manager(self) -> "TaskManager":
        """lm-eval's index of task files; reading all of its own takes ten seconds."""
        from lm_eval.tasks import TaskManager

        local = self._local
        if local and all(name in OWN_TASKS or name in local.all_tasks for name in self.names):
            return local
        print("reading the index of lm-eval's tasks ...", flush=True)
        return TaskManager(include_path=self.include_path)

    def is_own(self, name: str) -> bool:
        """Whether a file of the user's defines a task, group or tag."""
        return self._local is not None and name in self._local.task_index

    def task_file(self, name: str) -> tuple[Path, Path]:
        """A task's yaml file and the folder of task files it belongs to.

        Raises:
            ValueError: if neither the installed lm-eval nor the user has such a file.
        """
        from lm_eval import tasks

        root = Path(tasks.__file__).resolve().parent
        if self.is_own(name):
            assert self._local is not None
            assert self.include_path is not None
            file, root = self._local.task_index[name].yaml_path, Path(self.include_path).resolve()
        elif self.pack is not None:
            file = root / (self.pack.tasks[name]["source"] or "a user's own.yaml")
            if not file.resolve().is_relative_to(root):  # its code would be imported
                raise ValueError(f"{self.pack.path} names a file outside of lm-eval, {file}")
        else:
            file = self._manager.task_index[name].yaml_path
        if file is None or not file.is_file():
            raise ValueError(
                f"there is no file that defines task {name}: if it is one of your own, give the "
                "folder of its file as tasks.include_path"
            )
        return file.resolve(), root

    def uses_data(self, name: str) -> bool:
        """True if a task is made from the run's own held-out text."""
        return name in OWN_TASKS

    def members(self, name: str) -> list[str] | None:
        """Names of the tasks behind a name, None for a group, which must be loaded to tell."""
        if name in OWN_TASKS or self.pack is not None:
            return [name]
        found = self._manager.task_index[name]
        if found.kind.name == "TAG":
            return sorted(found.tags)
        return None if found.kind.name == "GROUP" else [name]

    def leaves(self, name: str) -> list[str]:
        """Names of the tasks behind a name, groups within groups followed.

        Raises:
            ValueError: for a group that changes settings of its tasks or defines some itself, and
                for a task of our own.
        """
        if name in OWN_TASKS:
            raise ValueError(f"{name} is made from each run's own text: it needs no pack")
        if (members := self.members(name)) is not None:
            return members
        index, leaves = self._manager.task_index, []
        for child in (index[name].cfg or {}).get("task") or []:
            if not isinstance(child, str) or child not in index:
                raise ValueError(f"group {name} defines tasks of its own: name other tasks instead")
            leaves += self.leaves(child)
        return list(dict.fromkeys(leaves))

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

        if data is not None:
            return {"tasks": {name: ConfigurableTask(config=OWN_TASKS[name](data, self.seed))}}
        if self.pack is not None:
            config = task_config(self.task_file(name)[0])
            return {"tasks": {name: task_from_rows(config, self.pack.dataset(name))}}
        try:
            return dict(self._manager.load([name]))
        except ImportError as error:
            if not (error.name or "").startswith("transformers"):
                raise
            for leaf in self.leaves(name):  # lm-eval keeps the code of a task file once imported
                task_config(self.task_file(leaf)[0])
            return dict(self._manager.load([name]))
        except OSError:
            if self.members(name) != [name]:
                raise
            config = task_config(self.task_file(name)[0])
            for other in data_set_names(config.get("dataset_path"))[1:]:
                with suppress(OSError):  # the cache may have it under another of its names
                    moved = ConfigurableTask(config={**config, "dataset_path": other})
                    return {"tasks": {name: moved}, "groups": {}}
            raise

    def pack_hash(self, name: str) -> str | None:
        """Hash of a task's rows and definition in the pack; None where they are not from one."""
        if self.pack is None or name not in self.pack.tasks:
            return None
        return self.pack.task_hash(name)[:16]

    def own_files_hash(self, name: str) -> str | None:
        """Hash of what defines a task of `include_path`, its Python files included; else None.

        For a group or tag, of all tasks there.
        """
        if not self.is_own(name):
            return None
        assert self._local is not None
        assert self.include_path is not None
        index, root = self._local.task_index, Path(self.include_path).resolve()
        found = [index[name]] if index[name].kind.name == "TASK" else index.values()
        files = sorted({one.yaml_path.resolve() for one in found if one.yaml_path})
        code = sorted({path for file in files for path in file.parent.glob("*.py")})
        definitions = [definition(file, root) for file in files]
        return content_hash([definitions, [sha256(path) for path in code]])[:16]

    def documents(self, name: str) -> dict[str, Any]:
        """What is known of a task's documents.

        `official`: how many its official split has, None where nobody said. `subset`: whether fewer
        are here, None where that is not known, as for a task from the hub that is not loaded yet.
        """
        if self.pack is not None and name in self.pack.tasks:
            return {key: self.pack.tasks[name][key] for key in ("official", "subset")}
        official = self._n_documents.get(name)
        subset = None
        for loaded in self._loaded.values():
            if official is not None and isinstance(loaded, dict) and name in loaded["tasks"]:
                task = loaded["tasks"][name]
                subset = len(task.dataset[scored_split(vars(task.config))]) < official
        return {"official": official, "subset": subset}


def load_failure(error: Exception) -> str:
    """Why a task could not be loaded and what to do, in one line."""
    if isinstance(error, OSError) and not isinstance(error, PermissionError):
        return (
            f"its documents are neither cached here nor can they be downloaded "
            f"({one_line(error)[:160]}): make a pack where there is a network "
            "(python -m experiments.prefetch) and give it as pack=DIR, or describe local files in "
            "a task yaml and give its folder as tasks.include_path"
        )
    return one_line(error)[:300]
