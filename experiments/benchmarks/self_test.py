"""Self-tests: each backend of the WKV operator, and a training step of each family.

B batch, T time, C channels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from experiments.config.entry import one_line
from experiments.system.machine import clock
from experiments.training.module import LitLM
from experiments.training.optimizer import make_optimizer
from models.families import Family
from models.ops.wkv import BACKENDS, live_backend, wkv, wkv_reference

SHAPE = (2, 400, 100)  # B, T, C: not a multiple of any kernel's tile
# Largest relative RMS error. float32: several times that of the loop itself, whose sums run over
# all steps. 16 bits: half a unit of the last bit, of whatever size the value is.
TOLERANCES = {torch.float32: 3e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
DTYPES = (torch.float32, torch.bfloat16)  # of the doctor's screen


def short(error: Exception) -> str:
    """What an error says, as one line of at most 160 characters."""
    return one_line(error)[:160]


@dataclass
class Tried:
    """A backend of WKV on a device: why it cannot be had, or how far off it was in each dtype."""

    name: str
    missing: str | None = None
    broken: str | None = None
    errors: dict[torch.dtype, float] = field(default_factory=dict)  # relative RMS, the worst
    seconds: dict[torch.dtype, float] = field(default_factory=dict)  # of forward and backward

    @property
    def ok(self) -> bool:
        """False if it ran and was wrong (or gave NaN), or did not run through."""
        within = (error <= TOLERANCES[dtype] for dtype, error in self.errors.items())
        return self.broken is None and all(within)


def backends(device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES) -> list[Tried]:
    """Each backend of WKV, tried on the device."""
    found = []
    for name in BACKENDS[1:]:
        try:
            live_backend(device, name)
        except ValueError as error:
            found.append(Tried(name, missing=str(error).partition(": ")[2] or str(error)))
            continue
        found.append(try_backend(name, device, dtypes))
    return found


def try_backend(name: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> Tried:
    """A backend against float64, in each dtype."""
    errors, seconds = {}, {}

    def op(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        return wkv(w, u, k, v, state, name)

    try:
        for dtype in dtypes:
            inputs, adjoints = problem(dtype)
            exact = with_gradients(wkv_reference, [x.double() for x in inputs], adjoints)
            inputs, adjoints = ([x.to(device) for x in xs] for xs in (inputs, adjoints))
            times = []
            for _ in range(2):  # what is compiled at first use does not count
                start = clock(device)
                results = with_gradients(op, inputs, adjoints)
                times.append(clock(device) - start)
            errors[dtype] = worst(map(relative_rms, results, exact))
            seconds[dtype] = min(times)
    except Exception as error:  # whatever a driver or a compiler comes up with: that is the answer
        return Tried(name, broken=short(error))
    return Tried(name, errors=errors, seconds=seconds)


def problem(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """w, u, k, v, state as `wkv` takes them, and gradients of its two results, on the CPU."""
    B, T, C = SHAPE
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    w, u = -torch.exp(torch.linspace(-5, 3, C)), normal(C)  # the decays of a new model
    k, v, gy = (normal(B, T, C).to(dtype) for _ in range(3))
    state = torch.stack((normal(B, C), normal(B, C).exp(), normal(B, C)), 1)
    return [w, u, k, v, state], [gy, normal(B, 3, C)]


def with_gradients(
    op: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], adjoints: list[Tensor]
) -> list[Tensor]:
    """y, the last state and the gradients of all inputs, float64 on the CPU.

    Args:
        adjoints: of y and of the last state.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = op(*leaves)
    upstream = [b.to(a.dtype) for a, b in zip(results, adjoints, strict=True)]
    gradients = torch.autograd.grad(results, leaves, upstream)
    return [x.detach().to("cpu", torch.float64) for x in (*results, *gradients)]


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    return float((actual - expected).norm() / expected.norm())


def worst(errors: Iterable[float]) -> float:
    """The largest of them; NaN if one is."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


def step(family: Family, device: torch.device) -> str | None:
    """Take an optimizer step of a family's toy; what went wrong in a line, or None."""
    try:
        model = family.toy().to(device)
        optimizer = make_optimizer(
            model, peak_lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, lr_scale=True
        )
        module = LitLM(model, lambda _: optimizer, lambda *_: 1.0, total_steps=1)
        ids = torch.randint(model.vocab_size, (4, model.ctx_len + 1), device=device)
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
        return short(error)
