"""Every run of a data seed sees the same batches, however they are loaded."""

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.data_module import TokenDataModule
from experiments.data.order import IGNORED, TrainWindows, ValWindows, permute
from experiments.data.prepare import prepare
from experiments.data.token_data import TokenData

from .small_data import text


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    """8000 training and 995 held-out bytes."""
    root, rng = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0)
    for name, n_bytes in (("train", 7999), ("val", 994)):
        (root / name).write_bytes(rng.integers(32, 127, n_bytes).astype(np.uint8).tobytes())
    cfg = text(root / "train", val_paths=str(root / "val"), val_tokens=None)
    return prepare(cfg, root / "data")


def module(
    data: TokenData, rank: int = 0, world_size: int = 1, step: int = 0, **changes: int
) -> TokenDataModule:
    sizes = {"ctx_len": 16, "batch_size": 8, "micro_batch_size": 2, "seed": 3}
    made = TokenDataModule(data, **(sizes | changes))
    made.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank, world_size=world_size, global_step=step
    )
    return made


@given(st.integers(1, 600), st.integers(0, 2**64), st.integers(0, 2**32))
def test_permutation_visits_each_slot_once(n_slots: int, seed: int, epoch: int) -> None:
    order = [permute(n_slots, seed, epoch, i) for i in range(n_slots)]
    assert sorted(order) == list(range(n_slots))


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


def test_order_is_pinned_and_far_positions_cost_nothing() -> None:
    """A change here breaks the resuming of every run made before."""
    assert [permute(10, 0, 0, i) for i in range(10)] == [0, 2, 5, 4, 9, 3, 7, 8, 6, 1]
    assert permute(324_331_372, 7, 3, 123_456_789) == 257024105
    places = {permute(10**12 + 39, 0, 5, i) for i in (0, 1, 10**12 + 38)}  # never if it were a list
    assert len(places) == 3


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


@pytest.mark.parametrize("ctx_len", [1, 7, 16, 142, 497, 994])
def test_every_held_out_token_but_the_first_is_a_target_once(data: TokenData, ctx_len: int) -> None:
    windows = ValWindows(data, ctx_len)
    pairs = [windows[i] for i in range(len(windows))]
    inputs, targets = (torch.cat(side) for side in zip(*pairs, strict=True))
    scored = targets != IGNORED
    assert torch.equal(targets[scored], torch.from_numpy(data.val[1:].astype(np.int64)))
    assert torch.equal(inputs[scored], torch.from_numpy(data.val[:-1].astype(np.int64)))
    assert len(inputs) == len(windows) * ctx_len
    assert inputs[~scored].sum() == 0
    assert (windows[len(windows)][1] == IGNORED).all()


def steps(data: TokenData, numbers: range, world_size: int = 1, **changes: Any) -> torch.Tensor:
    """The inputs of each step's whole batch, micro-batches of all ranks put together."""
    modules = [module(data, r, world_size, numbers.start, **changes) for r in range(world_size)]
    n_parts = modules[0].accumulate(world_size)
    loaders = [iter(m.train_dataloader()) for m in modules]
    parts = [next(loader)[0] for _ in numbers for _ in range(n_parts) for loader in loaders]
    return torch.cat(parts).view(len(numbers), 8, 16)


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
    windows = TrainWindows(data, 16, 3)
    expected = torch.stack([windows[n][0] for n in range(32)]).view(4, 8, 16)
    assert torch.equal(steps(data, range(4), world_size, **changes), expected)


def test_resuming_continues_with_the_next_batch_however_far(data: TokenData) -> None:
    assert torch.equal(steps(data, range(4, 6)), steps(data, range(6))[4:])
    inputs, _ = next(iter(module(data, step=10**9).train_dataloader()))
    assert torch.equal(inputs[0], TrainWindows(data, 16, 3)[8 * 10**9][0])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_the_held_out_windows_without_repeats(data: TokenData, world_size: int) -> None:
    loaders = [list(module(data, rank, world_size).val_dataloader()) for rank in range(world_size)]
    assert len({len(batches) for batches in loaders}) == 1
    targets = torch.cat([t for batches in loaders for _, t in batches])
    scored = targets[targets != IGNORED]
    assert torch.equal(scored.sort().values, torch.from_numpy(np.sort(data.val[1:]).astype(int)))
    n_filled = (targets == IGNORED).all(dim=1).sum()
    assert n_filled == -32 % world_size  # 63 windows in micro-batches of 2 are 32 batches


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"ctx_len": 8000}, 1, r"8000 training tokens, fewer than ctx_len \+ 1 = 8001"),
        ({"ctx_len": 995}, 1, r"995 held-out tokens, fewer than ctx_len \+ 1 = 996"),
        ({"micro_batch_size": 3}, 1, "batch_size=8 is not a multiple"),
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
