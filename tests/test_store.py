"""What goes into a store comes out of it, whatever its shape, place and thinning."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_close, assert_identical, ids, thinned
from torch import nn
from zarr.storage import LocalStore, MemoryStore

import statescope
from statescope import record
from statescope.layout import Layout, shard_tokens
from statescope.measured import STEPS
from statescope.schema import READ_BY_QUERY, ROOT_ATTRIBUTES, group_variables
from statescope.store import RecordWriter, write_whole
from statescope.watch import Watch
from statescope.zipped import Files


@pytest.fixture(scope="module")
def full(model: nn.Module) -> xr.DataTree:
    """Trace everything about a text of an odd length."""
    return statescope.trace(model, ids(61, sequences=2), snapshots=[0, 30, 60], probes=[25, 60]).load()


def attributes(layout: Layout) -> dict[str, Any]:
    watch = Watch(layout.layers, layout.heads, layout.snapshots, layout.probes, layout.tokens, layout.window)
    given = dict.fromkeys(ROOT_ATTRIBUTES, "x")
    return {**given, "schema_version": 1, "tokens": layout.tokens, "watch": watch.to_json()}


choices = st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True).map(sorted).map(tuple)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    tokens, window = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    positions = st.lists(st.integers(0, tokens - 1), max_size=3, unique=True).map(sorted).map(tuple)
    return Layout(
        sequences=draw(st.integers(1, 2)),
        tokens=tokens,
        layers=draw(choices),
        heads=draw(choices),
        key=draw(st.integers(1, 4)),
        value=draw(st.integers(1, 3)),
        window=window,
        snapshots=draw(positions),
        probes=draw(positions),
        shard=window * draw(st.integers(-(-tokens // (3 * window)), 8 + tokens // window)),
        erases=draw(st.booleans()),
    )


def random_blocks(layout: Layout, seed: int) -> dict[str, np.ndarray]:
    """Draw every variable of a record, special values included."""
    rng = np.random.default_rng(seed)
    blocks = {}
    for group in layout.groups():
        for name, variable in layout.variables(group).items():
            if variable.dtype == "float32":
                shape = tuple(len(layout.coordinate(group, d)) for d in variable.dims)
                values = (rng.standard_normal(shape) * 10.0 ** rng.integers(-38, 38, shape)).astype("f4")
                special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-45], "f4")
                blocks[f"{group}/{name}"] = np.where(
                    rng.random(shape) < 0.1, rng.choice(special, shape), values
                )
    return blocks


@settings(max_examples=15, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 2**31))
def test_round_trip(layout: Layout, seed: int) -> None:
    """Blocks written shard by shard come back bit for bit, trimmed to what is committed at every commit."""
    place, blocks = MemoryStore(), random_blocks(layout, seed)
    token_id = np.random.default_rng(seed).integers(0, 2**40, (layout.sequences, layout.tokens))
    writer = RecordWriter.create(place, layout, attributes(layout), token_id)
    for start in range(0, layout.tokens, layout.shard):
        stop = min(start + layout.shard, layout.tokens)
        write_shard(writer, layout, blocks, start, stop)
        writer.commit(stop, None if stop == layout.tokens else bytes([start % 256, 1, 2]))
        assert writer.committed == stop
        if stop < layout.tokens:
            assert writer.read_carry() == bytes([start % 256, 1, 2])
        tree = record.open(place)
        check(tree, layout, blocks, stop)
        np.testing.assert_array_equal(tree["tokens"].token_id, token_id[:, :stop])
        assert tree.attrs["complete"] == (stop == layout.tokens)
    assert "carry" not in zarr.open_group(place)


@settings(max_examples=10, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 2**31))
def test_written_whole(layout: Layout, seed: int) -> None:
    """A record written at once is the one that is filled in array by array."""
    token_id = np.random.default_rng(seed).integers(0, 2**40, (layout.sequences, layout.tokens))
    blocks, whole, filled = random_blocks(layout, seed), Files(), Files()
    about = attributes(layout) | {"first_nonfinite": None}
    write_whole(whole, layout, about, {**blocks, "tokens/token_id": token_id})
    writer = RecordWriter.create(filled, layout, about, token_id)
    for name, values in blocks.items():
        writer.write(name, values)
    writer.commit(layout.tokens, None)
    described = [{k: v.to_bytes() for k, v in s.files.items() if "json" in k} for s in (whole, filled)]
    assert described[0] == described[1] and "tokens/loss/zarr.json" in described[0]
    check(record.open(whole), layout, blocks, layout.tokens)
    xr.testing.assert_identical(record.open(whole).load(), record.open(filled).load())


def write_shard(
    writer: RecordWriter, layout: Layout, blocks: dict[str, np.ndarray], start: int, stop: int
) -> None:
    """Write what is about a stretch of tokens."""
    for name, values in blocks.items():
        group, variable = name.split("/")
        dims = layout.variables(group)[variable].dims
        at: dict[str, slice] = {}
        if group == "steps":
            at["token"] = slice(start // layout.window, -(-stop // layout.window))
        elif "token" in dims:
            at["token"] = slice(start, stop)
        for dim, places in (("position", layout.snapshots), ("probe", layout.probes)):
            inside = [i for i, p in enumerate(places) if start <= p < stop]
            if dim == "position" and dim in dims:
                if not inside:
                    break
                at[dim] = slice(inside[0], inside[-1] + 1)
        else:
            writer.write(name, values[tuple(at.get(d, slice(None)) for d in dims)], **at)


def check(tree: xr.DataTree, layout: Layout, blocks: dict[str, np.ndarray], committed: int) -> None:
    """Demand that a record holds what was committed and no more."""
    for name, values in blocks.items():
        group, variable = name.split("/")
        found = tree[group][variable]
        keep = tuple(
            slice(0, int((layout.coordinate(group, d) < committed).sum()))
            if d in ("token", "position", "probe")
            else slice(None)
            for d in found.dims
        )
        np.testing.assert_array_equal(found, values[keep])
        assert found.dtype == np.float32
        assert found.attrs.keys() >= {"long_name", "units"}
        for dim, kept in zip(found.dims, keep, strict=True):
            np.testing.assert_array_equal(found[dim], layout.coordinate(group, dim)[kept])


@pytest.mark.parametrize(("layers", "heads"), [(48, 32), (4, 8)], ids=["48x32", "4x8"])
@pytest.mark.parametrize("window", [1, 64])
def test_a_million_tokens_are_hundreds_of_files(layers: int, heads: int, window: int, tmp_path: Path) -> None:
    """A record of 1,048,576 tokens has hundreds of files: as many as shards, each written whole."""
    tokens, segment = 2**20, 2048
    layout = Layout(
        sequences=1,
        tokens=tokens,
        layers=tuple(range(layers)),
        heads=tuple(range(heads)),
        key=64,
        value=64,
        window=window,
        snapshots=(),
        probes=(),
        shard=shard_tokens(4 * layers * heads, segment),
    )
    place = tmp_path / "run.zarr"
    writer = RecordWriter.create(place, layout, attributes(layout), np.ones((1, tokens), np.int64))
    empty = files(place)
    counts = []
    for i in range(2):
        entries = slice(i * layout.shard // window, (i + 1) * layout.shard // window)
        for name in group_variables("steps", window):
            block = np.ones((1, layers, layout.shard // window, heads), np.float32)
            writer.write(f"steps/{name}", block, token=entries)
        loss = np.ones((1, layout.shard), np.float32)
        writer.write("tokens/loss", loss, token=slice(i * layout.shard, (i + 1) * layout.shard))
        counts.append(files(place) - empty - sum(counts))
    assert counts[0] == counts[1] == len(group_variables("steps", window)) + 1
    predicted = empty + math.ceil(tokens / layout.shard) * counts[0]
    assert 100 < predicted < 1000, f"{predicted} files"
    stored = {name: zarr.open_array(place / "steps" / name) for name in group_variables("steps", window)}
    for array in stored.values():
        shard = math.prod(array.shards) * 4
        assert shard <= 64 * 2**20, "a shard has to fit in memory several times"
        assert math.prod(array.chunks) * 4 <= 2 * 2**20, "a reader decompresses no more than that"
        assert array.shards[2] * window == layout.shard, "a commit is a whole shard"


def files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


@pytest.mark.parametrize("window", [2, 7, 16, 61, 100])
@pytest.mark.parametrize("segment", [5, 16, 61])
def test_window_thins_the_full_record(window: int, segment: int, model: nn.Module, full: xr.DataTree) -> None:
    """A trace with a window is the full record thinned; all other groups are the same."""
    text = torch.from_numpy(full["tokens"].token_id.values)
    trace = statescope.trace(
        model, text, window=window, segment=segment, snapshots=[0, 30, 60], probes=[25, 60]
    )
    steps = full["steps"].to_dataset().stack(row=("sequence", "layer")).transpose("row", "token", "head")
    expected = thinned(np.stack([steps[name].values for name in STEPS]), window)
    ends = np.minimum(np.arange(window - 1, 61 + window - 1, window), 60)
    np.testing.assert_array_equal(trace["steps"].token, ends)
    assert set(trace["steps"].data_vars) == set(expected)
    for name, values in expected.items():
        found = trace["steps"][name].stack(row=("sequence", "layer")).transpose("row", "token", "head")
        np.testing.assert_allclose(found, values, rtol=2e-5, atol=2e-6, err_msg=name)
    others = ("tokens", "snapshots", "probes")
    assert_close(
        xr.DataTree.from_dict({g: trace[g].to_dataset() for g in others}),
        xr.DataTree.from_dict({g: full[g].to_dataset() for g in others}),
    )


@pytest.mark.parametrize(
    ("layers", "heads"), [([1], None), (None, [2]), ([0, 2], [3, 0]), (2, 1), (range(1, 3), np.array([1, 2]))]
)
def test_selection_is_a_selection(layers: Any, heads: Any, model: nn.Module, full: xr.DataTree) -> None:
    """Asking for some layers and heads is asking for all and selecting, bit for bit."""
    text = torch.from_numpy(full["tokens"].token_id.values)
    trace = statescope.trace(model, text, layers=layers, heads=heads, snapshots=[0, 30, 60], probes=[25, 60])
    chosen = {"layer": np.unique(layers if layers is not None else range(3))}
    chosen["head"] = np.unique(heads if heads is not None else range(4))
    for group in full.children:
        expected = full[group].to_dataset()
        expected = expected.sel({d: chosen[d] for d in chosen if d in expected.dims})
        xr.testing.assert_identical(trace[group].to_dataset().load(), expected)


@pytest.mark.parametrize("segment", [61, 16])
def test_batch_equals_one_by_one(segment: int, model: nn.Module, full: xr.DataTree) -> None:
    """Sequences of a batch do not touch each other."""
    text = torch.from_numpy(full["tokens"].token_id.values)
    for i in range(2):
        alone = statescope.trace(model, text[i], segment=segment, snapshots=[0, 30, 60], probes=[25, 60])
        assert_close(alone, full.isel(sequence=[i]).map_over_datasets(_renumbered))


def _renumbered(dataset: xr.Dataset) -> xr.Dataset:
    return dataset.assign_coords(sequence=[0]) if "sequence" in dataset.dims else dataset


def test_places_give_one_record(model: nn.Module, full: xr.DataTree, tmp_path: Path) -> None:
    """Memory, a path as text, a path and an open store hold the same record."""
    text = torch.from_numpy(full["tokens"].token_id.values)
    places: list[Any] = [
        MemoryStore(),
        str(tmp_path / "text.zarr"),
        tmp_path / "deep" / "path.zarr",
        LocalStore(tmp_path / "store.zarr"),
    ]
    for place in places:
        trace = statescope.trace(model, text, store=place, snapshots=[0, 30, 60], probes=[25, 60])
        assert_identical(trace, full)
        assert_identical(statescope.open(place), full)
    assert {p.name for p in tmp_path.iterdir()} == {"text.zarr", "deep", "store.zarr"}
    with xr.open_zarr(tmp_path / "text.zarr", group="steps", consolidated=False) as plain:
        xr.testing.assert_identical(plain.load(), full["steps"].to_dataset())


@pytest.mark.parametrize("kind", ["memory", "path"])
def test_overwrite_replaces(kind: str, model: nn.Module, tmp_path: Path) -> None:
    """Nothing of the former record stays: groups, tokens and files."""
    place: Any = MemoryStore() if kind == "memory" else tmp_path / "run.zarr"
    statescope.trace(model, ids(50), store=place, snapshots=[3, 9], probes=9, window=2)
    found = statescope.trace(model, ids(20, seed=1), store=place, overwrite=True)
    expected = statescope.trace(model, ids(20, seed=1))
    assert sorted(found.children) == ["steps", "tokens"]
    assert_identical(found, expected)
    assert set(zarr.open_group(place, mode="r")) == {"steps", "tokens"}


def test_overwrite_that_fails_puts_the_former_record_back(model: nn.Module, tmp_path: Path) -> None:
    """Also where the new one was laid out already."""
    place, text = tmp_path / "run.zarr", ids(50)
    kept = statescope.trace(model, text, store=place, snapshots=3).load()

    def failing_after(allowed: int) -> Any:
        calls: list[int] = []

        def edit(layer: int, recurrence: Any) -> Any:
            calls.append(layer)
            if len(calls) > allowed:
                raise RuntimeError("enough")
            return recurrence

        return edit

    for allowed in (1, kept["steps"].sizes["layer"] - 1):
        with pytest.raises(RuntimeError, match="enough"):
            statescope.trace(
                model, text, store=place, segment=16, edit=failing_after(allowed), overwrite=True
            )
        assert [path.name for path in tmp_path.iterdir()] == ["run.zarr"]
        assert_identical(statescope.open(place), kept)


def test_negative_positions(model: nn.Module) -> None:
    """Negative positions count from the end; doubles and disorder do not matter."""
    text = ids(40)
    trace = statescope.trace(model, text, snapshots=[-1, 0, 39, -40, 7], probes=[-1, -11])
    assert trace["snapshots"].position.values.tolist() == [0, 7, 39]
    assert trace["probes"].probe.values.tolist() == [29, 39]
    same = statescope.trace(model, text, snapshots=[0, 7, 39], probes=[29, 39])
    assert_identical(trace, same)
    norm = np.sqrt((trace["snapshots"].state.astype("f8") ** 2).sum(["key", "value"]))
    expected = trace["steps"].state_norm.sel(token=[0, 7, 39]).transpose("sequence", "layer", "token", "head")
    np.testing.assert_allclose(norm, expected, rtol=1e-5)


def test_one_token(model: nn.Module) -> None:
    """The shortest text there is."""
    trace = statescope.trace(model, [5], snapshots=0, probes=0)
    assert np.isnan(trace["tokens"].loss.values).all()
    steps = trace["steps"]
    np.testing.assert_allclose(steps.state_norm, steps.write_norm, rtol=1e-6)
    np.testing.assert_array_equal(steps.write_overlap, 0)
    np.testing.assert_allclose(trace["probes"].share, 1, rtol=1e-5)
    np.testing.assert_allclose(trace["probes"].contribution.squeeze("probe"), steps.write_norm, rtol=1e-6)


def test_early_records_open_without_what_came_later(model: nn.Module, tmp_path: Path) -> None:
    """Of the variables that were added, none need be there; some without the others are damage."""
    place = tmp_path / "run.zarr"
    text = ids(30)
    want = statescope.trace(model, text, store=place, probes=[-1], segment=16)
    early = zarr.open_group(place)["probes"]
    for left, name in enumerate(READ_BY_QUERY, 1 - len(READ_BY_QUERY)):
        del early[name]
        if left:
            with pytest.raises(ValueError, match="lacks probes/"):
                statescope.open(place)
    got = statescope.open(place)
    assert set(got["probes"].data_vars) == {"contribution", "share", "share_before"}
    np.testing.assert_array_equal(got["probes"].share, want["probes"].share)
