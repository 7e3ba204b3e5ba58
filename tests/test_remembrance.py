"""Effective remembrance: against two readings of the model's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import build, ids
from torch import nn

from statescope.experiments.remembrance import remembrance

TEXT = ids(150, sequences=2)


def predicted(model: nn.Module, text: torch.Tensor) -> torch.Tensor:
    """What the model predicts after the last token of a text, by its own means, in one pass."""
    with torch.no_grad():
        return model(text, use_cache=False).logits[:, -1].float().softmax(-1)


@pytest.mark.parametrize("family", ["mamba2", "mamba", "qwen3_next", "zamba2"])
def test_it_is_the_distance_of_two_predictions(family: str) -> None:
    model = build(family)
    found = remembrance(model, TEXT, [1, 2, 30, 75, 150], ends=[-1, 74, 100, 101])["remembrance"]
    assert found["end"].values.tolist() == [74, 100, 101, 149]
    for end in (74, 100, 101, 149):
        whole = predicted(model, TEXT[:, : end + 1])
        for length in (1, 2, 30, 75, 150):
            here = found.sel(end=end, length=length)
            if length > end + 1:
                assert here.isnull().all()
                continue
            apart = predicted(model, TEXT[:, end + 1 - length : end + 1])
            np.testing.assert_allclose(here, (apart - whole).abs().sum(-1) / 2, atol=2e-5)
    assert float(found.sel(length=150, end=149).max()) < 2e-5 < 1e-3 < float(found.sel(length=1).min())


def test_one_end_and_one_text_by_name() -> None:
    found = remembrance(
        "mamba2-byte-n16-t512", "The grass is green. The sky is blue.", [4, 36], train_length=9
    )
    assert dict(found["remembrance"].sizes) == {"sequence": 1, "end": 1, "length": 2}
    near, all_of_it = found["remembrance"].values[0, 0]
    assert 0.05 < near <= 1 and abs(all_of_it) < 1e-5
    assert found.attrs == {"model_id": "mamba2-byte-n16-t512", "train_length": 9, "tokens": 36}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lengths": []}, "lengths is empty"),
        ({"lengths": [0]}, "lengths holds 0; expected 1 to 150"),
        ({"lengths": [2.0]}, "lengths holds 2.0; expected integers"),
        ({"lengths": [80], "ends": [70]}, "lengths holds 80; expected 1 to 71"),
        ({"ends": [150]}, "ends names token 150; the text has tokens 0 to 149"),
        ({"ends": []}, "ends is empty"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        remembrance(build("mamba2"), TEXT, **{"lengths": [1], **given})
