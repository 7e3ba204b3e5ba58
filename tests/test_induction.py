"""A trained Mamba-1 of 119 parameters: its record says why it recalls at length 10 and not at 40.

The texts are of the tokens 0, 1 and 2, with a 3 somewhere and one at the end, which asks for what followed
the first. The model was trained on 10 tokens; three steps of its training are at hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import assert_close, config
from torch import Tensor, nn

import statescope
from statescope import analyses

TEXTS = 400


class Unchanged(nn.Identity):
    """No norm, whose dtype can be asked for as that of one."""

    weight = torch.ones(1)


def load(shared: Path, step: int) -> nn.Module:
    """Build the model of one training step, without norms."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = shared / "data" / "oracles" / "mamba1-induction" / f"step{step}"
    weights = load_file(folder / "model.safetensors")
    weights = {name: w for name, w in weights.items() if "discrete_time_step" not in name}
    sizes = {"vocab_size": 4, "hidden_size": 4, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 1}
    settings = config("mamba", **sizes, use_bias=False)
    settings.intermediate_size = len(weights["backbone.layers.0.mixer.D"])  # no multiple of hidden_size
    model = AutoModelForCausalLM.from_config(settings)
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    assert all("norm" in name or "lm_head" in name for name in missing.missing_keys), missing.missing_keys
    model.backbone.norm_f = model.backbone.layers[0].norm = Unchanged()
    return model.eval()


def questions(length: int) -> tuple[Tensor, np.ndarray]:
    """Texts that ask, and where in each the answer stands."""
    draw = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 3, (TEXTS, length), generator=draw)
    marks = torch.randint(0, length - 2, (TEXTS,), generator=draw)
    texts[torch.arange(TEXTS), marks] = texts[:, -1] = 3
    return texts, marks.numpy() + 1


def answers(model: nn.Module, length: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """Trace the questions: the record, where the answers stand, and which the model gives."""
    texts, at = questions(length)
    with torch.no_grad():
        given = model(texts).logits[:, -1].argmax(-1)
    right = (given == texts[torch.arange(TEXTS), at]).numpy()
    return statescope.trace(model, texts, probes=-1, train_length=10), at, right


def ranked(values: np.ndarray, right: np.ndarray) -> float:
    """How often a right answer has more of it than a wrong one (area under the ROC curve)."""
    more = values[right][:, None] - values[~right]
    return float((more > 0).mean() + (more == 0).mean() / 2)


@pytest.mark.parametrize(("step", "low", "high"), [(0, 0, 0), (1000, 0.15, 0.3), (10000, 1, 1)])
def test_recall_at_the_training_length(step: int, low: float, high: float, shared: Path) -> None:
    """The three steps recall nothing, a quarter and everything; what is written tells them apart."""
    record, at, right = answers(load(shared, step), 10)
    assert low <= right.mean() <= high
    norms = record["steps"].write_norm.values[:, 0, :, 0]
    asked = norms[np.arange(TEXTS), at].mean() / np.delete(norms, 9, 1).mean()
    # found: 1.2, 3.0 and 6.7 times what an average token writes
    assert (asked > 5) == (step == 10000) and (asked > 2) == (step > 0)


def test_record_explains_the_loss_of_recall(shared: Path) -> None:
    """Recall ends where the answer's write has decayed below what the other tokens write."""
    model = load(shared, 10000)
    recall, kept = {}, {}
    for length in (10, 40):
        record, at, right = answers(model, length)
        measures = analyses.needle_measures(record, at.tolist(), (at + 1).tolist())
        measures = measures.isel(layer=0, head=0)
        recall[length], distance = right.mean(), length - 1 - at
        probe, rows = record["probes"].to_dataset().isel(layer=0, head=0, probe=0), np.arange(TEXTS)
        written = record["steps"].write_norm.isel(layer=0, head=0).values[rows, at]
        kept[length] = probe.contribution.values[rows, at] / written
    assert recall[10] == 1 and 0.2 < recall[40] < 0.35
    # The state is not too full, the write is gone: 2.2 % of it are left at the median, and 0.18 %.
    assert np.median(kept[10]) > 10 * np.median(kept[40])
    # Distances at which it answers, and no longer does.
    assert right[distance < 10].mean() > 0.98 and right[distance >= 16].mean() < 0.02
    assert ranked(measures.log_retention.values, right) > 0.98
    assert ranked(-measures.log_interference.values, right) > 0.98
    assert ranked(measures.share.values, right) > 0.9
    # Neither how many writes live nor how large the state is says as much.
    for name in ("log_live_memories", "log_state_norm"):
        assert 0.2 < ranked(measures[name].values, right) < 0.8


def test_trained_model_in_segments(shared: Path) -> None:
    """Trained weights: the record is the same wherever the text is cut."""
    model, text = load(shared, 10000), torch.randint(0, 4, (4, 64))
    whole = statescope.trace(model, text)
    for segment in (2, 13):
        assert_close(statescope.trace(model, text, segment=segment), whole, rtol=1e-5)
    assert np.isfinite(whole["tokens"].loss.values[:, 1:]).all()
