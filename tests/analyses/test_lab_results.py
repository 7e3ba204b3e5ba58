"""The lab's tables in the repository: whole, with findings that are theirs, as the README says them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from statescope.analyses.findings import budgets
from statescope.analyses.growth import crossings, loss_growth, trend
from statescope.analyses.laws import fit_laws
from statescope.analyses.runs import read_lines, read_runs, tabulate
from statescope.analyses.thresholds import learned_to_forget, passkey_lengths, thresholds

RESULTS = Path(__file__).parents[2] / "notebooks" / "results"

MADE = {"device", "torch", "date", "command", "statescope"}
"""What every row of a table in the repository says of how it was made."""


def table_of(name: str) -> xr.Dataset:
    return read_runs(RESULTS / f"{name}.jsonl.xz")


def findings_of(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize(
    ("name", "runs", "grid"),
    [
        ("h200-lab-recall", 216, (6, 6, 3, 2)),
        ("h200-lab-again", 54, (3, 6, 3, 1)),
        ("h200-lab-passkeys", 40, (5, 4, 2, 1)),
        ("cpu-lab-mechanism", 54, (1, 3, 2, 1)),
    ],
)
def test_the_grids_that_were_run(name: str, runs: int, grid: tuple[int, ...]) -> None:
    """Whole, and every row says how it was made."""
    rows, _ = read_lines(RESULTS / f"{name}.jsonl.xz")
    assert len(rows) == runs and all(set(r["made"]) >= MADE for r in rows)
    assert all(f"--states {r['config']['state_size']}" in r["made"]["command"] for r in rows)
    table = tabulate(rows)
    names = ("state_size", "train_length", "seed", "steps")
    assert tuple(len(np.unique(table[n])) for n in names) == grid
    cells = set(zip(*(table[n].values.tolist() for n in names), strict=True))
    assert len(cells) == np.prod(grid) and table["inside_retention"].notnull().all()


@pytest.mark.parametrize("name", ["h200-lab-recall", "h200-lab-again", "h200-lab-passkeys"])
def test_the_findings_are_the_tables(name: str) -> None:
    said, kinds = findings_of(name), list(budgets(table_of(name)))
    assert [found["steps"] for found in said] == [kind["steps"] for kind, _ in kinds]
    for found, (_, runs) in zip(said, kinds, strict=True):
        assert found["runs"] == runs.sizes["run"]
        growth = loss_growth(runs)
        again = {
            "growth": crossings(growth, "entries"),
            "forget": thresholds(learned_to_forget(runs), "entries"),
            "forget_by_loss": thresholds(learned_to_forget(runs, criterion="loss"), "entries"),
        }
        for part, points in again.items():
            stored = xr.Dataset.from_dict(found[part]["points"])
            for value in {"growth", "fraction", "threshold"} & set(points):
                expected = points[value].where(np.isfinite(points[value]))
                np.testing.assert_allclose(stored[value].astype(float), expected, rtol=1e-3)
        assert found["trends"]["growth"] == pytest.approx(trend(growth, "entries"), rel=1e-3)


ALL = [*findings_of("h200-lab-recall"), *findings_of("h200-lab-again"), *findings_of("h200-lab-passkeys")]
FEW, MANY, AGAIN, ASKED = ALL
README = " ".join((RESULTS.parents[1] / "README.md").read_text(encoding="utf-8").split())


def short(value: Any, digits: int = 2) -> str:
    """As the README writes numbers: without a 0 before the point."""
    return f"{float(value):.{digits}f}".replace("0.", ".", 1)


def points_of(found: dict[str, Any], what: str) -> xr.Dataset:
    return xr.Dataset.from_dict(found[what]["points"]).astype(float)


def known(found: dict[str, Any]) -> list[float]:
    values = points_of(found, "growth")["threshold"].values
    return [float(x) for x in values if np.isfinite(x) and x > 0]


def power(found: dict[str, Any], what: str) -> list[str]:
    law = xr.Dataset.from_dict(found[what]["laws"]).sel(law="power", parameter="b")
    return [short(law[name]) for name in ("value", "low", "high")]


def fit(found: dict[str, Any], what: str, name: str) -> dict[str, float]:
    """R2 and held-out factor of a law."""
    law = xr.Dataset.from_dict(found[what]["laws"]).sel(law=name)
    return {"r2": float(law["r2"]), "off": float(np.exp(law["error"].astype(float)))}


def predictor(
    found: dict[str, Any], outcome: str, alike: str, name: str, value: str = "correlation"
) -> float:
    table = xr.Dataset.from_dict(found["predictors"][outcome][alike])
    return float(table[value].sel(predictor=name))


def both(found: dict[str, float]) -> str:
    """A correlation and its p."""
    p = short(found["p"], 3 if found["p"] < 0.01 else 2)
    return f"({short(found['correlation'])}, p = {p})"


def says(*sentences: str) -> None:
    for sentence in sentences:
        assert sentence in README, sentence


def test_the_readme_on_the_threshold() -> None:
    largest = points_of(MANY, "growth")["growth"].values[-1]
    linear, grown = fit(MANY, "growth", "linear"), fit(MANY, "growth", "power")
    value, low, high = power(MANY, "growth")
    flat, flat_low, flat_high = power(FEW, "growth")
    says(
        f"[{FEW['runs'] + MANY['runs']} runs](notebooks/results/h200-lab-recall.json)",
        "threshold is {:.0f}, {:.0f}, {:.0f}, {:.0f} and {:.0f} tokens for N = 8 to 128,".format(
            *known(MANY)
        ),
        f"not reached for 256 ({largest[-2]:.2f} at 512, {largest[-1]:.2f} at 1,024)",
        f"as the {value}th power of the state ({low} to {high}; R2 {short(grown['r2'])};",
        f"off by a factor {grown['off']:.2f} at a size left out)",
        f"A line with an intercept fits a little less well (R2 {short(linear['r2'])}; {linear['off']:.2f})",
        f"[{AGAIN['runs']} runs](notebooks/results/h200-lab-again.json)",
        "{:.0f}, {:.0f} and {:.0f} for N = 8, 64, 256".format(*known(AGAIN)),
        f"it is {min(known(FEW)):.0f} to {max(known(FEW)):.0f}, or less, at any N",
        f"(exponent {flat}, {flat_low} to {flat_high})",
    )
    assert grown["off"] < min(linear["off"], fit(MANY, "growth", "exponential")["off"])


def test_a_longer_threshold_of_the_largest_state_would_leave_it_linear() -> None:
    points = points_of(MANY, "growth")
    assert np.isnan(points["threshold"].values).tolist() == 5 * [False] + [True]
    ends = [points[n].fillna(end).values for n, end in (("threshold", 2048), ("low", 1024), ("high", 4096))]
    further = fit_laws(points["entries"].values, *ends)
    assert further.attrs["best"] == "linear" and further["high"].sel(law="power", parameter="b") > 1
    says("but were the threshold of 256 at 2,048, it would be as good")


def test_the_readme_on_more_training_and_on_recall() -> None:
    names = ("growth", "retention", "loss_far", "loss_at_the_end")
    more, kept, far, end = (MANY["more_training"][name] for name in names)
    forget = [
        round(float((p["fraction"] * p["runs"]).sum()))
        for p in (points_of(found, "forget_by_loss") for found in (MANY, FEW))
    ]
    falls, ends = MANY["trends"]["recall_falls"], MANY["trends_with_length"]
    says(
        f"far beyond is {short(far['ratio'])} times as large, lower in {108 - far['rises']:.0f} of 108, but",
        f"that at the end of the training length {short(end['ratio'])} times",
        f"growth is {more['ratio']:.2f} times as large, larger in {more['rises']:.0f}",
        f"(p = {short(more['p'], 3)}), and the head that keeps longest retains",
        f"retains {kept['ratio']:.2f} times as much",
        f"{forget[0]} of {MANY['runs']} forget; {forget[1]} did",
        f"(rank correlation {short(falls['correlation'])} at the same length)",
        f"[loss far beyond](notebooks/figures/lab-loss.png) {both(ends['loss_far'])};",
        f"it raises the loss at its end ({short(ends['loss_at_the_end']['correlation'])})",
    )
    assert far["pairs"] == end["pairs"] == 108 and far["p"] == more["p"] == kept["p"]
    assert power(MANY, "forget")[2].startswith("-")  # by recall the threshold falls with N


def test_the_readme_on_passkeys_and_lags() -> None:
    table = table_of("h200-lab-passkeys")
    every = trend(passkey_lengths(table, capable=0), "entries")
    by_state, by_length = ASKED["trends"], ASKED["trends_with_length"]
    lags = points_of(MANY, "recall")["length"].values[[0, -1]]
    value, low, high = power(MANY, "recall")
    recalled = by_state["length_recalled"]
    says(
        f"[{ASKED['runs']} runs](notebooks/results/h200-lab-passkeys.json)",
        f"{len(ASKED['passkeys']['not_learned'])} never learned to answer",
        f"follows the training length {both(by_length['length_recalled'])}, not N",
        f"N {both(recalled)[:-1]}; with all {every['runs']:.0f}, {both(every)[1:]}",
        f"do not fail earlier {both(by_state['passkeys_beyond'])}",
        "from {:.0f} to {:.0f} tokens,".format(*lags),
        f"as its {value}th power ({low} to {high}), not exponentially",
    )
    laws = {name: fit(MANY, "recall", name)["off"] for name in ("linear", "power", "exponential")}
    assert max(laws, key=lambda name: laws[name]) == "exponential"


def test_the_readme_on_what_tells_beforehand() -> None:
    length, cell = "the same training length", "the same training length and state"
    p = predictor(MANY, "growth", cell, "half_life (max)", "p")
    of_cell = MANY["predictors"]["growth"][cell]["coords"]["predictor"]["data"]
    says(
        f"the loss will grow ({short(predictor(MANY, 'growth', 'all runs', 'retention (max)'))})",
        f"half-life does ({short(predictor(MANY, 'growth', length, 'half_life (max)'))};",
        f"; N {short(predictor(MANY, 'growth', length, 'state_numbers'))}), and of the same N too",
        f"({short(predictor(MANY, 'growth', cell, 'half_life (max)'))}, p = ",
        f", p = {short(p, 3)} as the strongest of {len(of_cell)})",
        f"(recall stream, {short(predictor(MANY, 'recall', 'all runs', 'state_numbers'))})",
        f"(passkeys, {short(predictor(ASKED, 'recall', 'all runs', 'train_length'))})",
    )
    for found, outcome, name in ((MANY, "growth", "retention (max)"), (MANY, "recall", "state_numbers")):
        assert found["predictors"][outcome]["all runs"]["coords"]["predictor"]["data"][0] == name
    assert ASKED["predictors"]["recall"]["all runs"]["coords"]["predictor"]["data"][0] == "train_length"
    assert MANY["predictors"]["growth"][length]["coords"]["predictor"]["data"][0] == "half_life (max)"
