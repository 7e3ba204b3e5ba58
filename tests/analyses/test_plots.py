"""The figures: drawn from every kind of record, with what they promise, and not left open."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from conftest import needs
from records import Truth, make_record, random_truth

needs("seaborn")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import to_rgba  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from statescope import analyses  # noqa: E402
from statescope.analyses import plots  # noqa: E402
from statescope.analyses.passkey import tabulate  # noqa: E402
from statescope.analyses.plots.bins import BINS, binned  # noqa: E402
from statescope.analyses.plots.strip import COLUMNS  # noqa: E402

TOKENS, TRAIN = 96, 32

FIGURES: dict[str, Callable[[xr.DataTree], Figure]] = {
    "state": plots.state_figure,
    "retention": plots.retention_figure,
    "decay": plots.decay_figure,
    "overload": plots.overload_figure,
    "loss": plots.loss_figure,
    "rank": plots.rank_figure,
    "strip": plots.token_strip,
    "attention": plots.attention_figure,
}


def wide(heads: int, tokens: int = TOKENS) -> Truth:
    """Draw states of many heads."""
    rng = np.random.default_rng(0)
    shape = (1, 1, tokens, heads)
    decay = -(10.0 ** rng.uniform(-3, 0, heads)) * rng.exponential(size=shape)
    return Truth(decay, rng.normal(size=(*shape, 3)), rng.normal(size=(*shape, 3)))


def record(tokens: int = TOKENS, **options: Any) -> xr.DataTree:
    loss = np.random.default_rng(1).gamma(4, 0.3, (2, tokens)).astype(np.float32)
    loss[:, 0] = np.nan if tokens > 1 else 1
    ends = tuple(sorted({0, tokens // 2, tokens - 1}))
    given: dict[str, Any] = {"snapshots": ends, "probes": ends, "train_length": TRAIN, "loss": loss}
    return make_record(random_truth(tokens), **(given | options))


KINDS = {
    "numpy": record(),
    "dask": record(chunks={}),
    "windows": record(window=8),
    "short": record(tokens=TRAIN // 2),
    "one token": record(tokens=1),
    "no train length": record(train_length=None),
}


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    assert not plt.get_fignums()


def drawn(figure: Figure) -> Figure:
    """Draw on a canvas without a screen; warnings are errors."""
    content = io.BytesIO()
    figure.savefig(content, dpi=40)
    assert content.tell() > 1000
    return figure


def training_lines(ax: Axes) -> list[float]:
    """Where a panel has a dashed red line."""
    found = []
    for line in ax.lines:
        if to_rgba(line.get_color()) == to_rgba("tab:red") and line.get_linestyle() == "--":
            x, y = (set(np.asarray(v, float).tolist()) for v in line.get_data())
            found.append((x if len(x) == 1 else y).pop())
    return found


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "dask"])
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_every_record(name: str, kind: str) -> None:
    given = KINDS[kind]
    if name == "overload" and kind == "no train length":
        with pytest.raises(ValueError, match="train_length is not in the record"):
            FIGURES[name](given)
        return
    figure = drawn(FIGURES[name](given))
    panels = [ax for ax in figure.axes if ax.get_visible() and ax.axison]
    assert all(ax.has_data() for ax in panels)
    lines = [x for ax in panels for x in training_lines(ax)]
    if kind == "no train length":
        assert not lines
    elif name == "attention":  # so far before the probe
        assert set(lines) == ({TOKENS - 1 - TRAIN} if given.attrs["tokens"] == TOKENS else set())
    elif name != "strip":
        assert lines and set(lines) == {TRAIN}
    labelled = [ax for ax in panels if ax.get_label() != "<colorbar>"]
    assert any(ax.get_xlabel() for ax in labelled) and any(ax.get_ylabel() for ax in labelled)


def test_dask_and_numpy_are_drawn_alike() -> None:
    for name, draw in FIGURES.items():
        one, other = draw(KINDS["numpy"]), drawn(draw(KINDS["dask"]))
        for a, b in zip(one.axes, other.axes, strict=True):
            for line, twin in zip(a.lines, b.lines, strict=True):
                np.testing.assert_allclose(line.get_xydata(), twin.get_xydata(), rtol=1e-5, err_msg=name)


def test_train_length_can_be_given() -> None:
    for draw in (plots.state_figure, plots.retention_figure, plots.decay_figure, plots.overload_figure):
        figure = drawn(draw(KINDS["no train length"], train_length=20))
        assert {x for ax in figure.axes for x in training_lines(ax)} == {20}


def test_many_heads_are_bands_and_the_extreme_ones_named() -> None:
    figure = drawn(plots.state_figure(make_record(wide(40), train_length=TRAIN)))
    ax = figure.axes[0]
    assert len(ax.collections) == 2 and len(ax.lines) == 4  # bands; median, two heads, training length
    named = [t.get_text() for t in figure.axes[2].get_legend().get_texts()]
    norm = analyses.state_statistics(make_record(wide(40)))["norm"][0, 0]
    growth = norm[int(0.9 * TOKENS) :].mean("token") / norm[:TRAIN].max("token")
    assert named[3] == f"head {int(growth.argmax('head'))}"


def test_bins_are_means_of_what_they_hold() -> None:
    given = make_record(wide(3, tokens=5 * BINS), shard=4096)
    labels = {"norm": ("norm", "1")}
    found = binned(given, ("state_norm",), lambda b, c: ((b["state_norm"],), c), labels)["norm"]
    expected = given["steps"]["state_norm"].mean("sequence").coarsen(token=5).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(found["token"], expected["token"])


def test_bins_of_a_long_text_grow_and_leave_out_nothing() -> None:
    given = make_record(wide(3, tokens=5 * BINS), shard=4096)
    ones = binned(given, ("state_norm",), lambda b, c: ((b["state_norm"],), c), {"n": ("", "1")}, length=4)
    edges = np.diff(ones["token"].values)
    assert len(edges) < BINS and edges[0] == 1 and edges[-1] > 10 and (np.diff(edges) > -4).all()


def test_a_long_text_has_a_logarithmic_axis() -> None:
    given = make_record(wide(3), train_length=2)
    assert plots.state_figure(given).axes[-1].get_xscale() == "log"
    assert plots.state_figure(given, train_length=TRAIN).axes[-1].get_xscale() == "linear"


def test_retention_is_that_of_the_measure() -> None:
    figure = plots.retention_figure(KINDS["numpy"], token=5)
    kept = analyses.retention(KINDS["numpy"], 5).isel(layer=0)
    curves = np.stack([line.get_ydata() for line in figure.axes[0].lines[:3]], 1)
    expected = np.exp(np.log(kept.clip(1e-9)).mean("sequence"))
    np.testing.assert_allclose(curves[1:6], expected[1:6], rtol=1e-4)
    with pytest.raises(ValueError, match="token=96"):
        plots.retention_figure(KINDS["numpy"], token=TOKENS)


def test_overload_shows_the_verdicts() -> None:
    truth = wide(3)
    truth = Truth(np.zeros_like(truth.log_decay), np.abs(truth.key), np.abs(truth.value))
    figure = drawn(plots.overload_figure(make_record(truth, train_length=TRAIN)))
    said = [t.get_text() for t in figure.axes[1].get_legend().get_texts()]
    assert said == ["overloaded (3)"]
    assert sum(line.get_marker() == "v" for line in figure.axes[0].lines) == 3


def test_loss_of_several_records() -> None:
    other = KINDS["numpy"].copy()
    other.attrs = {**other.attrs, "model_id": "other", "train_length": 16}
    figure = drawn(plots.loss_figure([KINDS["numpy"], other]))
    said = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert {"x", "other"} < set(said) and training_lines(figure.axes[0]) == [16, TRAIN]
    with pytest.raises(ValueError, match="labels has 1 names; expected one for each of 2"):
        plots.loss_figure([other, other], labels=["one"])
    blank = record(loss=np.full((2, TOKENS), np.nan, np.float32))
    with pytest.raises(ValueError, match="no losses"):
        plots.loss_figure(blank)


@pytest.mark.parametrize("name", ["$x_$ costs $5", "/home/a/b/" + "long/" * 40 + "run-3", "_hidden"])
def test_any_name_of_a_model_can_be_drawn(name: str) -> None:
    given = KINDS["short"].copy()
    given.attrs = {**given.attrs, "model_id": name}
    said = drawn(plots.loss_figure(given)).axes[0].get_legend().get_texts()[0].get_text()
    assert said == name.lstrip("_") or (said.startswith("...") and name.endswith(said[3:]))


def test_layers_can_be_chosen() -> None:
    assert len(plots.state_figure(KINDS["numpy"], layers=[1]).axes) == 3
    with pytest.raises(ValueError, match="layers names layer 7; the record has 0, 1"):
        plots.state_figure(KINDS["numpy"], layers=[7])


def answers(skip: tuple[int, float] | None = None) -> xr.Dataset:
    rows = [
        {
            "length": n, "depth": d, "trial": t, "passkey": "12345", "needle_start": 0, "needle_stop": 9,
            "seed": t, "answer": "12345" if n < 1000 or d == 1 else "1",
        }
        for n in (256, 512, 1024) for d in (0.0, 0.5, 1.0) for t in range(40) if (n, d) != skip
    ]  # fmt: skip
    return tabulate({"train_length": 600}, rows)


def test_passkey_map() -> None:
    figure = drawn(plots.passkey_map(answers()))
    grid, below = figure.axes
    assert [t.get_text() for t in grid.texts] == ["100", "100", "0", "100", "100", "0", "100", "100", "100"]
    assert training_lines(grid) == training_lines(below) == [1.5]  # between 512 and 1,024
    said = [t.get_text() for t in figure.legends[0].get_texts()]
    assert "recall length 512" in said and "its interval: 512 to 1,024" in said


def test_passkey_map_marks_what_was_not_asked() -> None:
    grid = drawn(plots.passkey_map(answers((512, 0.5)))).axes[0]
    assert len(grid.texts) == 8 and [p.get_hatch() for p in grid.patches] == ["xxx"]
    nothing = answers().copy()
    nothing["correct"] = nothing["correct"] * np.nan
    with pytest.raises(ValueError, match="answers has none yet"):
        plots.passkey_map(nothing)


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.axes[1].texts]


def test_token_strip_writes_bytes() -> None:
    given = KINDS["numpy"].copy()
    content = "né\n $x$ 漢!".encode()
    ids = np.frombuffer(content.ljust(TOKENS, b"a"), np.uint8).astype(np.int64)
    given["tokens"]["token_id"][:] = ids
    figure = drawn(plots.token_strip(given, probe=-1, layer=0, head=2))
    assert "".join(texts(figure)[:12]) == "né·↵\xa0$x$\xa0□··"
    assert texts(figure)[12] == "!" and len(texts(figure)) == TOKENS
    assert "layer 0, head 2" in figure.axes[0].get_title()


def test_token_strip_wraps_tokens_and_hatches_negative_shares() -> None:
    given = KINDS["numpy"]
    pieces = [f" word{i}" for i in range(TOKENS)]
    figure = drawn(plots.token_strip(given, TOKENS - 1, pieces=pieces, tokens=(10, 90)))
    places = {t.get_text(): t.get_position() for t in figure.axes[1].texts}
    assert len(places) == 80 and max(x + len(w) for w, (x, _) in places.items()) <= COLUMNS
    assert len({y for _, y in places.values()}) == -(-sum(map(len, places)) // (COLUMNS - 1))
    assert any(c.get_hatch() for c in figure.axes[1].collections)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"probe": 5}, "probe=5; the record has 0, 48, 95"),
        ({"layer": 9}, "layer=9"),
        ({"head": 9}, "head=9"),
        ({"sequence": 9}, "sequence=9"),
        ({"quantity": "size"}, "quantity='size'"),
        ({"tokens": (90, 80)}, r"tokens=\(90, 80\)"),
        ({"pieces": ["a"]}, "pieces has 1 texts; expected one for each of 96"),
    ],
    ids=str,
)
def test_token_strip_says_what_is_wrong(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plots.token_strip(KINDS["numpy"], **options)


def test_token_strip_asks_for_pieces() -> None:
    given = KINDS["numpy"].copy()
    given["tokens"]["token_id"][:] = 50_000
    with pytest.raises(ValueError, match="token id 50000 is no byte"):
        plots.token_strip(given)


def test_passkey_figure_of_a_record_that_ends_with_the_training_length() -> None:
    """Nothing lies beyond; the head that is largest in all is drawn heavy."""
    record = make_record(random_truth(256), probes=(255,), train_length=256)
    panel = plots.PasskeyPanel("inside", record, 0, slice(20, 40), "12345", "12345")
    left, right = drawn(plots.passkey_figure([panel])).axes
    middle = analyses.overload_ratio(record).isel(sequence=0).median("token").compute()
    worst = middle.argmax(("layer", "head"))
    name = f"layer {int(middle['layer'][worst['layer']])}, head {int(middle['head'][worst['head']])}"
    assert left.get_legend_handles_labels()[1] == [name, "training length"]
    assert right.get_title().endswith("(right)")


def test_attention_figure_shows_where_heads_read() -> None:
    figure = drawn(plots.attention_figure(KINDS["numpy"], layers=[1]))
    left, right, _ = figure.axes
    row = np.abs(analyses.implicit_attention(KINDS["numpy"]).isel(sequence=0, layer=1, probe=-1).values)
    part = 100 * row / row.sum(0)
    shown = left.collections[0].get_array().reshape(3, TOKENS)
    np.testing.assert_allclose(shown.filled(np.nan), np.where(part.T > 0.01, part.T, np.nan), rtol=1e-5)
    distance = analyses.mean_distance(KINDS["numpy"]).isel(sequence=0, layer=1, probe=-1).values
    np.testing.assert_allclose(left.lines[0].get_xdata(), TOKENS - 1 - distance)
    assert [b.get_width() for b in right.patches] == pytest.approx(
        [100 * part.T[h, -64:].sum() / 100 for h in range(3)], rel=1e-5
    )
    short = plots.attention_figure(make_record(random_truth(TOKENS), probes=(90,), reach=20), 90)
    assert drawn(short).axes[0].get_xlim()[0] == 70.5
    for options, said in (
        ({"probe": 3}, "probe=3; the record has"),
        ({"sequence": 9}, "sequence=9"),
        ({"layers": [7]}, "layer 7"),
    ):
        with pytest.raises(ValueError, match=said):
            plots.attention_figure(KINDS["numpy"], **options)


def test_attention_of_long_texts_is_drawn_by_distance() -> None:
    """Nothing is lost: a head's stretches sum to its whole, and what is near stands apart."""
    record = make_record(random_truth(260), probes=(259,))
    figure = drawn(plots.attention_figure(record, layers=[1], recent=1))
    left = figure.axes[0]
    assert left.get_xscale() == "log" and left.get_xlim() == (260.5, 0.5)
    row = np.abs(analyses.implicit_attention(record).isel(sequence=0, layer=1, probe=-1).values)
    shown = left.collections[0].get_array().reshape(row.shape[1], -1)
    np.testing.assert_allclose(shown[:, 0], 100 * row[-1] / row.sum(0), rtol=1e-5)  # the probe itself
    assert (np.abs(shown.sum(1) - 100) < 1).all() and shown.shape[1] < 200
    distance = analyses.mean_distance(record).isel(sequence=0, layer=1, probe=-1).values
    np.testing.assert_allclose(left.lines[0].get_xdata(), 1 + distance)


def test_remembrance_figure() -> None:
    rng = np.random.default_rng(0)
    values = np.sort(rng.random((2, 9, 4)), axis=-1)[..., ::-1].copy()
    values[:, :3, 3] = np.nan
    coords = {"length": [1, 8, 64, 512]}
    attrs = {"model_id": "m", "train_length": 64, "tokens": 600}
    found = xr.Dataset({"remembrance": (("sequence", "end", "length"), values)}, coords, attrs)
    (ax,) = drawn(plots.remembrance_figure(found)).axes
    mean, largest, training = ax.lines
    np.testing.assert_allclose(mean.get_ydata(), np.nanmean(values, axis=(0, 1)))
    np.testing.assert_allclose(largest.get_ydata(), np.nanmax(values, axis=(0, 1)))
    assert training_lines(ax) == [64] and training.get_label() == "training length"
    alone = found.isel(sequence=[0], end=[4]).assign_attrs(train_length=None)
    assert len(drawn(plots.remembrance_figure(alone)).axes[0].lines) == 2
    with pytest.raises(ValueError, match="found has no remembrance"):
        plots.remembrance_figure(found.drop_vars("remembrance"))


def test_failure_figure() -> None:
    path = Path(__file__).parents[2] / "notebooks" / "results" / "failure-n64.json"
    found = xr.Dataset.from_dict(json.loads(path.read_text(encoding="utf-8")))
    figure = drawn(plots.failure_figure(found))
    auc, importance, calibration = figure.axes
    assert [b.get_height() + 0.5 for b in auc.patches[::2]] == pytest.approx(found["auc"].values)
    assert [t.get_text() for t in importance.get_yticklabels()][-1] == "share"
    assert calibration.get_xlabel() == "predicted probability"
    with pytest.raises(ValueError, match="explanation has no auc"):
        plots.failure_figure(found.drop_vars("auc"))


def test_missing_groups_are_named() -> None:
    bare = make_record(random_truth(8), train_length=4)
    with pytest.raises(ValueError, match="no /snapshots"):
        plots.rank_figure(bare)
    for figure in (plots.token_strip, plots.attention_figure):
        with pytest.raises(ValueError, match="no /probes"):
            figure(bare)
