"""The rules of CONTRIBUTING.md about who imports whom and who names a family, held by parsing."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.families import families

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p for d in ("models", "experiments", "analysis") for p in (ROOT / d).rglob("*.py"))
FORBIDDEN = {
    "models": {"experiments", "analysis", "lightning", "hydra", "omegaconf", "lm_eval", "pandas"},
    "experiments": {"analysis", "pandas", "matplotlib"},
    "analysis": {"models", "experiments", "torch", "lightning", "lm_eval"},
}
# What each room of experiments/ may import, besides itself; "commands" are the files at the top.
BELOW_RUNS = {"config", "system", "data", "models"}
BELOW_TRAINING = BELOW_RUNS | {"runs"}
ROOMS = {
    "config": set(),
    "system": set(),
    "data": {"config", "system"},
    "runs": BELOW_RUNS,
    "training": BELOW_TRAINING,
    "sweeps": BELOW_TRAINING - {"models"},
    "generation": BELOW_TRAINING,
    "conversion": BELOW_TRAINING,
    "evaluation": BELOW_TRAINING | {"generation"},
    "benchmarks": BELOW_TRAINING | {"training", "generation", "evaluation", "conversion"},
}
ROOMS["commands"] = {*ROOMS, "models"}
# Libraries that only some rooms may import.
ONLY_IN = {
    "lm_eval": {"evaluation", "benchmarks"},
    "transformers": {"conversion", "benchmarks"},
    "rwkv": {"conversion", "benchmarks"},
    "lightning": {"config", "system", "data", "runs", "training", "sweeps", "benchmarks"},
}
NAMES_FAMILIES = {"analysis/published.py"}  # tables of published numbers


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(relative: Path) -> str:
    return relative.parts[1] if len(relative.parts) > 2 else "commands"


def rooms_of(names: set[str]) -> set[str]:
    """Rooms of experiments/, and "models", that some imported names are of."""
    rooms = set()
    for name in names:
        first, *rest = name.split(".")
        if first == "models":
            rooms.add("models")
        elif first == "experiments":
            rooms.add(rest[0] if rest[0] in ROOMS else "commands")
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path: Path) -> None:
    relative = path.relative_to(ROOT)
    names = imported(path)
    packages = {name.split(".")[0] for name in names}
    assert not packages & FORBIDDEN[relative.parts[0]]
    if relative.parts[0] == "analysis" and relative.name != "report.py":
        assert not packages & {"hydra", "omegaconf"}
    if relative.parts[0] == "experiments":
        room = room_of(relative)
        assert rooms_of(names) <= ROOMS[room] | {room}
        for package, rooms in ONLY_IN.items():
            assert package not in packages or room in rooms, package


def test_no_module_is_in_a_circle() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    arrows = {
        name: {
            other
            for found in imported(path)
            for other in (found, found.rpartition(".")[0])
            if other in modules and other != name
        }
        for name, path in modules.items()
    }
    done: set[str] = set()
    while ready := {name for name in arrows.keys() - done if arrows[name] <= done}:
        done |= ready
    assert arrows.keys() - done == set()


def code_words(path: Path) -> Iterator[str]:
    """Identifiers and texts of a file, without its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node not in docstrings:
                yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.alias):
            yield node.name


def test_no_file_outside_a_familys_folder_names_it() -> None:
    found = []
    for family in families().values():
        words = re.compile(rf"\b({family.name}|{family.model.__name__})\b")
        for path in FILES:
            relative = path.relative_to(ROOT).as_posix()
            if relative.startswith(f"models/{family.name}/") or relative in NAMES_FAMILIES:
                continue
            found += [(relative, word) for word in code_words(path) if words.search(word)]
    assert found == []


def test_no_drawer_for_odds_and_ends() -> None:
    names = {p.name for p in FILES} | {p.parent.name for p in FILES}
    assert not names & {"utils.py", "common.py", "helpers.py", "utils", "helpers", "common"}


def test_models_import_alone() -> None:
    """The library part works where only torch is installed: nothing else gets imported."""
    code = (
        "import sys, models.sizing, models.generation\n"
        "from models.families import families\n"
        "assert len(families()) >= 2\n"
        "bad = {'lightning', 'hydra', 'pandas', 'lm_eval', 'transformers'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
