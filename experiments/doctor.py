"""Can this machine train? One screen of what is here, what is not and why, and what was tried.

Exit code 0 if training can run, 1 if a self-test failed.
"""

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from experiments.benchmarks import self_test
from experiments.benchmarks.measure import check_counts
from experiments.benchmarks.self_test import DTYPES, TOLERANCES, Rung
from experiments.config.entry import RunFailed, entry
from experiments.system.machine import device_name
from models.ops import build

NEEDED = ("torch", "lightning", "hydra-core", "lm-eval")
OPTIONAL = {  # and the extra of ours that each comes with
    "transformers": "dev",
    "cuda-core": "cuda",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "hydra-submitit-launcher": "slurm",
    "ray": "ray",
}
HUB_TIMEOUT_S = 2.0


def versions(packages: Iterable[str]) -> tuple[list[str], list[str]]:
    """ "package version" of those that are installed, and the names of those that are not."""
    found, absent = [], []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(package)
    return found, absent


def devices() -> dict[torch.device, str]:
    """The CPU and the first GPU of each kind, with what they are called."""
    n_threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = (
        f"{device_name(torch.device('cpu'))}, {n_threads} of {os.cpu_count()} threads, {capability}"
    )
    found = {torch.device("cpu"): cpu}
    kinds: dict[str, list[int]] = {}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        named = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
        kinds.setdefault(named, []).append(index)
    for named, indices in kinds.items():
        alike = f" ({len(indices)} of them)" if len(indices) > 1 else ""
        found[torch.device("cuda", indices[0])] = named + alike
    return found


def hub(timeout_s: float = HUB_TIMEOUT_S) -> str:
    """Whether a hub of models and data sets can be reached."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "offline by HF_HUB_OFFLINE"
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answer = f"{address} does not answer within {timeout_s:g} s"

    def ask() -> None:
        nonlocal answer
        try:
            request = urllib.request.Request(address, method="HEAD")
            with urllib.request.urlopen(request, timeout=timeout_s):
                answer = f"{address} answers"
        except urllib.error.HTTPError as error:
            answer = f"{address} answers with HTTP {error.code}"
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            answer = f"{address} cannot be reached ({self_test.one_line(Exception(reason))})"

    # looking a name up knows no timeout, so it is left behind where it takes too long
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answer


def compiler() -> str:
    """The C++ compiler that builds the kernels, or why there is none."""
    try:
        command = build._compiler()
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=10)
    except (build.BuildError, OSError, subprocess.SubprocessError) as error:
        return self_test.one_line(error)
    return f"{shlex.join(command)}: {(done.stdout.strip() or 'no version').splitlines()[0]}"


def cache() -> str:
    """Whether built kernels can be kept."""
    try:
        folder = build._cache_folder()
        with tempfile.TemporaryFile(dir=folder):
            return f"{short(folder)} is writable"
    except OSError as error:
        return f"not writable, so each process compiles anew ({self_test.one_line(error)})"


def disk(runs: Path) -> str:
    """Free space where runs are kept."""
    there = runs.absolute()
    while not there.exists():
        there = there.parent
    return f"{shutil.disk_usage(there).free / 2**30:.0f} GiB free for {short(runs)}"


def short(path: Path) -> str:
    """A path with ~ for the home folder."""
    home = os.path.expanduser("~")
    return str(path).replace(home, "~", 1) if str(path).startswith(home + os.sep) else str(path)


def row(name: str, text: str) -> str:
    """A line of the screen: a name, and what there is to say, 100 characters in all."""
    line = f"{name:<12}{text}".rstrip()
    return line if len(line) <= 100 else line[:99] + "…"


def speed_row(device: torch.device) -> str:
    """How fast a device multiplies matrices and copies."""
    try:
        *flops, copy = self_test.rates(device)
    except Exception as error:  # a driver's, or out of memory
        return row(str(device), f"FAILED: {self_test.one_line(error)}")
    cells = "".join(f"{f'{value / 1e9:,.0f} GFLOP/s':<18}" for value in flops)
    return row(str(device), f"{cells}{copy / 1e9:,.0f} GB/s")


def rung_row(device: torch.device, rung: Rung, live: str) -> str:
    """What one rung did on a device, or why it cannot be had."""
    if rung.missing or rung.broken:
        why = rung.missing or f"FAILED: {rung.broken}"
        return row(str(device), f"{rung.name:<11}{why}")
    cells = ""
    for error, limit, seconds in zip(rung.errors, TOLERANCES.values(), rung.seconds, strict=True):
        verdict = "ok" if error <= limit else "FAILED"
        cells += f"{f'{error:.1e} {verdict}':<16}{1000 * seconds:7.1f} ms  "
    return row(str(device), f"{rung.name:<11}{cells}{'live' if rung.name == live else ''}")


def machine(runs: Path) -> Iterator[str]:
    """What is installed and what is at hand."""
    found, absent = versions(NEEDED)
    yield row("versions", ", ".join([f"python {platform.python_version()}", *found]))
    if absent:
        yield row("", f"MISSING: {', '.join(absent)}")
    found, absent = versions(OPTIONAL)
    yield row("optional", ", ".join(found) or "none")
    if absent:
        extras = ",".join(OPTIONAL[name] for name in absent)
        yield row("", f"not installed: {', '.join(absent)}")
        yield row("", f"pip install -e '.[{extras}]' adds {'it' if len(absent) == 1 else 'them'}")
    yield row("compiler", compiler())
    yield row("kernels", cache())
    yield row("hub", hub())
    yield row("disk", disk(runs))


def examine(runs: Path) -> tuple[list[str], list[str]]:
    """The screen's lines, and what of it keeps training from running."""
    here = devices()
    lines: list[str] = []
    failures: list[str] = []
    with tqdm(total=1 + 4 * len(here), disable=not sys.stderr.isatty(), leave=False) as bar:

        def now(what: str) -> None:
            bar.set_postfix_str(what)
            bar.update()

        now("compiler, hub, disk")
        lines += machine(runs)
        lines += [row(str(device), text) for device, text in here.items()]
        if not torch.cuda.is_available():
            built = "PyTorch finds no GPU" if torch.version.cuda else "this PyTorch is without CUDA"
            lines.append(row("cuda", built))
        lines += ["", row("speed", "float32 matmul    bfloat16 matmul   copy (read + written)")]
        for device in here:
            now(f"speed of {device}")
            lines.append(speed_row(device))
        heads = "".join(f"{str(dtype)[6:]:<28}" for dtype in DTYPES)
        lines += ["", row("WKV", f"{'rung':<11}{heads}")]
        for device in here:
            now(f"WKV on {device}")
            live, rungs = self_test.rungs(device)
            lines += [rung_row(device, rung, live) for rung in rungs]
            failures += [f"WKV rung {rung.name} on {device}" for rung in rungs if not rung.ok]
            if live == "torch":
                lines.append(row("", f"RWKV on {device} takes the torch rung: right, but slower"))
        limits = " and ".join(f"{limit:g}" for limit in TOLERANCES.values())
        lines += [row("", f"worst relative RMS error of outputs and gradients (ok: {limits}), ms")]
        lines.append("")
        for device in here:
            for family in self_test.TOYS:
                now(f"a step of {family} on {device}")
                wrong = self_test.step(family, device)
                said = f"FAILED: {wrong}" if wrong else "an optimizer step works"
                lines.append(row(str(device), f"{family:<11}{said}"))
                failures += [f"a step of {family} on {device} ({wrong})"] if wrong else []
    return lines, failures


@entry("doctor")
def main(cfg: DictConfig) -> None:
    if cfg.n_threads is not None:
        check_counts(n_threads=cfg.n_threads)
        torch.set_num_threads(cfg.n_threads)
    lines, failures = examine(Path(cfg.paths.runs))
    print("\n".join(lines), flush=True)
    if failures:
        raise RunFailed(f"training cannot be trusted here: {'; '.join(failures)}")
    print("\ntraining can run", flush=True)


if __name__ == "__main__":
    main()
