"""The verdicts: on heads whose fate is known, and on the bundled checkpoints against measured recall."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr
from records import Truth, make_record

import statescope
from statescope import analyses

TRAIN, TOKENS = 64, 512
FAST, EVEN, FULL, ROTATING = range(4)


def known(log_decay: float = -1e-3, tokens: int = TOKENS) -> Truth:
    """Build a head that forgets, one that keeps what it once read, and two that fill up."""
    decay = np.zeros((2, 1, tokens, 4))
    decay[..., FAST], decay[..., EVEN] = -0.5, log_decay
    key, value = np.zeros((2, 1, tokens, 4, 8)), np.zeros((2, 1, tokens, 4, 8))
    key[..., 0] = value[..., 0] = 1
    key[:, :, 10:, EVEN] *= 1e-9
    turns = np.eye(8)[np.arange(tokens) % 8]
    key[:, :, :, ROTATING], value[:, :, :, ROTATING] = turns, np.eye(8)[np.arange(tokens) // 8 % 8]
    return Truth(decay, key, value)


@pytest.fixture(scope="module")
def judged() -> xr.Dataset:
    return analyses.overload(make_record(known(), train_length=TRAIN, shard=512))


def test_heads_get_the_verdict_they_deserve(judged: xr.Dataset) -> None:
    assert judged["verdict"].isel(sequence=1, layer=0).values.tolist() == [
        "forgets", "retains", "overloaded", "overloaded",
    ]  # fmt: skip
    assert (judged["layer_verdict"] == "overloaded").all()


def test_values_are_those_of_known_growth(judged: xr.Dataset) -> None:
    full = judged.isel(sequence=0, layer=0, head=FULL)  # its norm is t + 1
    assert float(full["overload_ratio"]) == pytest.approx(
        np.arange(TRAIN + 1, TOKENS + 1).mean() / TRAIN, rel=1e-6
    )
    assert float(full["low"]) < float(full["overload_ratio"]) < float(full["high"])
    width = TRAIN // 8
    means = np.arange(TRAIN, TOKENS, width) + (width + 1) / 2
    assert float(full["onset"]) == np.arange(TRAIN, TOKENS, width)[means / TRAIN > math.sqrt(2)][0]
    assert float(full["live_memories"]) == pytest.approx(np.arange(TRAIN + 1, TOKENS + 1).mean(), rel=1e-6)
    assert float(full["load"]) == pytest.approx(float(full["live_memories"]) / 8)
    assert float(full["coherence"]) == pytest.approx(float(full["live_memories"]), rel=1e-5)
    even = judged.isel(sequence=0, layer=0, head=EVEN)
    assert float(even["retention"]) == pytest.approx(math.exp(-TRAIN * 1e-3), rel=1e-5)
    assert np.isnan(even["onset"])


def test_overload_says_a_sentence(judged: xr.Dataset) -> None:
    sentence = judged.attrs["sentence"]
    assert "Of 4 heads, after 512 tokens (training length 64), 2 are overloaded" in sentence
    worst = judged["overload_ratio"].mean("sequence")
    assert (
        f"layer 0, head {int(worst.values.argmax())}" in sentence
        and f"{float(worst.max()):.2f} times" in sentence
    )


def test_windows_and_chunks_give_the_same_verdict(judged: xr.Dataset) -> None:
    thin = analyses.overload(make_record(known(), window=8, train_length=TRAIN, shard=8))
    xr.testing.assert_equal(thin["verdict"], judged["verdict"])
    np.testing.assert_allclose(thin["overload_ratio"], judged["overload_ratio"], rtol=0.05)


def test_a_record_within_the_training_length_shows_no_overload() -> None:
    found = analyses.overload(make_record(known(tokens=40), train_length=TRAIN))
    assert found["overload_ratio"].isnull().all() and found["onset"].isnull().all()
    assert set(found["verdict"].values.ravel()) == {"forgets", "retains"}
    assert "nothing was read beyond it" in found.attrs["sentence"]
    assert found["live_memories"].notnull().all()


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("rate", [0.002, 0.0137, 0.2])
def test_memory_span_of_constant_decay(rate: float, window: int) -> None:
    truth = known(-rate, tokens=1000)
    found = analyses.memory_span(make_record(truth, window=window, shard=1000 // window), TRAIN)
    half = math.log(2) / 2 / rate
    even = found.isel(layer=0, head=EVEN)
    assert float(even["half_energy"]) == pytest.approx(half, rel=1e-3)
    assert float(even["failing_length"]) == pytest.approx(min(TRAIN, 1 / rate) + half, rel=1e-3)
    assert float(even["half_energy_low"]) == pytest.approx(half, rel=1e-3)
    assert not even["extrapolated"]


def test_memory_span_beyond_the_record_is_extrapolated() -> None:
    found = analyses.memory_span(make_record(known(-1e-3, tokens=100)), TRAIN).isel(layer=0, head=EVEN)
    assert (
        found["extrapolated"] and np.isnan(found["half_energy_low"]) and np.isnan(found["half_energy_high"])
    )
    assert float(found["half_energy"]) == pytest.approx(math.log(2) / 2 / 1e-3, rel=1e-4)


def test_a_typical_memory_decides_not_the_mean_decay() -> None:
    truth = known(-1e-3, tokens=1000)
    truth.log_decay[:, :, 700, EVEN] = -50
    found = analyses.memory_span(make_record(truth), TRAIN).isel(layer=0, head=EVEN)
    assert float(found["half_energy"]) == pytest.approx(math.log(2) / 2 / 1e-3, rel=0.01)


@pytest.mark.parametrize(("jump", "forgets", "at"), [(1.9, 1, math.nan), (2.1, 0, 303)])
def test_loss_criterion_is_the_papers(jump: float, forgets: int, at: float) -> None:
    loss = np.full((2, TOKENS), 3.0)
    loss[:, 0] = np.nan
    loss[:, 300:304] = 3 * jump  # a bin of sixteenths of the training length
    found = analyses.forgetting(make_record(known(), train_length=TRAIN, loss=loss))
    assert float(found["loss_ratio"]) == pytest.approx(jump, rel=1e-6)
    assert int(found["forgets_by_loss"]) == forgets
    np.testing.assert_equal(float(found["loss_exceeded"]), at)
    assert int(found["forgets_by_state"]) == 0 and int(found["overloaded_heads"]) == 2
    assert int(found["agree"]) == (1 - forgets)


MEASURED = {"mamba2-byte-n16-t512": (1280, 1536), "mamba2-byte-n64-t512": (512, 640)}
"""Longest tested length at which passkeys at every depth are recalled above 95 %, and the first at which they
are not: 64 prompts a cell, in held-out book text."""


@pytest.mark.parametrize("name", MEASURED)
def test_the_states_name_the_failing_length(name: str, book: np.ndarray) -> None:
    text = book[: 4 * 40_000].reshape(4, -1)[:, :2560]
    record = statescope.trace(name, text, backend="chunked")
    found = analyses.forgetting(record)
    recall = math.sqrt(math.prod(MEASURED[name]))
    assert 1 / 1.5 < float(found["failing_length"]) / recall < 1.5
    assert (
        float(found["failing_length_low"])
        <= float(found["failing_length"])
        <= float(found["failing_length_high"])
    )
    assert f"{float(found['failing_length']):,.0f} tokens" in found.attrs["sentence"]
    assert (
        int(found["overloaded_heads"]) > 0 and int(found["forgets_by_loss"]) == 1
    )  # prose needs little context
