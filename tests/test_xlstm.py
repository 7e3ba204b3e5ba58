"""xLSTM's mLSTM against its paper's recurrence, without a frame."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import build, ids
from torch import Tensor
from torch.nn.functional import logsigmoid

import statescope
from statescope import tracing

TEXT = ids(45, sequences=2)


@torch.no_grad()
def test_record_is_the_papers_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of memory and normaliser together, forget gates and writes, stepped in float64."""
    model: Any = build("xlstm")
    layer = model.backbone.blocks[1].mlstm_layer
    layer.igate_preact.bias.add_(3)  # some writes of e^3, some of e^-3
    seen: dict[str, Tensor] = {}
    own = layer.mlstm_backend.forward

    def spy(**kwargs: Any) -> Any:
        seen.update({n: x.transpose(1, 2).double() for n, x in kwargs.items() if n in NAMES})
        return own(**kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(layer.mlstm_backend, "forward", spy)
        model(TEXT, use_cache=False)
    k, i, f = seen["key"], seen["igate"].exp(), logsigmoid(seen["fgate"])
    v = torch.cat([seen["value"], torch.ones_like(seen["value"][..., :1])], -1)
    write = i[..., None, None] * k[..., None] * v[..., None, :]
    state, norms = torch.zeros_like(write[:, 0]), []
    for t in range(TEXT.shape[1]):
        state = f[:, t].exp()[..., None, None] * state + write[:, t]
        norms.append(state.flatten(2).norm(dim=-1))
    for backend in ("auto", "chunked"):
        record = statescope.trace(model, TEXT, segment=13, backend=backend)
        got = record["steps"].to_dataset().sel(layer=1)
        np.testing.assert_allclose(got.state_norm, torch.stack(norms, 1), rtol=1e-4)
        np.testing.assert_allclose(got.write_norm, write.flatten(3).norm(dim=-1), rtol=1e-4)
        np.testing.assert_allclose(got.log_decay, f, rtol=1e-4, atol=1e-6)


NAMES = ("key", "value", "igate", "fgate")


def test_what_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that the model would cut, gates without a cap, and the mode for training."""
    model = build("xlstm", max_inference_chunksize=20)
    with pytest.raises(ValueError, match=r"segment: the model reads at most 20 tokens .* segment=20 or less"):
        statescope.trace(model, TEXT, segment=30)
    monkeypatch.setitem(tracing.SEGMENT, "cpu", 1000)
    assert statescope.trace(model, TEXT).attrs["segment"] == 19
    for setting, words in (({"gate_soft_cap": 50.0}, "gate_soft_cap is 50"), ({"mode": "train"}, "training")):
        with pytest.raises(ValueError, match=words):
            statescope.trace(build("xlstm", **setting), TEXT)
