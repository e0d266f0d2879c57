"""The CUDA backend without a GPU: emulated, under sanitizers, compiled for real ones.

test_wkv.py holds the emulated backend to the whole ladder; here is what only a GPU has.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops import build, cpu, cuda
from models.ops.wkv import wkv, wkv_reference
from models.rwkv4 import model as rwkv4
from models.rwkv4.model import RWKV4

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
KERNELS = {
    "wkv_reduce", "wkv_combine", "wkv_forward", "wkv_backward_reduce", "wkv_backward_combine",
    "wkv_backward", "wkv_time_mix_step",
}  # fmt: skip

needs_compiler = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
needs_nvrtc = pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-core is not installed")


def inputs(B: int, T: int, C: int, dtype: torch.dtype) -> list[Tensor]:
    """Leaves w, u, k, v, state; keys that make the exponent's holder change now and then."""
    wide = torch.promote_types(dtype, torch.float32)
    g = torch.Generator().manual_seed(B + T + C)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    state = torch.stack((normal(B, C), normal(B, C).exp(), normal(B, C)), 1).to(wide)
    decay = -torch.logspace(-4, 0.5, C, dtype=torch.float64).to(wide)
    k, v = 3 * normal(B, T, C), normal(B, T, C)
    leaves = [decay, normal(C).to(wide), k.to(dtype), v.to(dtype), state]
    return [x.requires_grad_() for x in leaves]


def results(leaves: list[Tensor], backend: str) -> list[Tensor]:
    y, state = wkv(*leaves, backend=backend)
    g = torch.Generator().manual_seed(1)
    gy = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y)
    g_state = torch.randn(state.shape, generator=g, dtype=torch.float64).to(state)
    grads = torch.autograd.grad([y, state], leaves, [gy, g_state])
    return [x.detach() for x in (y, state, *grads)]


# one segment of several chunks; more, the last one short; many; channels that fill no tile
@pytest.mark.parametrize(
    ("shape", "n_segments"),
    [((5, 200, 7), 1), ((3, 130, 32), 3), ((1, 1000, 40), 4), ((1, 4097, 3), 8)],
)
@needs_compiler
def test_segments(shape: tuple[int, int, int], n_segments: int, emulated_gpu: Any) -> None:
    leaves = inputs(*shape, torch.float64)
    call = cuda._Call(leaves[2], [])
    assert call.n_segments == n_segments
    actual = results(leaves, "cpu")
    alone = {"wkv_reduce", "wkv_combine", "wkv_forward", "wkv_backward"}
    assert set(emulated_gpu.launched) == (
        KERNELS - {"wkv_time_mix_step"} if n_segments > 1 else alone
    )
    for a, e in zip(actual, results(leaves, "torch"), strict=True):
        assert float((a - e).norm() / e.norm()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("C", [40, 41])
@needs_compiler
def test_packed_and_single_access_agree(dtype: torch.dtype, C: int, emulated_gpu: Any) -> None:
    """C = 40 is read 16 bytes at a time, and one element at a time when arrays start askew."""
    leaves = inputs(2, 150, C, dtype)
    k, v = leaves[2].detach(), leaves[3].detach()
    assert cuda._Call(k, [k, v]).aligned == (C == 40)
    askew = [torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x) for x in (k, v)]
    assert not cuda._Call(askew[0], askew).aligned
    moved = [*leaves[:2], *(x.requires_grad_() for x in askew), leaves[4]]
    for a, e in zip(results(moved, "cpu"), results(leaves, "cpu"), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "C"), [(1, 32), (3, 36), (8, 7)])
@needs_compiler
def test_one_token(
    B: int, C: int, dtype: torch.dtype, emulated_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused step gives what the composed one gives, to the rounding of its parts."""
    model = RWKV4(vocab_size=19, n_layer=2, n_embd=C, ctx_len=8).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "emb" not in name:
                p.normal_(std=C**-0.5)
    ids = torch.randint(19, (B, 5))

    def logits() -> tuple[Tensor, Any]:
        state = model.init_state(B)
        for t in range(5):
            out, state = model(ids[:, t : t + 1], state)
        return out, state

    with torch.no_grad():
        expected, expected_state = logits()
        assert "wkv_time_mix_step" not in emulated_gpu.launched
        monkeypatch.setattr(rwkv4, "can_step", lambda *_: True)
        monkeypatch.setattr(rwkv4, "time_mix_step", cuda.time_mix_step)
        actual, state = logits()
    assert emulated_gpu.launched.count("wkv_time_mix_step") == 10
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    assert float((actual - expected).norm() / expected.norm()) < tolerance
    for name, value in expected_state.items():
        assert float((state[name] - value).norm() / value.norm()) < tolerance


@needs_compiler
def test_one_token_against_float64(emulated_gpu: Any) -> None:
    B, C = 5, 24
    g = torch.Generator().manual_seed(0)
    x, previous = torch.randn(2, B, C, generator=g).unbind()
    mixes = [torch.rand(C, generator=g) for _ in range(3)]
    weights = [torch.randn(C, C, generator=g) / C**0.5 for _ in range(3)]
    w, u = -torch.rand(C, generator=g), torch.randn(C, generator=g)
    state = torch.randn(B, 3, C, generator=g)
    state[:, 1] = state[:, 1].exp()
    out, after = cuda.time_mix_step(x, previous, mixes, weights, w, u, state)
    k, v, r = (
        F.linear(torch.lerp(previous.double(), x.double(), m.double()), p.double())
        for m, p in zip(mixes, weights, strict=True)
    )
    y, last = wkv_reference(w.double(), u.double(), k[:, None], v[:, None], state.double())
    torch.testing.assert_close(out.double(), torch.sigmoid(r) * y[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.double(), last, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@needs_compiler
def test_every_barrier_is_needed(tmp_path: Path, emulated_gpu: Any) -> None:
    """Without any one of them some order of a block's threads gives another result.

    So the shuffled orders of the emulation would have shown a barrier that is missing.
    """
    source = (build.SOURCES / "wkv_cuda.cu").read_text()
    places = [m.start() for m in re.finditer(r"__syncthreads\(\);", source)]
    assert len(places) >= 9
    cases = [inputs(B, 1000, 40, torch.float64) for B in (1, 3)]  # in segments, and in one
    expected = [results(leaves, "cpu") for leaves in cases]
    for number, place in enumerate(places):
        emulated_gpu.sources = tmp_path / str(number)
        shutil.copytree(build.SOURCES, emulated_gpu.sources)
        mutant = source[:place] + source[place + len("__syncthreads();") :]
        (emulated_gpu.sources / "wkv_cuda.cu").write_text(mutant)
        same = [
            torch.equal(a, e)
            for leaves, result in zip(cases, expected, strict=True)
            for a, e in zip(results(leaves, "cpu"), result, strict=True)
        ]
        assert not all(same), f"barrier {number} can go"


@pytest.mark.slow
@needs_compiler
def test_sanitizers(tmp_path: Path) -> None:
    """Both compiled backends on the whole ladder under AddressSanitizer and UBSan."""
    gxx = build._compiler()[0]
    found = subprocess.run(
        [gxx, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{gxx} has no AddressSanitizer")
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -g1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider",
         "tests/models/test_wkv.py", "tests/models/test_wkv_cuda.py",
         "-k", "not (reference or torch or cubin or kernels or nvrtc)"],
        cwd=ROOT, capture_output=True, text=True,
        env={
            **os.environ, "CXX": f"{gxx} {flags}", "LD_PRELOAD": found,
            "XDG_CACHE_HOME": str(tmp_path),
            "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        },
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert done.stdout.count(".") > 40  # tests passed


@pytest.fixture(scope="module")
def usage() -> dict[tuple[str, str, str], dict[str, int]]:
    """Registers, spilled and shared bytes of every kernel, by architecture, type and kernel."""
    table = {}
    for arch in ARCHITECTURES:
        for dtype, (name, _) in cuda._TYPES.items():
            options = {"arch": arch, "define_macro": [("WKV_IO", name)]}
            code, log = build.compile_cubin(build.SOURCES / "wkv_cuda.cu", options)
            assert code[:4] == b"\x7fELF"
            for part in log.split("Compiling entry function")[1:]:
                kernel = re.search(r"'(\w+)'", part)[1]
                numbers = {
                    "registers": r"Used (\d+) registers",
                    "spilled": r"(\d+) bytes spill stores",
                    "stack": r"(\d+) bytes stack frame",
                    "shared": r"(\d+) bytes smem",
                }
                found = {key: re.search(pattern, part) for key, pattern in numbers.items()}
                table[arch, str(dtype), kernel] = {
                    key: int(match[1]) if match else 0 for key, match in found.items()
                }
    return table


@pytest.mark.slow
@needs_nvrtc
def test_kernels_compile_and_spill_nothing(
    usage: dict[tuple[str, str, str], dict[str, int]],
) -> None:
    assert {key[2] for key in usage} == KERNELS
    assert len(usage) == len(ARCHITECTURES) * len(cuda._TYPES) * len(KERNELS)
    for (arch, dtype, kernel), row in usage.items():
        assert row["spilled"] == row["stack"] == 0, (arch, dtype, kernel, row)
        assert row["registers"] > 0
        assert row["shared"] <= 48 * 1024  # more would have to be asked for at launch
        if dtype != "torch.float64" and kernel != "wkv_combine":  # two blocks fit, so 128 registers
            assert row["registers"] <= 128, (arch, dtype, kernel, row)


@needs_nvrtc
def test_cubin_is_kept_and_a_damaged_one_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    macros = {"WKV_IO": "float"}
    code = build.load_cubin("wkv_cuda.cu", "sm_90", macros)
    (kept,) = (tmp_path / "rwkv_parity").iterdir()
    monkeypatch.setattr(build, "compile_cubin", lambda *_: pytest.fail("compiled again"))
    assert build.load_cubin("wkv_cuda.cu", "sm_90", macros) == code
    kept.write_bytes(kept.read_bytes()[:-100])
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.load_cubin("wkv_cuda.cu", "sm_90", macros) == code
    assert len(kept.read_bytes()) > len(code)


@needs_nvrtc
def test_what_nvrtc_finds_wrong_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(build.BuildError, match=r"NVRTC fails on wkv_cuda.cu for sm_90: .*error"):
        build.load_cubin("wkv_cuda.cu", "sm_90", {"WKV_IO": "nothing"})
    with pytest.raises(build.BuildError, match="for sm_999") as caught:
        build.load_cubin("wkv_cuda.cu", "sm_999", {"WKV_IO": "float"})
    assert "\n" not in str(caught.value)


def test_why_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"'cuda' cannot be had: it runs on NVIDIA GPUs, not"):
            wkv(*inputs(1, 1, 1, torch.float32), backend="cuda")
    if torch.version.cuda is None:
        assert cuda.missing("cuda") == "this PyTorch was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.missing("cuda") == "PyTorch finds no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert "pip install -e '.[cuda]'" in str(cuda.missing("cuda"))
    cuda._module.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", list(cuda._TYPES))
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """Against the backend that needs no kernel, eagerly and out of a captured graph."""
    on_cpu = inputs(3, 1000, 72, dtype)
    leaves = [x.detach().cuda().requires_grad_() for x in on_cpu]
    exact = results([x.detach().double().requires_grad_() for x in on_cpu], "torch")
    bound = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1e-2)
    actual = results(leaves, "cuda")
    for a, e in zip(actual, exact, strict=True):
        assert float((a.double().cpu() - e).norm() / e.norm()) < bound
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        captured, _ = wkv(*leaves, backend="cuda")
    graph.replay()
    assert torch.equal(captured, actual[0])
