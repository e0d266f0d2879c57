"""Our logits against those of the other libraries: transformers, and the `rwkv` package.

Those libraries read the files themselves, in float32 on the CPU. One model is in memory at a time.
"""

import copy
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from experiments.conversion.weights_file import read_pickle, read_safetensors
from models.formats import Format
from models.language_model import LanguageModel

N_CHECKED = 128  # tokens that both libraries are run on
TOLERANCE = 1e-3  # of the largest logit, float32 against float32

# What `rwkv` reads from the environment, and the values at which it computes plainly.
RWKV_ENVIRONMENT = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
RWKV_UNSET = ("RWKV_V7_ON", "RWKV_DML_ON", "RWKV_RESCALE_LAYER")


def compare(
    model: LanguageModel,
    weights: Mapping[str, Tensor],
    form: Format,
    path: Path,
    scratch: Path,
    divided: bool = False,
) -> None:
    """Print how far the other library's logits of `path` are from ours, at the same random tokens.

    Ours are those of `model` with `weights`, in float32; the others of the files in `path`, read in
    a format. `scratch` is a folder for a copy. Where the library is not installed a line says so.

    Raises:
        ValueError: if they differ by more than `TOLERANCE` of the largest logit.
    """
    try:
        name = f"{form.library} {importlib.metadata.version(form.library)}"
    except importlib.metadata.PackageNotFoundError:
        print(f"not checked against {form.library}, which is not installed")
        return
    n = N_CHECKED if model.max_ctx is None else min(N_CHECKED, model.max_ctx)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (n,), generator=generator)
    ours = our_logits(model, weights, ids)
    try:
        if form.library == "transformers":
            others = hugging_face_logits(path, ids, form, divided)
        else:
            others = rwkv_logits(path, scratch, ids, form)
    except Exception as error:  # of all kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(
            f"{name} cannot run {path} ({reason}); check=false does without this check"
        ) from None
    worst, largest = (ours - others).abs().max().item(), others.abs().max().item()
    print(
        f"{name}: largest difference of logits {worst:.1e}, largest logit {largest:.3g}, "
        f"at {n} random tokens"
    )
    if not worst <= TOLERANCE * largest:
        raise ValueError(
            f"{name} computes other logits: they differ by {worst:.2g} where the largest is "
            f"{largest:.2g}. Nothing was written; check=false does without this check"
        )


@torch.inference_mode()
def our_logits(model: LanguageModel, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Logits (T, V) float32 at ids (T) of a model without memory, with these weights."""
    filled = copy.deepcopy(model)  # of a model on the meta device: costs nothing
    filled.load_state_dict({k: v.float() for k, v in weights.items()}, assign=True)
    return filled.eval()(ids[None])[0][0]


@torch.no_grad()
def hugging_face_logits(folder: Path, ids: Tensor, form: Format, divided: bool = False) -> Tensor:
    """Logits (T, V) float32 of the model in a folder at ids (T).

    `divided`: an RWKV's matrices lie in the folder as its inference mode holds them.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    form.before_check(model, divided)
    return model(ids[None]).logits[0].float()


def rwkv_logits(path: Path, scratch: Path, ids: Tensor, form: Format) -> Tensor:
    """Logits (T, V) float32 of the `rwkv` package at ids (T), of a `.pth` or `.safetensors` file.

    The package reads `.pth` alone, and norms the embedding in the dtype it finds it in; a file that
    is of another kind, or not float32, goes through a copy in `scratch` whose embedding is widened.
    """
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    plain = {str(form.file_name(name)): value for name, value in tensors.items()}
    all_float32 = all(value.dtype == torch.float32 for value in plain.values())
    if path.suffix == ".pth" and all_float32 and plain.keys() == tensors.keys():
        return _rwkv_logits(path, ids)
    for name in plain:
        if name.startswith(("emb.", "blocks.0.ln0.")):
            plain[name] = plain[name].float()
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".check.") as temporary:
        torch.save(plain, Path(temporary) / "model.pth")
        return _rwkv_logits(Path(temporary) / "model.pth", ids)


@torch.no_grad()
def _rwkv_logits(path: Path, ids: Tensor) -> Tensor:
    with plain_rwkv():
        from rwkv.model import RWKV

        model = RWKV(model=str(path), strategy="cpu fp32", verbose=False)
        logits, _ = model.forward(ids.tolist(), None, full_output=True)
    return logits.float().reshape(len(ids), -1)


@contextmanager
def plain_rwkv() -> Iterator[None]:
    """Within it, `rwkv` computes plainly; what it changes in this process is put back after."""
    environment = dict(os.environ)
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    for name in RWKV_UNSET:
        os.environ.pop(name, None)
    os.environ.update(RWKV_ENVIRONMENT)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = cudnn
        for name in {*RWKV_UNSET, *RWKV_ENVIRONMENT}:
            os.environ.pop(name, None)
            if name in environment:
                os.environ[name] = environment[name]
