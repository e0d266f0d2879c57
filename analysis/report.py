"""`python -m analysis.report suite=demo` writes runs/demo/report/ and prints its tables.

conf/report/<suite>.yaml (or default.yaml) lists the tables and figures, a function target each.
"""

import base64
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from analysis.study import NothingToShowError, Study, load_study
from analysis.style import DPI, Plot

CONF = Path(__file__).resolve().parent.parent / "conf"
PIXELS_PER_INCH = 116  # on the page, so that text is of one size in all figures


def build(
    suite: str,
    runs_dir: Path,
    contents: dict[str, str],
    reference: str,
    allow_mixed: bool = False,
) -> tuple[Path, str]:
    """Write the report of one suite; what was there before stays if this fails.

    Args:
        contents: a function `Study -> Table | Plot` for each name of a table or figure.
        reference: the family that the others are compared with.
        allow_mixed: put runs into one table that do not belong there.

    Returns:
        The path of its index.html, and its tables as text.

    Raises:
        ValueError, FileNotFoundError: for a suite without finished runs, runs that do not belong
            in one table, or a target that is no function.
    """
    folder = runs_dir / suite
    if not folder.is_dir():
        known = sorted(p.name for p in runs_dir.glob("*") if p.is_dir())
        there = f"there are: {', '.join(known)}" if known else "nothing has been trained there"
        raise FileNotFoundError(f"no suite {suite!r} in {runs_dir}/ ({there})")
    functions = {name: find_target(name, target) for name, target in contents.items()}
    study = load_study(folder, reference, allow_mixed)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".report-") as temporary:
        new = Path(temporary, "report")
        new.mkdir()
        text = _write(new, suite, study, functions)
        if (folder / "report").exists():
            (folder / "report").rename(Path(temporary, "old"))
        new.rename(folder / "report")
    return folder / "report" / "index.html", text


def _write(folder: Path, suite: str, study: Study, functions: dict[str, Callable[..., Any]]) -> str:
    sections, absent, texts = [], [], []
    for name, function in functions.items():
        try:
            item = function(study)
        except NothingToShowError as reason:
            absent.append(f"{name}: {reason}")
            continue
        section = {"name": name, "title": item.title, "notes": item.notes}
        if isinstance(item, Plot):
            item.figure.savefig(folder / f"{name}.png", dpi=DPI)
            image = (folder / f"{name}.png").read_bytes()
            section["image"] = base64.b64encode(image).decode()
            section["width"] = round(PIXELS_PER_INCH * item.figure.get_figwidth())
        else:
            (folder / f"{name}.csv").write_text(item.frame.to_csv(index=False))
            (folder / f"{name}.md").write_text(item.markdown())
            (folder / f"{name}.tex").write_text(item.latex())
            section["heads"], section["rows"] = item.texts()
            texts.append(f"{item.title}\n\n{item.markdown()}")
        sections.append(section)
    (folder / "index.html").write_text(_html(suite, study, sections, absent))
    return "\n".join([*texts, *(f"not shown: {line}" for line in absent)])


def _html(suite: str, study: Study, sections: list[dict[str, Any]], absent: list[str]) -> str:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2").render(
        suite=suite, n_runs=len(study.runs), n_out=len(study.left_out), sections=sections,
        n_converted=int(study.runs["converted"].sum()), absent=absent,
    )  # fmt: skip


def find_target(name: str, target: str) -> Callable[..., Any]:
    """The function behind a target of a report's yaml."""
    try:
        return hydra.utils.get_method(target)
    except Exception as error:
        raise ValueError(f"contents.{name}={target}: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    text = f"{error} {error.__cause__ or ''}".split("full_key:")[0]  # the rest is for developers
    return " ".join(text.split()) or type(error).__name__


def _guard(function: Callable[[], Any]) -> None:
    """One `error:` line and exit code 2 for what a user can cause."""
    try:
        function()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _report(cfg: DictConfig) -> None:
    contents = {name: target for name, target in cfg.contents.items() if target is not None}
    runs_dir = Path(cfg.paths.runs)
    index, text = build(cfg.suite, runs_dir, contents, cfg.reference, cfg.allow_mixed)
    print(f"{text}\n\n{index}")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="report")
def _run(cfg: DictConfig) -> None:
    _guard(lambda: _report(cfg))  # inside, for Hydra adds lines to what leaves a job


def main() -> None:
    """The command line; conf/report/<suite>.yaml is chosen here, if there is one."""
    chosen = [a.removeprefix("suite=") for a in sys.argv[1:] if a.startswith("suite=")]
    named = any(a.startswith("report=") for a in sys.argv[1:])
    if chosen and not named and (CONF / "report" / f"{chosen[-1]}.yaml").is_file():
        sys.argv.append(f"report={chosen[-1]}")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints and exits by itself
    _guard(_run)


if __name__ == "__main__":
    main()
