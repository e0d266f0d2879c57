"""What is here, which WKV rung is live and why not a better one, and whether training can run.

``python -m experiments.doctor`` prints one screen. Exit code 0 only if a training step of both
families works on the device that training would take.
"""

import os
import platform
import shutil
import socket
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlparse

from omegaconf import DictConfig

from experiments.entry import RunFailed, entry, one_line

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}  # relative RMS to float64, as in the tests
PACKAGES = ("torch", "lightning", "hydra-core", "lm_eval", "pandas")
OPTIONAL = {  # distribution: what it is for, and the extra it comes with
    "cuda-core": ("fused WKV on NVIDIA GPUs", "cuda"),
    "transformers": ("comparisons in bench=train and bench=wkv", "dev"),
    "tensorboard": ("logger=tensorboard", "tensorboard"),
    "wandb": ("logger=wandb", "wandb"),
    "mlflow": ("logger=mlflow", "mlflow"),
    "hydra-submitit-launcher": ("hydra/launcher=slurm", "slurm"),
}
HUB_TIMEOUT_S = 2.0
Line = tuple[str, str]  # a heading and what it says


@entry("doctor")
def main(cfg: DictConfig) -> None:
    import torch

    if cfg.n_threads is not None:
        torch.set_num_threads(cfg.n_threads)
    problems: list[str] = []
    last = ""
    for heading, text in examine(Path(cfg.paths.runs), problems):
        print(f"{heading if heading != last else '':<10}{text}", flush=True)
        last = heading
    if problems:
        raise RunFailed("training cannot run: " + "; ".join(problems))
    print("ready     training can run", flush=True)


def examine(runs: Path, problems: list[str]) -> Iterator[Line]:
    """All lines of the screen, each as soon as it is known; what forbids training -> problems."""
    yield from versions()
    devices = training_devices()
    for show in (machine, partial(rungs, problems=problems)):
        for device in devices:
            yield from show(device)
    yield from kernels()
    yield from optional()
    yield "hub", hub()
    free = shutil.disk_usage(
        next(p for p in (runs.absolute(), *runs.absolute().parents) if p.exists())
    )
    yield "disk", f"{free.free / 2**30:.0f} GiB free for {runs}/"
    for family in ("rwkv4", "gpt"):
        yield from training_step(family, devices[-1], problems)


def training_devices() -> list[str]:
    """The CPU and every GPU; training takes the last."""
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{i}" for i in reversed(range(n_gpus)))]


def versions() -> Iterator[Line]:
    """Of Python and the packages that training needs."""
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} MISSING")
    yield "versions", ", ".join(found)


def machine(device: str) -> Iterator[Line]:
    """A device and its measured rates: matrix products of 2048, copies of 256 MiB."""
    import psutil
    import torch

    from experiments.bench_measure import interleaved
    from experiments.bench_wkv import finished
    from experiments.manifest import device_name

    if device == "cpu":
        size = psutil.virtual_memory().total
        more = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    else:
        size = torch.cuda.get_device_properties(device).total_memory
        major, minor = torch.cuda.get_device_capability(device)
        more = f"sm_{major}{minor}, CUDA {torch.version.cuda}"
    name = device_name(torch.device(device))
    yield "device", f"{device}: {name}, {more}, {size / 2**30:.0f} GiB"
    n = 2048
    source = torch.zeros(2**26, device=device)
    candidates = {"copy": finished(partial(torch.empty_like(source).copy_, source), device)}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(n, n, device=device, dtype=dtype)
        candidates[str(dtype)] = finished(partial(torch.mm, a, a), device)
    seconds = {k: statistics.median(s) for k, s in interleaved(candidates, 3, warmup=1).items()}
    products = " and ".join(
        f"{2 * n**3 / seconds[str(dtype)] / 1e9:,.0f} GFLOP/s in {str(dtype).split('.')[1]}"
        for dtype in (torch.float32, torch.bfloat16)
    )
    copied = 2 * 4 * source.numel() / seconds["copy"] / 1e9
    yield "", f"{device}: matrix products {products}, copies {copied:,.0f} GB/s (read + write)"


def rungs(device: str, problems: list[str]) -> Iterator[Line]:
    """Every WKV rung on a device: tested against float64 and timed, or why it cannot be had.

    Forward and backward of (B, T, C) = (2, 256, 256), float32.
    """
    import warnings

    import torch

    from experiments.bench_measure import interleaved
    from experiments.bench_wkv import calls, worst_error
    from models.ops.wkv import BACKENDS, live_backend

    with warnings.catch_warnings():  # the reason stands in the table
        warnings.simplefilter("ignore")
        live = live_backend(device)
    heading = f"WKV {device.replace(':', '')}"
    for backend in BACKENDS[1:]:
        try:
            live_backend(device, backend)
        except ValueError as error:
            yield heading, f"{backend:<10} no    {str(error).partition(': ')[2]}"
            continue
        try:
            errors = {x: worst_error(backend, getattr(torch, x), device) for x in TOLERANCE}
            both = calls((2, 256, 256), torch.float32, device, backend)["both"]
            took = f"{statistics.median(interleaved({'': both}, 3)['']) * 1e3:.1f} ms"
        except Exception as error:  # of a driver, a compiler, a broken library
            errors, took = {}, one_line(error)
        right = bool(errors) and all(errors[x] < TOLERANCE[x] for x in TOLERANCE)
        tested = ", ".join(f"{x} {e:.0e}" for x, e in errors.items())
        state = "live" if backend == live else "ok" if right else ""
        verdict = f"errors {tested}; {took}" if right else f"FAILED: {tested} {took}"
        yield heading, f"{backend:<10} {state:<5} {verdict}"
        if not right and backend == live:
            problems.append(f"the WKV backend {backend!r} gives wrong results on {device}")


def kernels() -> Iterator[Line]:
    """The host's compiler, and where compiled kernels are kept."""
    from models.ops import build

    try:
        compiler = " ".join(build._compiler())
        yield "compiler", f"{shutil.which(build._compiler()[0])} ({compiler})"
    except build.BuildError as error:
        yield "compiler", str(error)
    try:
        folder = build._cache_folder()
        writable = os.access(folder, os.W_OK)
        yield "cache", f"{folder}" + ("" if writable else ": not writable, kernels are built anew")
    except OSError as error:
        yield "cache", f"none, kernels are built anew at each start: {one_line(error)}"


def optional() -> Iterator[Line]:
    """Packages that only some commands need."""
    for name, (purpose, extra) in OPTIONAL.items():
        try:
            yield "optional", f"{name} {version(name)} ({purpose})"
        except PackageNotFoundError:
            yield "optional", f"{name} no ({purpose}): pip install -e '.[{extra}]'"


def hub() -> str:
    """Whether the Hugging Face Hub answers; task sets other than cloze need it, or its cache."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "offline by HF_HUB_OFFLINE"
    address = urlparse(constants.ENDPOINT)
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), HUB_TIMEOUT_S).close()
        return f"{address.hostname} answers"
    except OSError as error:
        return f"{address.hostname} does not answer ({one_line(error)}): only local data and tasks"


def training_step(family: str, device: str, problems: list[str]) -> Iterator[Line]:
    """One optimizer step of a toy model: the loss is finite, falls, and reaches every parameter."""
    import torch

    from experiments.bench_train import TOY, build_model

    try:
        torch.manual_seed(0)
        model, loss = build_model(family, **TOY)
        model.to(device)
        tokens = torch.randint(TOY["vocab_size"], (2, TOY["ctx_len"] + 1), device=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(2):
            nats = loss(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            nats.backward()
            optimizer.step()
            losses.append(float(nats.detach()))
        unreached = [name for name, p in model.named_parameters() if p.grad is None]
        if unreached or not losses[1] < losses[0] < float("inf"):
            raise ValueError(f"losses {losses}, no gradient for {unreached or 'none'}")
        text = f"{family} on {device}: a step works, loss {losses[0]:.3f} -> {losses[1]:.3f}"
        yield "training", text
    except Exception as error:
        problems.append(f"a step of {family} fails on {device}: {one_line(error)}")
        yield "training", f"{family} on {device}: FAILED"


if __name__ == "__main__":
    sys.exit(main())
