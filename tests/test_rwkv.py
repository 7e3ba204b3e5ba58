"""RWKV-4, whose state is kept in the frame of its loudest write, against its paper's recurrence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import build, ids
from torch import Tensor, nn

import statescope
from statescope.adapters.rwkv4 import read_linear_attention
from statescope.capture import capture
from statescope.kernels import reference

TOKENS = 60


def calls(loudness: float, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Arguments of a scan of 96 channels, some of which hardly forget."""
    return {
        "time_decay": torch.linspace(-9, 1, 96),
        "time_first": torch.linspace(-2, 2, 96),
        "key": loudness * torch.randn(2, tokens, 96),
        "value": torch.randn(2, tokens, 96),
    }


@pytest.mark.parametrize("loudness", [1.0, 8.0])
def test_state_is_the_papers_in_its_frame(loudness: float) -> None:
    """Numerator and denominator without any frame, in float64, brought to the frame afterwards."""
    given = calls(loudness)
    k, v, w = given["key"].double(), given["value"].double(), given["time_decay"].double().exp()
    found = reference.scan(read_linear_attention(False, **given).recurrence, positions=range(TOKENS))
    a = b = torch.zeros(2, 96, dtype=torch.float64)
    frame = torch.full((2, 96), -torch.inf, dtype=torch.float64)
    for t in range(TOKENS):
        a, b = (-w).exp() * a + k[:, t].exp() * v[:, t], (-w).exp() * b + k[:, t].exp()
        frame = torch.maximum(frame - w, k[:, t])
        truth = torch.stack([a, b], 1) * (-frame).exp()[:, None]
        state = found.states[:, t, :, 0].unflatten(2, (2, 48)).transpose(1, 2).flatten(2)
        torch.testing.assert_close(state, truth, rtol=1e-4, atol=1e-5)
        assert (state[:, 1] >= 1 - 1e-6).all()  # the loudest write counts 1


def test_loud_keys_do_not_overflow() -> None:
    """Where e to the key is no float any more, state and outputs are finite, and the same in parts."""
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu as own

    given = calls(100.0)
    y, kept = own(**given, return_state=True)
    whole = read_linear_attention(False, **given, return_state=True)
    mine, state = whole.answer(reference.scan(whole.recurrence))
    close = {"check_dtype": False, "rtol": 1e-3, "atol": 1e-4}  # the model's float32 exponents, up to 400
    torch.testing.assert_close(mine, y, **close)
    half = {n: x[:, :30] if x.ndim == 3 else x for n, x in given.items()}
    rest = {n: x[:, 30:] if x.ndim == 3 else x for n, x in given.items()}
    entering = own(**half, return_state=True)[1]
    second = read_linear_attention(False, **rest, state=entering)
    for field in ("v", "log_decay"):
        torch.testing.assert_close(
            getattr(second.recurrence, field), getattr(whole.recurrence, field)[:, 30:], **close
        )
    for x, expected in zip(state, kept, strict=True):
        torch.testing.assert_close(x, expected, **close)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("rwkv")


def test_one_token(model: nn.Module) -> None:
    """A text of one token is read whatever the number of sequences, and is how a longer one begins."""
    text = ids(5, sequences=3)
    first, whole = (statescope.trace(model, t)["steps"].to_dataset() for t in (text[:, :1], text))
    assert set(np.unique(first.write_overlap)) == {0}
    for name, x in first.items():
        np.testing.assert_allclose(x, whole[name].isel(token=[0]), rtol=1e-5, atol=1e-6)
    rate = -model.rwkv.blocks[1].attention.time_decay.exp().unflatten(0, (-1, 64)).mean(1)
    np.testing.assert_allclose(first.log_decay.sel(layer=1, sequence=2, token=0), rate.detach(), rtol=1e-5)


def test_single_tokens_of_a_batch_are_refused(model: nn.Module) -> None:
    """Upstream mixes up the sequences there; alone, a sequence goes on token by token."""
    from statescope import caches

    text = ids(3, sequences=2)
    with torch.no_grad(), capture(model, lambda layer, call, run_own: run_own()):
        cache = caches.fresh(model)
        model(text[:, :2], **caches.inputs(model, cache, 0, text[:, :2]))
        with pytest.raises(ValueError, match="one token of several sequences; pass the sequences one by one"):
            caches.inputs(model, cache, 2, text[:, 2:])
        cache = caches.fresh(model)
        caches.inputs(model, cache, 0, text[:, :1])
        for part in (text[:, 1:2], text[:, 1:]):
            with pytest.raises(ValueError, match="one token of several sequences"):
                caches.inputs(model, cache, 1, part)
        cache, expected = caches.fresh(model), model(text[:1], use_cache=False).logits
        for t in range(3):
            logits = model(text[:1, t : t + 1], **caches.inputs(model, cache, t, text[:1, t : t + 1])).logits
            torch.testing.assert_close(logits[:, 0], expected[:, t])
