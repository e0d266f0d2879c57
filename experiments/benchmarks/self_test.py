"""What a machine can do, tried out: matrix products, copies, each WKV rung, a step of training.

B batch, T time, C channels.
"""

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.system.machine import measured_flops
from experiments.training.module import LitLM
from experiments.training.optimizer import make_optimizer
from models.gpt.model import GPT
from models.language_model import LanguageModel
from models.ops.wkv import BACKENDS, live_backend, wkv, wkv_reference
from models.rwkv4.model import RWKV4

SHAPE = (2, 400, 100)  # B, T, C: not a multiple of any kernel's tile
# Largest relative RMS error. float32: several times that of the loop itself, whose sums run over
# all steps. bfloat16: half a unit of its last of 8 bits, of whatever size the value is.
TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 4e-3}
DTYPES = tuple(TOLERANCES)


def one_line(error: Exception) -> str:
    """What an error says, as one line of at most 160 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


def synchronised(device: torch.device) -> float:
    """Seconds on a clock, read when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rates(device: torch.device, copied_bytes: int | None = None) -> list[float]:
    """FLOP/s of a matrix product in each of DTYPES, then bytes/s of a copy, read and written.

    Each is the best of ten. The copy is of 1 GiB on a GPU and 128 MiB on a CPU, out of its caches.
    """
    n_bytes = copied_bytes or (1 << 30 if device.type == "cuda" else 1 << 27)
    a = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    b = torch.ones_like(a)
    seconds = []
    for _ in range(10):
        start = synchronised(device)
        b.copy_(a)
        seconds.append(synchronised(device) - start)
    return [*(measured_flops(device, dtype) for dtype in DTYPES), 2 * n_bytes / min(seconds)]


@dataclass
class Rung:
    """A WKV rung on a device: why it cannot be had, or how far off it was in each of DTYPES."""

    name: str
    missing: str | None = None
    errors: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()  # of a forward and a backward pass
    broken: str | None = None

    @property
    def ok(self) -> bool:
        """False if it ran and was wrong, or did not run through."""
        pairs = zip(self.errors, TOLERANCES.values(), strict=False)
        return self.broken is None and all(error <= limit for error, limit in pairs)  # not NaN


def rungs(device: torch.device) -> tuple[str, list[Rung]]:
    """The rung that "auto" takes on the device, and each of BACKENDS tried on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the fused one is missing is said by the caller
        live = live_backend(device)
    found = []
    for name in BACKENDS[1:]:
        try:
            live_backend(device, name)
        except ValueError as error:
            found.append(Rung(name, missing=str(error).partition(": ")[2] or str(error)))
            continue
        found.append(tried(name, device))
    return live, found


def tried(name: str, device: torch.device) -> Rung:
    """A rung against float64, in each of DTYPES."""
    errors, seconds = [], []
    try:
        for dtype in DTYPES:
            inputs, adjoints = problem(dtype)
            exact = with_gradients(wkv_reference, [x.double() for x in inputs], adjoints)
            there, back = [x.to(device) for x in inputs], [x.to(device) for x in adjoints]

            def op(w: Tensor, u: Tensor, k: Tensor, v: Tensor, past: Tensor) -> tuple[Tensor, ...]:
                return wkv(w, u, k, v, past, name)

            times = []
            for _ in range(2):  # what is compiled at first use does not count
                start = synchronised(device)
                got = with_gradients(op, there, back)
                times.append(synchronised(device) - start)
            seconds.append(min(times))
            errors.append(worst(map(relative_rms, got, exact)))
    except Exception as error:  # whatever a driver or a compiler comes up with: that is the answer
        return Rung(name, broken=one_line(error))
    return Rung(name, errors=tuple(errors), seconds=tuple(seconds))


def problem(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """w, u, k, v, state as `wkv` takes them, and gradients of its two results, on the CPU."""
    B, T, C = SHAPE
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    w, u = -torch.exp(torch.linspace(-5, 3, C)), normal(C)  # the decays of RWKV-4's start
    k, v, gy = (normal(B, T, C).to(dtype) for _ in range(3))
    past = torch.stack((normal(B, C), normal(B, C).exp(), normal(B, C)), 1)
    return [w, u, k, v, past], [gy, normal(B, 3, C)]


def with_gradients(
    op: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], adjoints: list[Tensor]
) -> list[Tensor]:
    """y, the last state and the gradients of all inputs, float64 on the CPU.

    Args:
        adjoints: of y and of the last state.
    """
    given = [x.detach().requires_grad_() for x in inputs]
    results = op(*given)
    given_back = [b.to(a.dtype) for a, b in zip(results, adjoints, strict=True)]
    gradients = torch.autograd.grad(results, given, given_back)
    return [x.detach().to("cpu", torch.float64) for x in (*results, *gradients)]


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    return float((actual - expected).norm() / expected.norm())


def worst(errors: Iterable[float]) -> float:
    """The largest of them; NaN if one is."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


TOYS: dict[str, Callable[[], LanguageModel]] = {
    "RWKV-4": lambda: RWKV4(64, n_layer=2, n_embd=32, ctx_len=32),
    "GPT": lambda: GPT(64, n_layer=2, n_embd=32, n_head=2, ctx_len=32),
}


def step(family: str, device: torch.device) -> str | None:
    """Take an optimizer step of a toy on the device; what went wrong in a line, or None."""
    try:
        model = TOYS[family]().to(device)
        optimizer = make_optimizer(
            model, peak_lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, lr_scale=True
        )
        module = LitLM(model, lambda _: optimizer, lambda *_: 1.0, total_steps=1)
        ids = torch.randint(64, (4, 33), device=device)
        loss = module.training_step((ids[:, :-1], ids[:, 1:]), 0)
        loss.backward()
        if not loss.isfinite():
            return f"the loss is {loss.item()}"
        for name, parameter in model.named_parameters():
            if parameter.grad is None or not parameter.grad.isfinite().all():
                return f"{name} has no finite gradient"
        before = model.head.weight.detach().clone()
        optimizer.step()
        return "the step changed nothing" if torch.equal(before, model.head.weight) else None
    except Exception as error:  # as above
        return one_line(error)
