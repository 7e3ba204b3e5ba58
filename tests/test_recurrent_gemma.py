"""recurrent_gemma, which keeps its states on its layers and loses them between the parts of a text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import assert_close, build, ids
from torch import Tensor, nn

import statescope
from statescope.capture import capture

TEXT = ids(50, sequences=2)


@pytest.fixture
def model() -> nn.Module:
    return build("recurrent_gemma")


def states(model: Any) -> list[Tensor | None]:
    blocks = [layer.temporal_block for layer in model.model.layers if hasattr(layer.temporal_block, "rg_lru")]
    return [x for block in blocks for x in (block.conv1d_state, block.rg_lru.recurrent_states)]


@torch.no_grad()
def test_own_states_are_put_back(model: nn.Module) -> None:
    """A generation that is under way on the same model goes on as if nothing had been traced."""
    from transformers import DynamicCache

    def begin() -> Any:
        cache = DynamicCache(config=model.config)
        model(TEXT[:, :9], past_key_values=cache, use_cache=True)
        return cache

    def go_on(cache: Any) -> Tensor:
        at = torch.full((2, 1), 9)
        return model(TEXT[:, 9:10], past_key_values=cache, use_cache=True, position_ids=at).logits

    expected = go_on(begin())
    cache = begin()
    before = states(model)
    statescope.trace(model, ids(30, seed=3), segment=7)

    def fails(layer: int, *_: Any) -> Any:
        raise (LookupError if layer == 0 else KeyboardInterrupt)("on purpose")

    with pytest.raises(LookupError), capture(model, fails):
        model(TEXT[:1], use_cache=False)
    with pytest.raises(KeyboardInterrupt), capture(model, lambda *_: fails(1)):
        model(TEXT[:1], use_cache=False)
    assert all(x is y for x, y in zip(states(model), before, strict=True))
    assert torch.equal(go_on(cache), expected)


@torch.no_grad()
def test_record_is_the_papers_recurrence(model: Any) -> None:
    """Norms and decays from the inputs of each layer, by the paper's equations in float64."""
    seen: dict[int, Tensor] = {}
    lru = model.model.layers[2].temporal_block.rg_lru
    hook = lru.register_forward_pre_hook(lambda _, args: seen.update({2: args[0].double()}))
    model(TEXT, use_cache=False)
    hook.remove()
    x, heads = seen[2], lru.num_attention_heads

    def gate(name: str) -> Tensor:
        weight, bias = (getattr(lru, f"{name}_gate_{kind}").double() for kind in ("weight", "bias"))
        return torch.sigmoid(
            torch.einsum("bthi,hij->bthj", x.unflatten(2, (heads, -1)), weight) + bias
        ).flatten(2)

    log_alpha = -8 * gate("recurrent") * torch.nn.functional.softplus(lru.recurrent_param.double())
    scale = (1 - (2 * log_alpha).exp()).sqrt()
    scale[:, 0] = 1
    write = scale * gate("input") * x
    state, norms = torch.zeros_like(x[:, 0]), []
    for t in range(TEXT.shape[1]):
        state = log_alpha[:, t].exp() * state + write[:, t]
        norms.append(state.unflatten(1, (-1, 64)).norm(dim=-1))
    record = statescope.trace(model, TEXT, segment=11)
    got = record["steps"].to_dataset().sel(layer=2)
    np.testing.assert_allclose(got.state_norm, torch.stack(norms, 1), rtol=1e-4)
    np.testing.assert_allclose(got.write_norm, write.unflatten(2, (-1, 64)).norm(dim=-1), rtol=1e-4)
    np.testing.assert_allclose(got.log_decay, log_alpha.unflatten(2, (-1, 64)).mean(-1), rtol=1e-4)


def test_short_segments_keep_the_convolution(model: nn.Module) -> None:
    """Segments shorter than what the convolution reads back on."""
    whole = statescope.trace(model, TEXT)
    for segment in (2, 3):
        assert_close(statescope.trace(model, TEXT, segment=segment), whole)
