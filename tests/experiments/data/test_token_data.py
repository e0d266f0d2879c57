import itertools
import json
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import token_data
from experiments.data.data_module import TokenDataModule
from experiments.data.prepare import prepare
from experiments.data.token_data import IGNORED, TokenData, TrainWindows, ValWindows, permute


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8000 training and 995 held-out bytes."""
    root = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    for name, n_bytes in (("train", 7999), ("val", 994)):
        (root / f"{name}.txt").write_bytes(
            rng.integers(32, 127, n_bytes).astype(np.uint8).tobytes()
        )
    source = {
        "_target_": "experiments.data.sources.TextFiles",
        "paths": str(root / "train.txt"),
        "val_paths": str(root / "val.txt"),
    }
    tokenizer = {"_target_": "experiments.data.tokenizer.BytesTokenizer", "vocab_size": 256}
    cfg = {"name": "tiny", "source": source, "tokenizer": tokenizer, "val_tokens": None}
    return prepare(cfg, root=root / "data")


@pytest.fixture
def data(folder: Path) -> TokenData:
    return TokenData.open(folder)


def module(data: TokenData, rank: int = 0, world_size: int = 1, step: int = 0, **changes: Any):  # type: ignore[no-untyped-def]
    sizes = {"ctx_len": 16, "batch_size": 8, "micro_batch_size": 2, "seed": 3}
    made = TokenDataModule(data, **(sizes | changes))  # type: ignore[arg-type]
    made.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank, world_size=world_size, global_step=step
    )
    return made


@given(st.integers(1, 600), st.integers(0, 2**64), st.integers(0, 2**32))
def test_permutation_visits_each_slot_once(n_slots: int, seed: int, epoch: int) -> None:
    order = [permute(n_slots, seed, epoch, i) for i in range(n_slots)]
    assert sorted(order) == list(range(n_slots))


@pytest.mark.parametrize("n_slots", [2, 3, 10, 97, 1000])
def test_permutation_depends_on_seed_and_epoch(n_slots: int) -> None:
    keys = list(itertools.product(range(8), range(8)))
    orders = {tuple(permute(n_slots, s, e, i) for i in range(n_slots)) for s, e in keys}
    assert len(orders) == (len(keys) if n_slots >= 10 else {2: 2, 3: 6}[n_slots])


def test_permutation_looks_random() -> None:
    """Where a slot lands is uniform over keys, and neighbours in time are strangers in the data."""
    n_slots, n_keys = 100, 4000
    hits = np.bincount([permute(n_slots, key, 0, 42) for key in range(n_keys)], minlength=n_slots)
    chi2 = ((hits - n_keys / n_slots) ** 2 / (n_keys / n_slots)).sum()
    assert chi2 < 99 + 4 * np.sqrt(2 * 99)
    order = np.array([permute(20_000, 1, 2, i) for i in range(20_000)])
    for lag in (1, 2, 141, 142):  # the grid is 142 wide
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 4 / np.sqrt(20_000)
    assert (np.abs(np.diff(order)) == 1).mean() < 4e-4


def test_permutation_is_constant_time_and_memory() -> None:
    n_slots = 10**12 + 39
    places = [permute(n_slots, 0, 5, i) for i in (0, 1, n_slots - 1)]
    assert len(set(places)) == 3
    assert all(0 <= place < n_slots for place in places)
    times = []
    for i in range(200):
        begin = time.perf_counter()
        permute(n_slots, 0, 5, i)
        times.append(time.perf_counter() - begin)
    assert sorted(times)[100] < 20e-6


def test_order_of_batches_is_pinned() -> None:
    """A change here breaks the resuming of every run made before."""
    assert [permute(10, 0, 0, i) for i in range(10)] == [0, 2, 5, 4, 9, 3, 7, 8, 6, 1]
    assert permute(324_331_372, 7, 3, 123_456_789) == 257024105


def test_samples_are_the_slots_of_the_stream(data: TokenData) -> None:
    windows = TrainWindows(data, ctx_len=16, seed=3)
    assert windows.n_slots == (8000 - 1) // 16
    stream = torch.from_numpy(data.train.astype(np.int64))
    for n in (0, 1, windows.n_slots, 10**12):
        inputs, targets = windows[n]
        epoch, i = divmod(n, windows.n_slots)
        start = permute(windows.n_slots, 3, epoch, i) * 16
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs, stream[start : start + 16])
        assert torch.equal(targets, stream[start + 1 : start + 17])
    slots = [windows.slot(n) for n in range(windows.n_slots)]
    assert sorted(slots) == list(range(windows.n_slots))
    assert slots != [windows.slot(windows.n_slots + n) for n in range(windows.n_slots)]


@pytest.mark.parametrize("ctx_len", [1, 7, 16, 142, 497, 994])
def test_every_held_out_token_but_the_first_is_a_target_once(data: TokenData, ctx_len: int) -> None:
    windows = ValWindows(data, ctx_len)
    inputs, targets = (
        torch.cat(x) for x in zip(*map(windows.__getitem__, range(len(windows))), strict=True)
    )
    scored = targets != IGNORED
    assert torch.equal(targets[scored], torch.from_numpy(data.val[1:].astype(np.int64)))
    assert torch.equal(inputs[scored], torch.from_numpy(data.val[:-1].astype(np.int64)))
    assert len(inputs) == len(windows) * ctx_len
    assert inputs[~scored].sum() == 0
    assert (windows[len(windows)][1] == IGNORED).all()


def first_steps(
    data: TokenData, n_steps: int, world_size: int, **changes: Any
) -> list[torch.Tensor]:
    """The inputs of each step's whole batch, micro-batches of all ranks put together."""
    modules = [module(data, rank, world_size, **changes) for rank in range(world_size)]
    accumulate = modules[0].accumulate(world_size)
    loaders = [iter(m.train_dataloader()) for m in modules]
    steps = []
    for _ in range(n_steps):
        parts = [next(loader)[0] for _ in range(accumulate) for loader in loaders]
        steps.append(torch.cat(parts))
    return steps


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"micro_batch_size": 8}),
        (1, {"micro_batch_size": 1}),
        (2, {}),
        (4, {}),
        (1, {"num_workers": 2}),
    ],
)
def test_batches_do_not_depend_on_how_they_are_loaded(
    data: TokenData, world_size: int, changes: dict[str, int]
) -> None:
    plain = first_steps(data, 4, 1)
    windows = TrainWindows(data, 16, 3)
    expected = [torch.stack([windows[n][0] for n in range(8 * i, 8 * i + 8)]) for i in range(4)]
    for step, other in zip(plain, first_steps(data, 4, world_size, **changes), strict=True):
        assert torch.equal(step, other)
    assert all(torch.equal(a, b) for a, b in zip(plain, expected, strict=True))


def test_resuming_continues_with_the_next_batch(data: TokenData) -> None:
    straight = first_steps(data, 6, 1)
    resumed = iter(module(data, step=4).train_dataloader())
    batch = torch.cat([next(resumed)[0] for _ in range(4)])
    assert torch.equal(batch, straight[4])
    assert list(module(data).batch_samples(4)) == list(range(32, 40))


class Recorder(lightning.pytorch.LightningModule):
    """Keeps the inputs it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []
        self.n_validated = 0

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        self.seen.append(batch[0])
        return self.weight * batch[0].float().mean()

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> None:
        self.n_validated += int((batch[1] != IGNORED).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.1)


def fit(data: TokenData, root: Path, max_steps: int, checkpoint: str | None) -> Recorder:
    served = TokenDataModule(data, 16, 8, 2, seed=3)
    trainer = lightning.pytorch.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        accumulate_grad_batches=served.accumulate(1),
        use_distributed_sampler=False,
        val_check_interval=8,  # micro-batches
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    recorder = Recorder()
    trainer.fit(recorder, served, ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(root / "last.ckpt")
    return recorder


@pytest.mark.filterwarnings("error:.*resum", "ignore:.*num_workers", "ignore:.*bottleneck")
def test_a_resumed_trainer_sees_the_batches_it_would_have_seen(
    data: TokenData, tmp_path: Path
) -> None:
    straight = fit(data, tmp_path, 6, None)
    assert torch.equal(
        torch.stack(straight.seen), torch.stack(first_steps(data, 6, 1)).view(24, 2, 16)
    )
    assert straight.n_validated == 3 * (len(data.val) - 1)
    first = fit(data, tmp_path, 3, None)
    second = fit(data, tmp_path, 6, str(tmp_path / "last.ckpt"))
    assert torch.equal(torch.stack(first.seen + second.seen), torch.stack(straight.seen))
    assert torch.equal(second.weight, straight.weight)


def test_seeking_far_is_immediate(data: TokenData) -> None:
    begin = time.perf_counter()
    inputs, _ = next(iter(module(data, step=10**9).train_dataloader()))
    assert time.perf_counter() - begin < 0.01
    assert torch.equal(inputs[0], TrainWindows(data, 16, 3)[8 * 10**9][0])


def test_module_works_without_a_trainer(data: TokenData) -> None:
    alone = TokenDataModule(data, 16, 8, 2, seed=3)
    assert torch.equal(next(iter(alone.train_dataloader()))[0], first_steps(data, 1, 1)[0][:2])
    assert sum(len(targets) for _, targets in alone.val_dataloader()) == len(alone.val_windows)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_the_held_out_windows_without_repeats(data: TokenData, world_size: int) -> None:
    loaders = [list(module(data, rank, world_size).val_dataloader()) for rank in range(world_size)]
    assert len({len(batches) for batches in loaders}) == 1
    targets = torch.cat([t for batches in loaders for _, t in batches])
    expected = torch.cat([ValWindows(data, 16)[i][1] for i in range(63)])
    assert (targets != IGNORED).sum() == len(data.val) - 1
    assert torch.equal(
        targets[targets != IGNORED].sort().values, expected[expected >= 0].sort().values
    )
    n_filled = (targets == IGNORED).all(dim=1).sum()
    assert n_filled == -32 % world_size  # 63 windows in micro-batches of 2 are 32 batches


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"ctx_len": 8000}, 1, r"8000 training tokens, fewer than ctx_len \+ 1 = 8001"),
        ({"ctx_len": 995}, 1, r"995 held-out tokens, fewer than ctx_len \+ 1 = 996"),
        ({"micro_batch_size": 3}, 1, "batch_size=8 is not a multiple"),
        ({"micro_batch_size": 0}, 1, "not a multiple"),
        ({"batch_size": 0}, 1, "not a multiple"),
        ({}, 3, "micro_batch_size=2 x 3 devices"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(
    data: TokenData, changes: dict[str, int], world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        module(data, 0, world_size, **changes).train_dataloader()
    assert "\n" not in str(caught.value)


def test_data_is_read_only_and_travels_by_path(data: TokenData) -> None:
    with pytest.raises(ValueError, match="read-only"):
        data.train[0] = 1
    packed = pickle.dumps(data)
    assert len(packed) < 1000
    assert np.array_equal(pickle.loads(packed).val, data.val)


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_damaged_folders_are_one_line(folder: Path, tmp_path: Path) -> None:
    def truncate(path: Path) -> None:
        (path / "train.bin").write_bytes((path / "train.bin").read_bytes()[:-1])

    def change_meta(path: Path, **changes: Any) -> None:
        meta = json.loads((path / "meta.json").read_text()) | changes
        (path / "meta.json").write_text(json.dumps(meta))

    cases = [
        (truncate, "7999 bytes instead of 8000"),
        (lambda p: (p / "val.bin").unlink(), "val.bin is missing"),
        (lambda p: (p / "meta.json").unlink(), "meta.json is missing"),
        (lambda p: (p / "meta.json").write_text("{"), "meta.json is damaged"),
        (lambda p: (p / "meta.json").write_text("[]"), "meta.json is damaged"),
        (lambda p: (p / "meta.json").write_text("{}"), "meta.json is damaged"),
        (lambda p: (p / "meta.json").write_bytes(b"\xff"), "meta.json is damaged"),
        (lambda p: change_meta(p, dtype="float99"), "meta.json is damaged"),
        (lambda p: change_meta(p, tokenizer_hash="0"), "tokenizer.json was changed"),
        (lambda p: (p / "tokenizer.json").write_text("x"), "tokenizer.json was changed"),
        (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ]
    for i, (damage, message) in enumerate(cases):
        path = copy_of(folder, tmp_path / str(i))
        TokenData.open(path)
        damage(path)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            TokenData.open(path)
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith(f"delete {path} and prepare again")


@pytest.mark.parametrize("whole_up_to", [1 << 28, 100])
@pytest.mark.parametrize(
    ("name", "place"), [("train.bin", 4567), ("val.bin", 500), ("val.bin", -1)]
)
def test_a_flipped_bit_is_noticed_on_opening(
    folder: Path,
    tmp_path: Path,
    name: str,
    place: int,
    whole_up_to: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_data, "WHOLE_UP_TO", whole_up_to)
    path = copy_of(folder, tmp_path / "copy")
    TokenData.open(path)
    tokens = bytearray((path / name).read_bytes())
    tokens[place] ^= 1
    (path / name).write_bytes(tokens)
    with pytest.raises(ValueError, match=f"{name} was changed: delete {path} and prepare again$"):
        TokenData.open(path)


def test_ids_outside_the_vocabulary_are_caught_when_read(folder: Path, tmp_path: Path) -> None:
    path = copy_of(folder, tmp_path / "copy")
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"vocab_size": 40}))
    with pytest.raises(ValueError, match="outside its vocabulary of 40"):
        TrainWindows(TokenData.open(path), 16, 0)[0]
