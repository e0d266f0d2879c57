"""The import rules of CONTRIBUTING.md, held by parsing every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p for d in ("models", "experiments", "analysis") for p in (ROOT / d).rglob("*.py"))
FORBIDDEN = {
    "models": {"experiments", "analysis", "lightning", "hydra", "omegaconf", "lm_eval", "pandas"},
    "experiments": {"analysis", "pandas", "matplotlib"},
    "analysis": {"models", "experiments", "torch", "lightning", "lm_eval"},
}
ONLY_IN = {
    "lm_eval": {
        "experiments/benchmarks/evaluate.py",
        "experiments/evaluate.py",
        "experiments/evaluation/adapter.py",
        "experiments/evaluation/lm_eval_cli.py",
        "experiments/evaluation/tasks.py",
        "experiments/evaluation/scores.py",
        "experiments/evaluation/task_files.py",
    },
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path: Path) -> None:
    relative = path.relative_to(ROOT)
    names = imported(path)
    assert not names & FORBIDDEN[relative.parts[0]]
    if relative.parts[0] == "analysis" and relative.name != "report.py":
        assert not names & {"hydra", "omegaconf"}
    for package, allowed in ONLY_IN.items():
        assert package not in names or relative.as_posix() in allowed


def test_no_drawer_for_odds_and_ends() -> None:
    names = {p.name for p in FILES} | {p.parent.name for p in FILES}
    assert not names & {"utils.py", "common.py", "helpers.py", "utils", "helpers", "common"}


def test_models_import_alone() -> None:
    """The library part works where only torch is installed: nothing else gets imported."""
    code = (
        "import sys, models.rwkv4.model, models.gpt.model, models.sizing, models.generation\n"
        "bad = {'lightning', 'hydra', 'pandas', 'lm_eval', 'transformers'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
