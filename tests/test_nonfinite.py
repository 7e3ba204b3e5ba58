"""Numbers that are not finite are recorded, warned of, and located."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import assert_close, build, ids
from torch import nn
from zarr.storage import MemoryStore

import statescope
from statescope import layout
from statescope.store import RecordWriter

BAD = 7
"""Token id whose embedding is NaN."""


def poisoned(**changes: Any) -> nn.Module:
    """Build a model with one row of NaN in its embedding."""
    model = build("mamba2", **changes)
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = torch.nan
    return model


def text_with(*places: int, tokens: int = 90) -> torch.Tensor:
    text = ids(tokens)
    text[text == BAD] = BAD + 1
    text[0, list(places)] = BAD
    return text


def first_in(record: Any) -> int:
    """Find the first token at which anything but the loss of token 0 is not finite."""
    bad = ~np.isfinite(record["tokens"].loss.values)
    bad[:, 0] = False
    for name in record["steps"].data_vars:
        bad |= (~np.isfinite(record["steps"][name].values)).any((1, 3))
    return int(np.flatnonzero(bad.any(0))[0])


@pytest.mark.parametrize("segment", [16, 1, 90, 32])
@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_nonfinite_weights(backend: str, segment: int) -> None:
    """A NaN is recorded, warned of and located; all before it is as if the text ended there."""
    model, text = poisoned(tie_word_embeddings=False), text_with(40, 70)
    with pytest.warns(RuntimeWarning, match="non-finite values; the first is in") as caught:
        record = statescope.trace(model, text, backend=backend, segment=segment)
    assert [w.filename for w in caught] == [__file__]
    assert record.attrs["complete"]
    first = record.attrs["first_nonfinite"]
    assert first["token"] == first_in(record)
    here = record["steps"][first["variable"]].isel(sequence=first["sequence"])
    assert not np.isfinite(here.sel(layer=first["layer"], token=first["token"], head=first["head"]))
    # transformers' own scan, a matrix product, spreads a NaN to the start of what it is given
    expected = 40 // segment * segment if backend == "auto" else 40
    assert first["token"] == expected
    if expected == 0:
        return
    cut = statescope.trace(model, text[:, : first["token"]], backend=backend, segment=segment)
    before = record.isel(token=slice(0, first["token"]))
    for group in ("tokens", "steps"):
        for name, x in before[group].data_vars.items():
            known = x.isel(token=slice(1, None)) if name == "loss" else x
            assert np.isfinite(known).all()
    assert_close(cut, before)


def test_nonfinite_through_tied_weights() -> None:
    """Where the output shares the embedding, the first loss is the first casualty."""
    model = poisoned(tie_word_embeddings=True)
    with pytest.warns(RuntimeWarning, match="the first is in loss at sequence 0, token 1$"):
        record = statescope.trace(model, text_with(40), backend="chunked")
    assert record.attrs["first_nonfinite"] == {"variable": "loss", "sequence": 0, "token": 1}
    assert first_in(record) == 1


def test_nonfinite_loss_of_a_later_sequence() -> None:
    """The first in the order of tokens counts, not the first sequence."""
    model, text = build("mamba2"), torch.cat([text_with(60), text_with(30)])

    def impossible(module: nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([BAD]), -torch.inf)

    model.lm_head.register_forward_hook(impossible)
    with pytest.warns(RuntimeWarning, match="first is in loss"):
        record = statescope.trace(model, text)
    assert record.attrs["first_nonfinite"] == {"variable": "loss", "sequence": 1, "token": 30}


def test_nonfinite_survives_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run keeps the place that an earlier commit noted."""
    monkeypatch.setattr(layout, "SHARD_TOKENS", 16)
    model, text, place = poisoned(tie_word_embeddings=False), text_with(5, 70), MemoryStore()
    commit = RecordWriter.commit

    def interrupted(self: RecordWriter, tokens: int, *rest: Any, **attributes: Any) -> None:
        commit(self, tokens, *rest, **attributes)
        if tokens == 48:
            raise KeyboardInterrupt

    monkeypatch.setattr(RecordWriter, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        statescope.trace(model, text, segment=16, backend="chunked", store=place)
    assert statescope.open(place).attrs["first_nonfinite"]["token"] == 5
    monkeypatch.setattr(RecordWriter, "commit", commit)
    with pytest.warns(RuntimeWarning, match="token 5,"):
        record = statescope.trace(model, text, segment=16, backend="chunked", store=place)
    assert record.attrs["first_nonfinite"]["token"] == 5
