"""The search over peak rates: planted parabolas, edges, and searches that are not equal."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from analysis.learning_rates import learning_rate_search, learning_rates, optimum
from analysis.study import load_study
from experiments.runs.freezing import searched_rate

planted = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted.py"))))
RATES = (0.001, 0.002, 0.004, 0.008, 0.016)


def parabola(rate: float, best: float, at_best: float = 2.5, width: float = 0.05) -> float:
    return at_best + width * np.log(rate / best) ** 2


def write_search(
    root: Path, model: str, best: float, rates: tuple = RATES, **about: object
) -> None:
    for rate in rates:
        loss = parabola(rate, best)
        planted.write_run(
            root, "search", model, bpb=loss, overrides=f"optim.peak_lr={rate}", **about
        )


@pytest.mark.parametrize("best", [0.0021, 0.004, 0.0071])
def test_a_planted_parabola_comes_back(best: float) -> None:
    assert optimum(RATES, [parabola(rate, best) for rate in RATES]) == pytest.approx((best, 2.5))


@pytest.mark.parametrize("losses", [[1, 2, 3], [3, 2, 1], [1, 1, 1], [2], [3, 2, 2.0, 1]])
def test_no_optimum_is_made_up_at_an_end_or_on_a_plateau(losses: list[float]) -> None:
    assert np.isnan(optimum(RATES[: len(losses)], losses)).all()
    assert np.isnan(optimum((1e-3, 2e-3, 4e-3), (2.0, 2.0, 2.0))).all()


def test_the_best_its_neighbours_and_the_edge_are_in_the_table(tmp_path: Path) -> None:
    write_search(tmp_path, "rwkv4_nano", best=0.005)
    write_search(tmp_path, "gpt_nano", best=0.0005)
    table = learning_rate_search(load_study(tmp_path / "search", "gpt"))
    rows = table.frame.set_index("model")
    inside, edge = rows.loc["rwkv4_nano"], rows.loc["gpt_nano"]
    assert (inside["peak_lr"], inside["note"]) == (0.004, "")
    assert inside["optimum"] == pytest.approx(0.005)
    assert inside["optimum_loss"] == pytest.approx(2.5)
    expected = parabola(0.002, 0.005) - parabola(0.004, 0.005)
    assert inside["lower_by"] == pytest.approx(expected)
    higher = parabola(0.008, 0.005) - parabola(0.004, 0.005)
    assert inside["higher_by"] == pytest.approx(higher)
    assert edge["note"] == "best at the lowest rate tried: try beyond 0.001"
    assert np.isnan([edge["lower_by"], edge["optimum"]]).all()
    assert inside["tried"] == "0.001 0.002 0.004 0.008 0.016"
    assert any("the same rates, tokens and seeds" in note for note in table.notes)


def test_a_search_that_one_side_has_not_had_is_said(tmp_path: Path) -> None:
    write_search(tmp_path, "rwkv4_nano", best=0.004)
    write_search(tmp_path, "gpt_nano", best=0.004, rates=RATES[:-1])
    study = load_study(tmp_path / "search", "gpt")
    for item in (learning_rate_search(study), learning_rates(study)):
        (note,) = [note for note in item.notes if note.startswith("NOT AN EQUAL SEARCH")]
        assert "rwkv4_nano was tried at 0.016 (1M tokens, seed 0), gpt_nano was not" in note


def test_a_panel_a_size_and_a_ring_a_model(tmp_path: Path) -> None:
    for size, best in (("nano", 0.008), ("micro", 0.004)):
        for family in ("rwkv4", "gpt"):
            write_search(tmp_path, f"{family}_{size}", best=best)
    figure = learning_rates(load_study(tmp_path / "search", "gpt")).figure
    assert [axes.get_title("left") for axes in figure.axes] == [
        "200k / 199k parameters", "930k / 931k parameters",
    ]  # fmt: skip
    for axes, best in zip(figure.axes, (0.008, 0.004), strict=True):
        rings = [line for line in axes.get_lines() if line.get_markerfacecolor() == "none"]
        assert [list(ring.get_xdata()) for ring in rings] == [[best], [best]]


def test_the_best_rate_is_the_one_that_training_reads(tmp_path: Path) -> None:
    for rate, losses in ((0.001, (2.0, 3.0)), (0.002, (2.4, 2.4)), (0.004, (2.5, 2.5))):
        for seed, bpb in enumerate(losses):
            override = f"optim.peak_lr={rate}"
            planted.write_run(tmp_path, "search", seed=seed, bpb=bpb, overrides=override)
    (row,) = learning_rate_search(load_study(tmp_path / "search", "gpt")).frame.to_dict("records")
    assert (row["peak_lr"], row["loss"], row["n_runs"]) == (0.002, 2.4, 6)
    assert searched_rate(tmp_path / "search", "rwkv4_nano") == 0.002
