"""The doctor's screen: what is here, what is not and why, and what was tried."""

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.benchmarks import self_test
from experiments.benchmarks.self_test import DTYPES, TOLERANCES, Tried
from experiments.system.machine import copy_rate, device_name, measured_flops
from models.families import families
from models.ops import build

NEEDED = ("torch", "lightning", "hydra-core", "lm-eval")
OPTIONAL = {  # and the extra of ours that each comes with
    "transformers": "dev",
    "cuda-core": "cuda",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow-skinny": "mlflow",
    "hydra-submitit-launcher": "slurm",
    "ray": "ray",
}
HUB_TIMEOUT_S = 2.0


@dataclass
class Diagnosis:
    """The screen's lines, and what of it keeps training from running."""

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, name: str, text: str) -> None:
        """Add a line: a name, and what there is to say, 100 characters in all."""
        line = f"{name:<12}{text}".rstrip()
        self.lines.append(line if len(line) <= 100 else line[:99] + "…")


def examine(runs: Path) -> Diagnosis:
    """Look at this machine and try out what it can do."""
    found = Diagnosis()
    here = devices()
    steps = tqdm(
        [found_here, speeds, operators, training],
        disable=not sys.stderr.isatty(),
        leave=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a backend lacks stands on the screen
        for part in steps:
            steps.set_postfix_str(part.__name__)
            part(found, here, runs)
    return found


def found_here(found: Diagnosis, here: dict[torch.device, str], runs: Path) -> None:
    """What is installed and what is at hand."""
    present, absent = versions(NEEDED)
    found.add("versions", ", ".join([f"python {platform.python_version()}", *present]))
    if absent:
        found.add("", f"MISSING: {', '.join(absent)}")
    present, absent = versions(OPTIONAL)
    found.add("optional", ", ".join(present) or "none")
    if absent:
        extras = ",".join(OPTIONAL[name] for name in absent)
        found.add("", f"not installed: {', '.join(absent)}")
        found.add("", f"pip install -e '.[{extras}]' adds {'it' if len(absent) == 1 else 'them'}")
    found.add("compiler", compiler())
    found.add("kernels", cache())
    found.add("hub", hub())
    found.add("disk", disk(runs))
    for device, text in here.items():
        found.add(str(device), text)
    if not torch.cuda.is_available():
        has_cuda = torch.version.cuda is not None
        found.add("cuda", "PyTorch finds no GPU" if has_cuda else "this PyTorch is without CUDA")


def speeds(found: Diagnosis, here: Iterable[torch.device], runs: Path) -> None:
    """How fast each device multiplies matrices and copies."""
    found.add("", "")
    found.add("speed", "float32 matmul    bfloat16 matmul   copy (read + written)")
    for device in here:
        try:
            flops = [measured_flops(device, dtype) for dtype in DTYPES]
            shown = "".join(f"{f'{value / 1e9:,.0f} GFLOP/s':<18}" for value in flops)
            found.add(str(device), f"{shown}{copy_rate(device) / 1e9:,.0f} GB/s")
        except Exception as error:  # a driver's, or out of memory
            found.add(str(device), f"FAILED: {self_test.short(error)}")


def operators(found: Diagnosis, here: Iterable[torch.device], runs: Path) -> None:
    """Which backends of WKV are right on each device."""
    found.add("", "")
    found.add("WKV", f"{'backend':<11}" + "".join(f"{str(dtype)[6:]:<28}" for dtype in DTYPES))
    for device in here:
        for tried in self_test.backends(device):
            found.add(str(device), backend_text(tried))
            if not tried.ok:
                found.failures.append(f"WKV backend {tried.name} on {device}")
    limits = " and ".join(f"{TOLERANCES[dtype]:g}" for dtype in DTYPES)
    found.add("", f"worst relative RMS error of outputs and gradients (ok: {limits}), ms")


def backend_text(tried: Tried) -> str:
    """What one backend did on a device, or why it cannot be had."""
    if tried.missing or tried.broken:
        return f"{tried.name:<11}{tried.missing or f'FAILED: {tried.broken}'}"
    text = f"{tried.name:<11}"
    for dtype, error in tried.errors.items():
        verdict = "ok" if error <= TOLERANCES[dtype] else "FAILED"
        text += f"{f'{error:.1e} {verdict}':<16}{1000 * tried.seconds[dtype]:7.1f} ms  "
    return text


def training(found: Diagnosis, here: Iterable[torch.device], runs: Path) -> None:
    """Whether each family can take a step on each device, and on which backend."""
    found.add("", "")
    for device in here:
        for family in families().values():
            wrong = self_test.step(family, device)
            if wrong:
                found.failures.append(f"a step of {family.label} on {device} ({wrong})")
            backend = family.toy().live_backend(device)
            on = f" on the {backend} backend" if backend else ""
            slower = " (right, but slower)" if backend == "torch" else ""
            said = f"FAILED: {wrong}" if wrong else f"an optimizer step works{on}{slower}"
            found.add(str(device), f"{family.label:<11}{said}")


def devices() -> dict[torch.device, str]:
    """The CPU and the first GPU of each kind, with what they are called."""
    name, n_threads = device_name(torch.device("cpu")), torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    found = {torch.device("cpu"): f"{name}, {n_threads} of {os.cpu_count()} threads, {capability}"}
    kinds: dict[str, list[int]] = {}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        named = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
        kinds.setdefault(named, []).append(index)
    for named, indices in kinds.items():
        alike = f" ({len(indices)} of them)" if len(indices) > 1 else ""
        found[torch.device("cuda", indices[0])] = named + alike
    return found


def versions(packages: Iterable[str]) -> tuple[list[str], list[str]]:
    """ "package version" of those that are installed, and the names of those that are not."""
    found, absent = [], []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(package)
    return found, absent


def hub() -> str:
    """Whether a hub of models and data sets can be reached."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "offline by HF_HUB_OFFLINE"
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            return f"{address} answers"
    except urllib.error.HTTPError as error:
        return f"{address} answers with HTTP {error.code}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return f"{address} cannot be reached ({self_test.short(Exception(reason))})"


def compiler() -> str:
    """The C++ compiler that builds the kernels, or why there is none."""
    try:
        command = build._compiler()
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=10)
    except (build.BuildError, OSError, subprocess.SubprocessError) as error:
        return self_test.short(error)
    return f"{shlex.join(command)}: {(done.stdout.strip() or 'no version').splitlines()[0]}"


def cache() -> str:
    """Whether built kernels can be kept."""
    try:
        folder = build._cache_folder()
        with tempfile.TemporaryFile(dir=folder):
            return f"{tilde(folder)} is writable"
    except OSError as error:
        return f"not writable, so each process compiles again ({self_test.short(error)})"


def disk(runs: Path) -> str:
    """Free space where runs are kept."""
    there = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.exists())
    return f"{shutil.disk_usage(there).free / 2**30:.0f} GiB free for {tilde(runs)}"


def tilde(path: Path) -> str:
    """A path with ~ for the home folder."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
