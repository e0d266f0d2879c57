"""A run directory from somebody else runs no code, and nothing of it reaches outside.

Each attack is tried through every entry that takes a run directory. It must be refused in one line,
and the canary, a file that any success would make or change, must stay as it is.
"""

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments.config.entry import CONF_DIR, REPORTED, one_line
from experiments.config.identity import plain
from experiments.runs.run_dir import RunDir
from experiments.training.fit import attempt, fit

Entry = Callable[[Path], None]


def frozen(runs: Path, data: Path, text: Path) -> RunDir:
    given = ["data=text", "debug=smoke", "trainer=cpu", "model=rwkv4_pico", "suite=s"]
    given += [
        f"data.source.paths={text}",
        "data.val_tokens=20000",
        "budget_tokens=512",
        "n_threads=1",
    ]
    given += [f"paths.runs={runs}", f"paths.data={data}", "data.source.val_fraction=0.25"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return RunDir.freeze(compose("train", overrides=given), [])


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that every entry takes."""
    root = tmp_path_factory.mktemp("honest")
    (root / "a.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(3000)))
    run = frozen(root / "runs", root / "data", root / "a.txt")
    fit(run)
    return run.path


@pytest.fixture
def run(honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to be tampered with, in a folder that the canary shares."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RWKV_PARITY_SECRET", "secret")
    path = tmp_path / "theirs" / "s" / "rwkv4_pico" / "seed=0"
    shutil.copytree(honest, path)
    return path


def train(path: Path) -> None:
    (path / "result.json").unlink(missing_ok=True)
    attempt(RunDir(path))


@functools.cache
def composed(root: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(root, overrides=list(overrides))


def evaluate(path: Path) -> None:
    from experiments.evaluate import evaluate

    cfg = composed("evaluate", "tasks.limit=2", "n_threads=1")
    cfg.run = str(path)
    evaluate(cfg)


def generate(path: Path) -> None:
    from experiments.generate import generate

    cfg = plain(composed("generate", "max_tokens=2", "n_threads=1"))
    generate(cfg | {"run": str(path), "prompt": ["a"]})


def benchmark(path: Path) -> None:
    from experiments.benchmark import run

    overrides = ("bench=generate", "max_tokens=16", "repeats=1", "n_threads=1")
    run(plain(composed("benchmark", *overrides)) | {"run": str(path)})


def convert(path: Path) -> None:
    from experiments.convert import convert

    cfg = composed("convert", "source=x", "target=y", "check=false")
    convert(plain(cfg) | {"source": str(path), "target": str(path.parent / "out.pth")})


def show_batch(path: Path) -> None:
    from experiments.show_batch import show

    show({"run": str(path), "step": 1, "rows": 1, "ids": False})


ENTRIES: list[Entry] = [train, evaluate, generate, benchmark, convert, show_batch]
LOADERS: list[Entry] = [train, evaluate, generate, benchmark, convert]
TOUCH = "touch canary"
TEXTS: dict[str, Callable[[str], str]] = {
    "yaml apply": lambda t: t + "x: !!python/object/apply:os.system ['touch canary']\n",
    "yaml new": lambda t: t + "x: !!python/object/new:os.system ['touch canary']\n",
    "yaml name": lambda t: t + "x: !!python/name:os.system\n",
    "yaml module": lambda t: t + "x: !!python/module:os\n",
    "escaped interpolation": lambda t: t.replace("suite: s\n", 'suite: "\\x24{oc.env:HOME}"\n'),
    "a list": lambda t: "- 1\n",
    "not YAML": lambda t: "a: [",
    "not text": lambda t: "\x00\x01",
    "empty": lambda t: "",
}


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """What no attack may make."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()
    assert not (tmp_path.parent / "up").exists()


def refused(entry: Entry, path: Path, capsys: pytest.CaptureFixture[str], attack: str) -> str:
    """The one line that an entry refuses a run with."""
    try:
        with pytest.raises(REPORTED) as error:
            entry(path)
    except BaseException as other:
        other.add_note(f"{entry.__name__}, {attack}")
        raise
    told = capsys.readouterr().err.strip()  # evaluate tells of each run, and goes on
    lines = told.splitlines() or [f"error: {one_line(error.value)}"]
    assert all(line.startswith("error: ") for line in lines), attack
    assert "secret" not in told + str(error.value), attack
    return "".join(lines)
