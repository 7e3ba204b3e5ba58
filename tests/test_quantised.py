"""Models whose weights are integers: read as they are, and told apart; what cannot run says so itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import assert_close, assert_identical, build, ids
from torch import Tensor, nn

import statescope
from statescope.live import digest

TEXT = ids(40, sequences=2)


class Integers(nn.Module):
    """A linear layer with weights in int8 and a scale per output, as weight-only quantisers make it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = nn.Buffer(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        whole = (linear.weight / self.scale).round().to(torch.int8)
        self.weight, self.bias = nn.Parameter(whole, requires_grad=False), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def quantised(model: nn.Module) -> nn.Module:
    """Replace the linear layers inside the blocks."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear) and name != "lm_head":
            setattr(model, name, Integers(child))
        else:
            quantised(child)
    return model


@pytest.mark.parametrize("family", ["mamba2", "qwen3_next", "minimax"])
def test_integer_weights(family: str, tmp_path: Path) -> None:
    """Outputs bit for bit, segments alike, and a record that is no other model's."""
    model, seen = quantised(build(family)), []
    with torch.no_grad():
        plain = model(TEXT).logits
    hook = model.register_forward_hook(lambda *a: seen.append(a[2].logits))
    whole = statescope.trace(model, TEXT, store=tmp_path / "run.zarr")
    hook.remove()
    assert torch.equal(seen[-1], plain)
    assert_close(statescope.trace(model, TEXT, segment=9), whole, rtol=2e-5)
    assert (
        abs(statescope.trace(build(family), TEXT)["steps"].state_norm - whole["steps"].state_norm).max() > 0
    )
    assert digest(model)() != digest(build(family))()
    with pytest.raises(FileExistsError, match="finished"):
        statescope.trace(model, TEXT, store=tmp_path / "run.zarr")


@pytest.mark.filterwarnings("ignore")
def test_packed_weights(tmp_path: Path) -> None:
    """The dynamic quantisation of torch, which packs its weights: the record is that of this model."""

    def packed(seed: int) -> nn.Module:
        model = build("mamba2", seed=seed)
        blocks = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
        return torch.ao.quantization.quantize_dynamic(model, dict.fromkeys(blocks, QCONFIG))

    one, same, other = packed(0), packed(0), packed(1)
    assert digest(one)() == digest(same)() != digest(other)()
    record = statescope.trace(one, TEXT, store=tmp_path / "run.zarr")
    assert_identical(statescope.trace(same, TEXT), record)


QCONFIG = torch.ao.quantization.default_dynamic_qconfig
