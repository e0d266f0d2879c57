"""What this machine is and can do: devices, cores, memory, measured speed, the code's commit."""

import os
import platform
import re
import shutil
import subprocess
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# names of torch's dtypes
PRECISIONS = {"32-true": "float32", "bf16-mixed": "bfloat16", "16-mixed": "float16"}


def clock(device: "torch.device") -> float:
    """Seconds of a clock, read when the device has done all it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_flops(device: "torch.device", precision: str) -> tuple[float, str]:
    """FLOP/s one device can do at most, and where the figure is from.

    A GPU's is the vendor's for dense matrix products of that precision, where Lightning's table
    knows the card; else (and on a CPU) it is measured.
    """
    import torch
    from lightning.fabric.utilities.throughput import get_available_flops

    dtype = getattr(torch, PRECISIONS[precision])
    if device.type == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            known = get_available_flops(device, dtype)
        if known:
            return float(known), "vendor"
    return measured_flops(device, dtype), "measured"


def measured_flops(device: "torch.device", dtype: "torch.dtype") -> float:
    """FLOP/s of the best of ten products of matrices of 1024 x 1024, on a GPU 8192 x 8192."""
    import torch

    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        (a @ a).flatten()[0].item()  # reading a value waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds[2:])


def copy_rate(device: "torch.device", n_bytes: int | None = None) -> float:
    """Bytes/s of the best of ten copies, read and written.

    Args:
        n_bytes: copied; by default 1 GiB on a GPU and 128 MiB on a CPU, more than its caches hold.
    """
    import torch

    size = n_bytes or (1 << 30 if device.type == "cuda" else 1 << 27)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    seconds = []
    for _ in range(10):
        start = clock(device)
        target.copy_(source)
        seconds.append(clock(device) - start)
    return 2 * size / min(seconds)


def peak_memory_bytes(device: "torch.device") -> int:
    """Largest memory so far: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far.

    Linux: from /proc, because there getrusage also counts what the parent held when it forked.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def reset_peak_memory(device: "torch.device") -> bool:
    """Let the peak start again from what is held now; False where the system cannot."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def device_name(device: "torch.device") -> str:
    """The card's name, or the processor's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe() -> dict[str, Any]:
    """Where measured figures are from: processor, threads, GPU, PyTorch."""
    import torch

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    return {
        "cpu": device_name(cpu),
        "n_threads": torch.get_num_threads(),
        "gpu": device_name(gpu) if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def usable_device(name: str) -> str:
    """The device of that name; auto is a GPU where there is one, else the CPU.

    Raises:
        ValueError: if there is none, or it cannot be used.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"device={name} cannot be used here ({reason}): take cpu") from None
    return name


def git_state() -> dict[str, Any]:
    """Commit of the code, and whether tracked files differ from it; None where git cannot tell."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def n_cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs, or parts of them (MIG), that a process started by us would see.

    Raises:
        ValueError: if the driver does not answer.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise ValueError("nvidia-smi does not answer: set CUDA_VISIBLE_DEVICES") from None
    return gpu_names(answer.stdout) if answer.returncode == 0 else []


def gpu_names(listing: str) -> list[str]:
    """The names by which CUDA knows what ``nvidia-smi -L`` lists; of a divided GPU, its parts."""
    names: list[str] = []
    for line in listing.splitlines():
        if found := re.search(r"\(UUID: ((?:GPU|MIG)-[^)]+)\)", line):
            is_part = found[1].startswith("MIG")
            if is_part and names and names[-1].startswith("GPU"):
                names.pop()  # the whole that it is a part of
            names.append(found[1])
    return names
