"""Thresholds and laws, against tables and points whose truth is known."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from statescope.analyses.findings import findings
from statescope.analyses.growth import crossings, falling, loss_growth, paired, trend
from statescope.analyses.laws import LAWS, fit_laws
from statescope.analyses.paper import FORGET, MODELS, RECALL, paper_points
from statescope.analyses.predictors import predictors, rank_correlation
from statescope.analyses.runs import FORMAT, read_runs, tabulate
from statescope.analyses.thresholds import (
    answers_passkeys,
    best_recall,
    learned_to_forget,
    passkey_lengths,
    passkey_shares,
    recall_lengths,
    thresholds,
)

POSITIONS = [0, 16, 32, 64, 128, 256, 512]
LAGS = [1, 4, 16, 64]


def row(size: int, length: int, seed: int, forgets: bool, reach: int = 16) -> dict[str, Any]:
    """A run that recalls all lags below ``reach``; one that does not forget fails beyond 2 x its training."""

    def counts(beyond: bool) -> dict[str, Any]:
        asked = np.full((len(POSITIONS), len(LAGS)), 1000)
        if not beyond:
            asked[np.array(POSITIONS) >= length] = 0
        share = np.where(np.array(LAGS) < reach, 0.99, 0.2) + np.zeros(asked.shape)
        if beyond and not forgets:
            share[np.array(POSITIONS) >= 2 * length] *= 0.7
        right = np.round(asked * share).astype(int)
        return {
            "position": POSITIONS,
            "lag": LAGS,
            "asked": asked.tolist(),
            "right": right.tolist(),
            "loss": (asked * -np.log(share)).tolist(),
        }

    config = {"state_size": size, "train_length": length, "seed": seed, "steps": 10, "learning_rate": 1e-3}
    inside = {"retention": [[0.1 if forgets else 0.9, 0.05]], "live_memories": [[float(size + seed), 1.0]]}
    asked = {"length": [128, 256], "depth": [0.0, 1.0], "trials": 10}
    return {
        "passkeys": asked | {"right": [[10, 10], [10, 10 if forgets else 2]]},
        "run": f"{size}-{length}-{seed}",
        "step": 10,
        "state_numbers": 10 * size,
        "entries": 11 * size,
        "config": config | {"uniform": 0.0, "stream": "recall"},
        "inside": counts(False),
        "beyond": counts(True),
        "states": {"inside": inside, "beyond": {"overload": [[1.0, 1.0]]}},
    }


@pytest.fixture(scope="module")
def table() -> xr.Dataset:
    """Thresholds between 16 and 32, 32 and 64, 64 and 128 for N = 4, 8, 16; of N = 8 one seed deviates."""
    rows = []
    for size in (4, 8, 16):
        for length in (16, 32, 64, 128):
            for seed in range(3):
                forgets = length >= 8 * size
                if (size, length, seed) == (8, 32, 2):
                    forgets = True
                rows.append(row(size, length, seed, forgets, reach=2 * size))
    return tabulate(rows)


@pytest.mark.parametrize("criterion", ["recall", "loss"])
def test_who_forgets(table: xr.Dataset, criterion: str) -> None:
    forgets = learned_to_forget(table, far=256, criterion=criterion)
    expected = table["train_length"] >= 8 * table["state_size"]
    expected = expected | ((table["state_size"] == 8) & (table["train_length"] == 32) & (table["seed"] == 2))
    assert (forgets == expected).all()
    assert learned_to_forget(table, far=256, capable=0.995).isnull().all()


def test_thresholds_lie_between_failing_and_passing(table: xr.Dataset) -> None:
    found = thresholds(learned_to_forget(table, far=256), size="state_size")
    assert found["last_failing"].values.tolist() == [16, 32, 64]
    assert found["first_passing"].values.tolist() == [32, 64, 128]
    np.testing.assert_allclose(found["threshold"], np.sqrt(2) * np.array([16, 32, 64]))
    assert (found["low"] <= found["last_failing"]).all() and (found["high"] >= found["first_passing"]).all()
    assert float(found["low"].sel(state_size=8)) == 16  # the seed that deviates can come twice
    assert float(found["fraction"].sel(state_size=8, train_length=32)) == pytest.approx(1 / 3)
    assert float(found["fraction_low"].min()) == 0 and float(found["fraction_high"].max()) == 1


def test_ends_that_are_open(table: xr.Dataset) -> None:
    few = table.isel(run=(table["train_length"] <= 32).values)
    found = thresholds(learned_to_forget(few, far=256), size="state_size").sel(state_size=16)
    assert float(found["last_failing"]) == 32 and np.isinf(found["first_passing"])
    assert np.isnan(found["threshold"])
    incapable = tabulate([row(4, 16, 0, True, reach=1)])
    assert learned_to_forget(incapable, far=256).isnull().all()
    assert thresholds(learned_to_forget(incapable, far=256), size="state_size")["runs"].sum() == 0


def test_recall_lengths(table: xr.Dataset) -> None:
    reach = recall_lengths(table, far=256)
    for size, end in ((4, 15), (8, 15), (16, 63)):  # bins of lags end before 4, 16, 64
        of_size = reach.where((table["state_size"] == size) & (table["train_length"] == 128), drop=True)
        assert (of_size == {4: 2 * end, 8: 2 * end, 16: 2 * end}[size]).all()
    best = best_recall(reach, "state_size")
    assert best["length"].values.tolist() == [30, 30, 126] and (best["low"] <= best["high"]).all()
    forgets = learned_to_forget(table, far=256) == 1
    assert (passkey_lengths(table) == np.where(forgets, 256, 128)).all()


def test_runs_that_have_not_learned_to_answer_are_left_out() -> None:
    """What they recall is no length; what fails beyond the shortest prompt is one."""
    rows = [row(4, 128, seed, forgets=seed == 0) for seed in range(3)]
    rows[2]["passkeys"]["right"] = [[9, 8], [10, 10]]
    mixed = tabulate([*rows, {**row(4, 128, 3, True), "passkeys": None}])
    np.testing.assert_array_equal(answers_passkeys(mixed), [1, 1, 0, np.nan])
    np.testing.assert_array_equal(passkey_lengths(mixed), [256, 128, np.nan, np.nan])
    np.testing.assert_array_equal(passkey_lengths(mixed, capable=0.85), [256, 128, 0, np.nan])
    np.testing.assert_array_equal(passkey_shares(mixed)["inside"], [1, 1, np.nan, np.nan])
    none = passkey_lengths(mixed.isel(run=[2]))
    assert best_recall(none.isel(run=none.notnull().values))["length"].size == 0
    (found,) = findings(mixed, far=256, size="state_size")
    assert found["passkeys"] == {"asked": 3, "not_learned": [[4, 128, 2]]}
    later = {
        **row(4, 128, 4, True),
        "passkeys": {"length": [256], "depth": [0.0], "trials": 10, "right": [[9]]},
    }
    assert answers_passkeys(tabulate([later, rows[2]])).values.tolist() == [1, 0]


def test_bad_arguments_are_named(table: xr.Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="criterion='hope'"):
        learned_to_forget(table, criterion="hope")
    with pytest.raises(ValueError, match="far=4096"):
        learned_to_forget(table, far=4096)
    with pytest.raises(ValueError, match="3 points"):
        fit_laws([1, 2], [1, 2])
    with pytest.raises(ValueError, match="positive"):
        fit_laws([1, 2, 3], [1, np.inf, 2])
    (tmp_path / "other").write_text('{"statescope_passkeys": 1}\n')
    with pytest.raises(ValueError, match="no table of runs"):
        read_runs(tmp_path / "other")


def test_tables_open_packed_and_cut_off(table: xr.Dataset, tmp_path: Path) -> None:
    written = "".join(json.dumps(r) + "\n" for r in ({FORMAT: 1}, row(4, 16, 0, True), row(4, 32, 0, True)))
    (tmp_path / "a.jsonl").write_text(written + '{"run": "half')
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(written.encode()))
    cut, packed = (read_runs(tmp_path / name) for name in ("a.jsonl", "b.jsonl.xz"))
    xr.testing.assert_identical(cut, packed)
    assert read_runs(tmp_path / "a.jsonl", tmp_path / "b.jsonl.xz").sizes["run"] == 4
    (tmp_path / "a.jsonl").write_text(written + "{no}\n")
    with pytest.raises(ValueError, match="damaged in line 4"):
        read_runs(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("law", "truth"),
    [("linear", (5.2, -4.5)), ("power", (2.0, 1.7)), ("exponential", (4.756, 1.365, -0.742))],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_laws_are_found_again(law: str, truth: tuple[float, ...]) -> None:
    size = np.array([1.6, 2.4, 4.8, 8.0, 12.9, 19.3])
    length = LAWS[law].predict(np.array(truth), size)
    found = fit_laws(size, length, 0.97 * length, 1.03 * length)
    value, low, high = (found[n].sel(law=law).values[: len(truth)] for n in ("value", "low", "high"))
    np.testing.assert_allclose(value, truth, rtol=1e-3)
    assert (low <= value).all() and (value <= high).all()
    assert found.attrs["best"] == law and float(found["r2"].sel(law=law)) > 0.999999
    assert float(found["error"].sel(law=law)) < 0.01


def test_a_law_that_misses_its_points_is_not_known_better_than_it_fits() -> None:
    """Exact lengths that scatter about a power law: its exponent is as uncertain as least squares says."""
    rng = np.random.default_rng(0)
    size, slopes = np.geomspace(1, 32, 6), []
    for _ in range(12):
        length = size**0.5 * np.exp(rng.normal(0, 0.3, 6))
        found = fit_laws(size, length, length, length).sel(law="power", parameter="b")
        slopes.append([float(found[n]) for n in ("low", "value", "high")])
    low, value, high = np.array(slopes).T
    assert (low < value).all() and (value < high).all()
    assert ((low < 0.5) & (high > 0.5)).mean() > 0.8  # 95 % asked for, of six points
    assert np.median(high - low) == pytest.approx(4 * value.std(), rel=0.4)


def test_clamped_predictions_are_counted() -> None:
    found = fit_laws([1, 2, 3, 10], [1, 40, 80, 400])
    assert float(found["clamped"].sel(law="linear")) >= 1


def test_the_papers_own_points() -> None:
    points = paper_points()
    millions = points["entries"].values / 1e6
    np.testing.assert_allclose(millions, [19.3, 12.9, 4.8, 2.4, 1.6, 0.8], atol=0.06)  # as it prints them
    assert points["clamped"].values.tolist() == [0, 0, 0, 0, 0, 1]
    assert float(points["forget_length"][-1]) == 0 and list(points["model"].values) == list(MODELS)
    assert float(points["forget_length"][0]) == pytest.approx(95.6e3, rel=0.005)  # its prediction for 780M
    fitted = fit_laws(millions[:-1], points["forget_length"].values[:-1] / 1000)
    np.testing.assert_allclose(fitted["value"].sel(law="linear")[:2], list(FORGET.values()), rtol=1e-6)
    assert fitted.attrs["best"] == "linear"
    fitted = fit_laws(millions, points["recall_length"].values / 1000)
    np.testing.assert_allclose(fitted["value"].sel(law="exponential"), list(RECALL.values()), rtol=1e-3)
    assert fitted.attrs["best"] == "exponential"


def test_rank_correlation_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 6, (2, 15)).astype(float)
        assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.isnan(rank_correlation(np.ones(4), np.arange(4.0)))


def test_the_measure_that_orders_the_runs_comes_first(table: xr.Dataset) -> None:
    forgets = learned_to_forget(table, far=256)
    found = predictors(table, forgets)
    first = found.isel(predictor=0)
    assert str(first["predictor"].values) in ("retention (max)", "retention (mean)", "retention (median)")
    assert float(first["correlation"]) == pytest.approx(-1)
    assert float(first["low"]) <= -0.99 and float(first["most"]) == pytest.approx(-1)
    other = found.sel(predictor="live_memories (max)")
    assert abs(other["correlation"]) < 0.8 and other["low"] < other["correlation"] < other["high"]
    assert {"train_length", "state_numbers"} <= set(found["predictor"].values)
    assert float(first["p"]) == pytest.approx(1 / 1001)


def test_predictors_of_noise_are_not_significant(table: xr.Dataset) -> None:
    """The strongest of several is compared with the strongest of several: at most 5 in 100 are below 0.05."""
    rng = np.random.default_rng(1)
    few = table.drop_vars("inside_live_memories").isel(run=slice(0, 24))
    noise = [few["seed"] * 0 + rng.normal(size=24) for _ in range(40)]
    found = [predictors(few, one, within=("train_length",)) for one in noise]
    p = np.array([float(one["p"].sel(predictor="retention (max)")) for one in found])
    assert (p < 0.05).sum() <= 6 and p.min() > 0 and 0.25 < np.median(p) <= 1


def test_predictors_among_runs_alike(table: xr.Dataset) -> None:
    """What only follows the training length says nothing among runs of the same one."""
    follows = table.assign(inside_retention=table["inside_retention"] * 0 + table["train_length"])
    outcome = table["train_length"] * 100.0 + table["seed"]
    every = predictors(follows, outcome)
    assert float(every["correlation"].sel(predictor="retention (max)")) > 0.95
    within = predictors(follows, outcome, within=("train_length", "state_size"))
    assert not {"retention (max)", "train_length", "state_numbers"} & set(within["predictor"].values)
    assert float(within["correlation"].sel(predictor="live_memories (max)")) == pytest.approx(1)


def test_findings_are_plain_and_complete(table: xr.Dataset) -> None:
    (found,) = findings(table, far=256, size="state_size")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["runs"] == 36 and found["stream"] == "recall"
    assert found["forget"]["points"]["data_vars"]["last_failing"]["data"] == [16, 32, 64]
    laws = found["forget"]["laws"]
    assert laws["attrs"]["best"] in LAWS and len(laws["data_vars"]["error"]["data"]) == 3
    assert found["recall_falls"]["data_vars"]["mean"]["data"][0][-1] == 0
    named = found["predictors"]["growth"]["all runs"]["coords"]["predictor"]["data"]
    assert set(found["predictors"]) == {"growth", "recall"} and "retention (max)" in named
    assert found["forget_by_loss"]["points"]["data_vars"]["last_failing"]["data"] == [16, 32, 64]
    assert found["trends_with_length"]["length_recalled"]["runs"] > 0 and "more_training" not in found


def test_more_training_is_compared_run_by_run() -> None:
    """The loss grows by 1.5 at ten steps and by 3 at twenty; one run has no counterpart."""
    cells = [(n, t, s) for n in (4, 8) for t in (64, 128) for s in range(3)]
    rows = [grown(*cell, 1.5) for cell in cells]
    for cell in [*cells, (16, 64, 0)]:
        rows.append(grown(*cell, 3.0) | {"step": 20})
        rows[-1]["config"]["steps"] = 20
    first, second = findings(tabulate(rows), far=256)
    assert "more_training" not in first
    assert second["more_training"]["than"] == 10
    of = second["more_training"]["growth"]
    assert of["ratio"] == of["low"] == of["high"] == pytest.approx(2)
    assert of["pairs"] == of["rises"] == 12 and of["p"] < 0.01
    assert second["more_training"]["loss_far"]["ratio"] == pytest.approx(2)
    assert second["more_training"]["loss_at_the_end"]["ratio"] == pytest.approx(1)
    before, after = (xr.DataArray([1.0, 2.0, 4.0], {n: ("run", [0, 1, 2]) for n in KEYS}, ("run",)),) * 2
    assert paired(before, after)["p"] == 1 and paired(before, after)["ratio"] == 1
    alone = after.assign_coords(seed=("run", [7, 8, 9]))
    assert paired(before, alone)["pairs"] == 0 and np.isnan(paired(before, alone)["p"])


KEYS = ("state_size", "train_length", "seed")


def test_figures_show_all_of_it(table: xr.Dataset) -> None:
    pytest.importorskip("seaborn")
    from statescope.analyses.plots import (
        growth_figure,
        mechanism_figure,
        passkey_length_figure,
        position_figure,
        threshold_figure,
    )

    figure = position_figure(table)
    assert [ax.get_title() for ax in figure.axes] == ["N = 4", "N = 8", "N = 16"]
    assert len(figure.axes[0].collections) == 4 and figure.legends
    left, middle, _ = growth_figure(table, far=256).axes
    assert len(left.lines) == 4 and middle.get_title() == "where it falls to 2"
    twice = table.assign_coords(steps=("run", np.where(table["seed"] == 0, 5, 10)))
    labels = growth_figure(twice, far=256).axes[1].get_legend_handles_labels()[1]
    assert labels[-2:] == ["10 steps", "5 steps"]
    above = tabulate([grown(n, t, s, 5.0) for n in (4, 8) for t in (64, 128) for s in range(2)])
    assert growth_figure(above, far=256).axes[1].get_legend_handles_labels()[1] == ["above all"]
    panels = passkey_length_figure(table).axes
    assert panels[-1].get_title() == "longest prompt recalled" and panels[0].get_title() == "N = 4"
    none = table["passkeys"].where(table["state_size"] != 4, table["passkeys"] * 0)
    failed = passkey_length_figure(table.assign(passkeys=none.where(table["seed"] > 0, table["passkeys"])))
    assert failed.axes[0].get_title() == "N = 4 (4 of 12 runs)"
    figure = threshold_figure(table, far=256)
    left, right = figure.axes
    assert 8 <= left.get_ylim()[0] < 16 and 128 < left.get_ylim()[1] <= 256
    labels = left.get_legend_handles_labels()[1]
    assert "threshold" in labels and any("law" in label for label in labels)
    by_loss = threshold_figure(table, far=256, criterion="loss").axes[0]
    assert by_loss.get_title() == left.get_title()
    assert position_figure(table, "loss").axes[0].get_yscale() == "log"
    assert {"the paper's models", "the paper's law", "here"} <= set(right.get_legend_handles_labels()[1])
    with pytest.raises(ValueError, match="quantity='joy'"):
        position_figure(table, "joy")
    some = [row(4, length, seed, forgets=True) for length in (16, 32) for seed in range(2)]
    along = tabulate([{**r, "step": step} for r in some for step in (2, 5, 10)])
    figure = mechanism_figure(along, far=256)
    assert [len(ax.get_lines()) for ax in figure.axes] == [2, 2, 2, 2]
    assert figure.axes[0].get_lines()[0].get_xdata().tolist() == [2, 5, 10]
    with pytest.raises(ValueError, match=r"\[4, 8, 16\]"):
        mechanism_figure(table, far=256)


def grown(size: int, length: int, seed: int, growth: float) -> dict[str, Any]:
    """A run whose loss is larger beyond by a factor; longer lags are asked more often there, at more loss."""
    content = row(size, length, seed, forgets=True)
    by_lag = np.array([0.1, 0.3, 0.5, 0.7])
    for part, factor, often in (("inside", 1.0, [9, 1, 1, 1]), ("beyond", growth, [2, 5, 5, 5])):
        asked = (np.array(content[part]["asked"]) > 0) * 100 * np.array(often)
        loss = asked * by_lag * factor
        if part == "inside":  # the first half of the window says nothing
            loss[np.array(POSITIONS) < length / 2] *= 0.01
        content[part] |= {"asked": asked.tolist(), "loss": loss.tolist()}
    return content


def test_the_loss_grows_and_the_growth_crosses_a_level() -> None:
    """G = (8 N / T)^2: it is 2 at T = 8 N / sqrt(2), and at two seeds 1.1 times and 1 / 1.1 times that."""

    def expected(size: int, length: int) -> float:
        return (8 * size / length) ** 2

    runs = [(n, t, s) for n in (4, 8, 16) for t in (16, 32, 64, 128) for s in range(2)]
    table = tabulate([grown(n, t, s, expected(n, t) * 1.1 ** (2 - 4 * s)) for n, t, s in runs])
    growth = loss_growth(table, far=256, recent=64)
    resolved = table["train_length"] >= 32  # below, half the window has no bin of its own
    assert growth[~resolved].isnull().all() and resolved.sum() == 18
    of_run = expected(table["state_size"], table["train_length"]) * 1.1 ** (2 - 4 * table["seed"])
    np.testing.assert_allclose(growth[resolved], of_run[resolved])
    found = crossings(growth, "state_size")
    np.testing.assert_allclose(found["threshold"][1:], 8 * np.array([8, 16]) / np.sqrt(2))
    assert float(found["threshold"][0]) == 0  # already below 2 at 32
    assert (found["low"] <= found["threshold"]).all() and (found["high"] >= found["threshold"]).all()
    np.testing.assert_allclose(found["high"][2] / found["low"][2], 1.1**2)
    assert np.isinf(crossings(growth, "state_size", level=1e-3)["threshold"]).all()
    rising = trend(growth)
    assert rising["correlation"] > 0.8 and rising["p"] < 0.01 and rising["runs"] == 18
    assert np.isnan(trend(growth * 0)["p"])
    with pytest.raises(ValueError, match="far=4096"):
        loss_growth(table, far=4096)


def test_falling_is_the_nearest_that_never_rises() -> None:
    assert falling(np.array([3.0, 1.0, 2.0, 0.0])).tolist() == [3.0, 1.5, 1.5, 0.0]
    rng = np.random.default_rng(0)
    values = rng.normal(size=12)
    near = falling(values)
    assert (np.diff(near) <= 1e-12).all() and near.mean() == pytest.approx(values.mean())
    for _ in range(200):
        other = np.sort(near + rng.normal(size=12) * 0.3)[::-1]
        assert ((near - values) ** 2).sum() <= ((other - values) ** 2).sum()


def test_passkeys_inside_and_beyond(table: xr.Dataset) -> None:
    shares = passkey_shares(table)
    at_128 = (table["train_length"] == 128).values
    assert (shares["inside"][at_128] == 1).all() and shares["inside"][~at_128].isnull().all()
    forgets = learned_to_forget(table, far=256) == 1
    np.testing.assert_allclose(shares["beyond"][at_128], np.where(forgets[at_128], 1, 0.6))
