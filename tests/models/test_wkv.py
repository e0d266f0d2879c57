"""The ladder: the paper's sum -> wkv_reference -> torch -> cpu -> cuda, with all gradients."""

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from models.ops import cpu
from models.ops.wkv import _wkv, live_backend, wkv

RUNGS = ("reference", "torch", "cpu", "cuda")
NAMES = ("y", "state", "gw", "gu", "gk", "gv", "gstate")
# (B, T, C): one step, two, odd lengths, channels that fill no vector and more than one tile
SHAPES = [(2, 1, 3), (3, 2, 9), (2, 63, 70), (1, 500, 17)]


@pytest.fixture(params=RUNGS)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend to ask for; "cuda" is the whole of it on an emulated GPU, in the place of "cpu"."""
    if request.param in ("cpu", "cuda") and cpu.missing():
        pytest.skip(f"no C++ compiler: {cpu.missing()}")
    if request.param == "cuda":
        request.getfixturevalue("emulated_gpu")
        return "cpu"
    return request.param


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Memory comes filled with NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).square().mean().sqrt()
    return float(error / expected.square().mean().sqrt().clamp_min(1e-30))


def make(B: int, T: int, C: int, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    """w from -1e-6 to -50, and the other four inputs, in float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    w = -torch.logspace(-6, 1.7, C, dtype=torch.float64)
    state = torch.stack((normal(B, C), normal(B, C).exp(), scale * normal(B, C)), dim=1)
    return [w, normal(C), scale * normal(B, T, C), normal(B, T, C), state]


def loss_weights(kind: str, B: int, T: int, C: int) -> tuple[Tensor, Tensor]:
    if kind == "equal":
        return torch.ones(B, T, C).double(), torch.ones(B, 3, C).double()
    g = torch.Generator().manual_seed(7)
    at = torch.randperm(B * T * C, generator=g)
    lopsided = torch.logspace(-3, 3, B * T * C).double()[at].view(B, T, C)
    return lopsided, torch.randn(B, 3, C, generator=g).double()


def run(backend: str, inputs: list[Tensor], dtype: torch.dtype, kind: str = "lopsided") -> list:
    """Outputs and gradients of a backend for k and v of dtype, all named by NAMES."""
    wide = torch.promote_types(dtype, torch.float32)
    types = (wide, wide, dtype, dtype, wide)
    leaves = [x.to(t).requires_grad_() for x, t in zip(inputs, types, strict=True)]
    y, state = wkv(*leaves, backend=backend)
    gy, g_state = loss_weights(kind, *y.shape)
    grads = torch.autograd.grad([y, state], leaves, [gy.to(y.dtype), g_state.to(wide)])
    return [y.detach(), state.detach(), *grads]


def compare(actual: list, expected: list, tolerance: float) -> None:
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert a.shape == e.shape, name
        assert relative_rms(a, e) < tolerance, name


def wkv_sum(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
    """y as the paper writes it: every pair (t, i), with the state as what came before i = 0."""
    T = k.shape[1]
    steps = torch.arange(T, dtype=torch.float64)
    lag = (steps[:, None] - 1 - steps)[..., None]  # (t, i, 1)
    log = torch.where(lag >= 0, lag * w, -torch.inf) + k[:, None]
    log = torch.where(lag == -1, u + k[:, None], log)  # (B, t, i, C)
    before = state[:, None, 2] + steps[:, None] * w  # (B, t, C)
    top = torch.maximum(log.amax(2), before)
    weight, past = (log - top[:, :, None]).exp(), (before - top).exp()
    numerator = (weight * v[:, None]).sum(2) + past * state[:, None, 0]
    return numerator / (weight.sum(2) + past * state[:, None, 1])


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_sum(shape: tuple[int, int, int], scale: float, backend: str) -> None:
    inputs = make(*shape, scale)
    assert relative_rms(wkv(*inputs, backend=backend)[0], wkv_sum(*inputs)) < 1e-12


@pytest.mark.parametrize("kind", ["equal", "lopsided"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["torch", "cpu", "cuda"], indirect=True)
def test_ladder(shape: tuple[int, int, int], scale: float, kind: str, backend: str) -> None:
    inputs = make(*shape, scale)
    compare(
        run(backend, inputs, torch.float64, kind),
        run("reference", inputs, torch.float64, kind),
        1e-10,
    )
    narrow = [x.float().double() for x in inputs]
    expected = run("reference", narrow, torch.float64, kind)
    # float32 holds an exponent of 300 to 3e-5, and a weight to no more than that
    compare(run(backend, narrow, torch.float32, kind), expected, 3e-6 if scale == 1 else 5e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("backend", ["torch", "cpu", "cuda"], indirect=True)
def test_half_precision(dtype: torch.dtype, tolerance: float, backend: str) -> None:
    w, u, k, v, state = make(2, 63, 70)
    inputs = [w, u, k.to(dtype).double(), v.to(dtype).double(), state]
    gy, _ = loss_weights("lopsided", 2, 63, 70)
    assert run(backend, inputs, dtype)[0].dtype == dtype
    compare(run(backend, inputs, dtype), run("reference", inputs, torch.float64), tolerance)
    assert gy.max() > 100 * gy.median()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 6e4, float("inf"), float("nan")])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_rounding_is_that_of_torch(dtype: torch.dtype, scale: float, backend: str) -> None:
    w, u, k, v, state = (x.float() for x in make(2, 40, 70))
    k, v = k.to(dtype), (v.clamp(-1, 1) * scale).to(dtype)
    results = []
    for io in (dtype, torch.float32):
        x = v.to(io).requires_grad_()
        y, _ = wkv(w, u, k.to(io), x, state, backend=backend)
        (gv,) = torch.autograd.grad(y, x, v.to(io))
        results.append((y.detach().to(dtype), gv.to(dtype)))
    for narrow, wide in zip(*results, strict=True):
        torch.testing.assert_close(narrow, wide, rtol=0, atol=0, equal_nan=True)


def test_gradcheck(backend: str) -> None:
    for B, T, C in [(1, 1, 2), (2, 5, 3), (1, 19, 2)]:  # 19: more than one chunk of the C++
        # finite differences see nothing of a decay that leaves nothing
        w = -torch.logspace(-3, 0.5, C, dtype=torch.float64)
        leaves = [x.requires_grad_() for x in (w, *make(B, T, C)[1:])]
        assert torch.autograd.gradcheck(lambda *x: wkv(*x, backend=backend), leaves)


def test_empty_state_and_padding(backend: str) -> None:
    w, u, k, v, _ = (x.float() for x in make(2, 9, 5))
    expected = wkv(w, u, k, v, backend=backend)
    empty = torch.tensor([0.0, 0.0, -1e38]).view(1, 3, 1).expand(2, 3, 5)
    padded_k = torch.cat((torch.full((2, 4, 5), -1e38), k), 1)
    padded_v = torch.cat((v[:, :4], v), 1)
    for y, last in (
        wkv(w, u, k, v, empty, backend=backend),
        [
            x[:, -n:]
            for x, n in zip(wkv(w, u, padded_k, padded_v, backend=backend), (9, 3), strict=True)
        ],
    ):
        torch.testing.assert_close(y, expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(last, expected[1], rtol=1e-6, atol=1e-6)


def test_not_a_number_is_seen_and_stays_in_its_channel(backend: str) -> None:
    w, u, k, v, _ = (x.float() for x in make(2, 40, 20))
    k[1, 30, 4] = torch.nan
    y, state = wkv(w, u, k, v, backend=backend)
    expected = torch.zeros(2, 40, 20, dtype=torch.bool)
    expected[1, 30:, 4] = True
    assert torch.equal(y.isnan(), expected)
    assert torch.equal(state.isnan().any(1), expected.any(1))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_exponential(backend: str) -> None:
    x = torch.cat((-torch.logspace(-8, 1.9395, 5000), torch.tensor([-87.1, -1e3, -1e38, 0.0])))
    n = len(x)
    state = torch.stack((torch.ones(n), torch.zeros(n), x))[None]  # y = e^x x 1 / (e^x x 0 + 1)
    zero = torch.zeros(1, 1, n)
    y = wkv(-torch.ones(n), torch.zeros(n), zero, zero, state, backend=backend)[0].flatten()
    exact = x.double().exp()
    assert y[-4:].tolist() == [0, 0, 0, 1]
    assert ((y - exact).abs() / exact)[:-4].max() < 2 * 2**-23


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_threads_change_no_bit(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(3, 50, 150)
    one = run(backend, inputs, torch.float32)
    torch.set_num_threads(3)
    try:
        pool = run(backend, inputs, torch.float32)
        monkeypatch.setattr(cpu, "_openmp", lambda: None)
        own = run(backend, inputs, torch.float32)
    finally:
        torch.set_num_threads(1)
    for a, b, c in zip(one, pool, own, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize(("threads", "T", "C"), [(3, 600, 40), (4, 2000, 7), (5, 1100, 33)])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_threads_share_long_sequences(threads: int, T: int, C: int, backend: str) -> None:
    """Too few channels for all threads: segments of T are done side by side and then joined."""
    inputs = make(1, T, C)
    one = run(backend, inputs, torch.float64)
    torch.set_num_threads(threads)
    try:
        several = run(backend, inputs, torch.float64)
        narrow = run(backend, [x.float().double() for x in inputs], torch.float32)
    finally:
        torch.set_num_threads(1)
    assert not all(torch.equal(a, b) for a, b in zip(one, several, strict=True))  # it was cut
    compare(several, one, 1e-10)
    compare(narrow, run(backend, [x.float().double() for x in inputs], torch.float64), 1e-5)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_one_graph_for_all_lengths(backend: str) -> None:
    compiled = torch.compile(
        lambda *x: wkv(*x, backend=backend)[0], fullgraph=True, dynamic=True, backend="aot_eager"
    )
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for T in (5, 9, 33):
        inputs = [x.float() for x in make(2, T, 4)]
        torch.testing.assert_close(compiled(*inputs), wkv(*inputs, backend=backend)[0])
    assert graphs["unique_graphs"] == before + 1


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_operator_is_well_formed(with_state: bool, backend: str) -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares memory nobody wrote
    inputs = [x.float().requires_grad_() for x in make(2, 7, 5)]
    torch.library.opcheck(_wkv, (*inputs[:4], inputs[4] if with_state else None))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_loops_became_vector_code(dtype: torch.dtype, backend: str) -> None:
    """Scalar code takes 8 times two passes of torch.exp, vector code about one (0.6 measured)."""
    torch.use_deterministic_algorithms(False)
    w, u, k, v, _ = (x.float() for x in make(2, 256, 256))
    k, v = k.to(dtype), v.to(dtype)

    def cpu_seconds(call: Callable[[], object]) -> float:
        start = time.thread_time()
        call()
        return time.thread_time() - start

    x = k.float()
    two_exp = min(cpu_seconds(lambda: (x.exp(), x.exp())) for _ in range(30))
    forward = min(cpu_seconds(lambda: wkv(w, u, k, v, backend=backend)) for _ in range(30))
    assert forward < 3 * two_exp


def test_compiles_into_one_graph(backend: str) -> None:
    def loss(*inputs: Tensor) -> Tensor:
        y, state = wkv(*inputs, backend=backend)
        return y.square().sum() + state.sum()

    inputs = [x.float().requires_grad_() for x in make(2, 3, 4)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*inputs), loss(*inputs)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(
        torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(a, e)


def test_backend_choice() -> None:
    assert live_backend("cpu") == ("torch" if cpu.missing() else "cpu")
    assert live_backend("meta") == "torch"
    assert live_backend("cpu", "reference") == "reference"
    with pytest.raises(ValueError, match="'cpu' does not run on device 'meta'"):
        live_backend("meta", "cpu")
    with pytest.raises(ValueError, match="unknown WKV backend 'cuda2': use one of auto"):
        live_backend("cpu", "cuda2")


def test_bad_input() -> None:
    w, u, k, v, state = (x.float() for x in make(2, 4, 3))
    for inputs, message in (
        ((w, u, k, v[:, :3]), r"share one shape .*\(2, 4, 3\) and \(2, 3, 3\)"),
        ((w, u, k[:, :0], v[:, :0]), "without a zero"),
        ((w, u, k, v.half()), "share one dtype"),
        ((w, u, k.long(), v.long()), "share one dtype"),
        ((w[:2], u, k, v), r"w must be \(3,\) of torch.float32, got \(2,\)"),
        ((w, u.double(), k, v), "u must be .* got .*float64"),
        ((w, u, k, v, state[:1]), r"state must be \(2, 3, 3\)"),
        ((w, u.to("meta"), k, v), "u is on meta but k is on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            wkv(*inputs)
