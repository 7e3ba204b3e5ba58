"""Sentences made from findings, and the figure of predictors, on a table whose truth is known."""

from __future__ import annotations

import json

import pytest
import xarray as xr
from test_laws import row

from statescope.analyses.findings import findings
from statescope.analyses.predictors import predictors
from statescope.analyses.runs import farthest, tabulate
from statescope.analyses.thresholds import learned_to_forget
from statescope.analyses.words import in_words


@pytest.fixture(scope="module")
def table() -> xr.Dataset:
    """Thresholds between 16 and 32, 32 and 64, 64 and 128 for N = 4, 8, 16; of N = 8 one seed deviates."""
    cells = [(n, t, s) for n in (4, 8, 16) for t in (16, 32, 64, 128) for s in range(3)]
    return tabulate([row(n, t, s, t >= 8 * n or (n, t, s) == (8, 32, 2), reach=2 * n) for n, t, s in cells])


def test_words_say_what_the_numbers_say(table: xr.Dataset) -> None:
    (found,) = findings(table, far=256, size="state_size")
    who, threshold, by_loss, flat, learned, length, trend, longer, *predictors = in_words(
        json.loads(json.dumps(found))
    )
    assert who.startswith("recall stream, 10 steps, 0% of the lags uniform: 36 runs, of which 36 can be")
    assert "19 of them forget" in who and "from token 256 on" in who  # 3 + 2 + 1 cells of 3, and a seed
    assert "known for 3 of 3 state sizes (4 numbers: 23 tokens (16 to 32); 8 numbers: 45 tokens" in threshold
    assert (
        "grows with the state: as its 1.00th power" in threshold
        and "The linear one predicts best" in threshold
    )
    assert "is 256 with 4 numbers of state, 256 with 16" in length and "it is the same for all" in length
    assert "19 of 36 forget" in by_loss and "known for 3 of 3 state sizes (4 numbers: 23" in by_loss
    assert (
        "known for 2 of 3 state sizes" in flat and "; for 1 it is below that at all lengths tried. " in flat
    )
    assert learned == "Of 36 runs asked for passkeys, 36 learned to answer."
    growth, reach = predictors
    assert longer.startswith("With the same state, rank correlation with the training length: length rec")
    assert (
        "orders runs best by how much their loss grows" in growth and "by how far back they recall" in reach
    )
    assert "among all runs, retention (" in growth and "p = 0.001; beside it, train_length" in growth
    assert "among the same training length and state, " in growth
    assert "passkeys beyond -" in trend and "live memories +" in trend and "(p = 0.001)" in trend


def test_words_of_what_grows(table: xr.Dataset) -> None:
    (found,) = findings(table, far=256, size="state_size")
    trends = {"growth": {"correlation": 0.5, "p": 0.012, "runs": 9.0}, "x": {"correlation": None, "p": None}}
    ratio = {"ratio": 2.0, "low": 1.5, "high": 2.5, "pairs": 9.0, "rises": 8.0, "p": 0.02}
    failed = {"asked": 9, "not_learned": [[8, 2048, 1]]}
    points = xr.Dataset.from_dict(found["forget"]["points"])
    grown = found["forget"] | {"points": points.assign(growth=points["fraction"]).to_dict()}
    more = found | {"growth": grown, "trends": trends, "passkeys": failed}
    more["more_training"] = {"than": 5, "growth": ratio, "retention": ratio | {"p": None}}
    _, _, _, growth, trained, learned, _, trend, *_ = in_words(more)
    assert "falls to 2 at a training length that is known for 3 of 3 state sizes (4 numbers: 23" in growth
    assert "after 5 steps" in trained and trained.endswith("larger in 8 of 9 (p = 0.02).")
    assert "2.00 times as large (1.50 to 2.50)" in trained and "retention" not in trained
    assert "9 runs asked for passkeys, 8 learned" in learned and learned.endswith("N=8 T=2,048 seed 1.")
    assert trend.endswith("rank correlation with the state's size: growth +0.50 (p = 0.012).")
    assert in_words(more | {"stream": "text"})[0] == "text stream, 10 steps: 36 runs."
    assert "nothing varies" in in_words(found | {"trends": {"x": trends["x"]}})[6]


def test_farthest_is_where_something_was_asked(table: xr.Dataset) -> None:
    assert farthest(table) == 512
    shorter = table.assign(asked=table["asked"].where(table["position"] < 256, 0))
    assert farthest(shorter) == 128
    with pytest.raises(ValueError, match="asked nothing"):
        farthest(table.assign(asked=0 * table["asked"]))


def test_words_say_what_cannot_be_said(table: xr.Dataset) -> None:
    few = table.isel(run=(table["train_length"] == 16).values).drop_vars("passkeys")
    (found,) = findings(few, far=256, size="state_size")
    who, threshold, _, _, length, *_ = in_words(found)
    assert "0 of them forget" in who and threshold.endswith("is known for no state size.")
    assert length.endswith("No law is fitted to the length: of 3 sizes, 0 have one.")
    incapable = tabulate([row(4, 16, seed, True, reach=1) for seed in range(2)])
    (found,) = findings(incapable, far=256, size="state_size")
    said = in_words(found)
    assert "of which 0 can be judged" in said[0] and "is 256 with 4 numbers of state. No" in said[5]
    assert len(said) == 8  # two runs have no predictors


def test_predictors_figure(table: xr.Dataset) -> None:
    pytest.importorskip("seaborn")
    from statescope.analyses.plots import predictors_figure

    found = predictors(table, learned_to_forget(table, far=256))
    (ax,) = predictors_figure(found, most=2).axes
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert len(names) == 4 and {"train length", "state numbers"} < set(names)
    measured, known = (line.get_ydata().tolist() for line in ax.get_lines()[1:])
    assert sorted(measured + known) == [0, 1, 2, 3]
    assert {names[i] for i in known} == {"train length", "state numbers"}
    with pytest.raises(ValueError, match="most=0"):
        predictors_figure(found, most=0)
