"""The loss kernel against float64; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from conftest import needs

needs("triton")

from statescope.kernels.loss import in_one_pass, token_loss  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + vocabulary)
    logits = 8 * torch.randn(rows, vocabulary, generator=generator)
    logits[:: max(1, rows // 3)] -= 1e4  # far from zero
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return logits.to(DEVICE, dtype), targets.to(DEVICE)


@pytest.mark.parametrize("function", [in_one_pass, token_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 257), (5, 4096), (7, 9001)])
def test_against_float64(rows: int, vocabulary: int, dtype: torch.dtype, function) -> None:
    logits, targets = draw(rows, vocabulary, dtype)
    truth = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    got = function(logits, targets)
    assert got.dtype == torch.float32
    assert ((got - truth).abs() <= 1e-6 * (logits.double().abs().amax(1) + 1)).all()
    strided = torch.cat([logits, logits], 1)[:, :vocabulary]
    assert torch.equal(function(strided, targets), got)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("function", [in_one_pass, token_loss])
def test_what_is_not_finite(function) -> None:
    logits, targets = draw(4, 300, torch.float32)
    logits[0, 7] = torch.nan
    logits[1, 7] = torch.inf
    logits[2, :] = -torch.inf
    logits[3, 7], targets[3] = -torch.inf, 7
    got = function(logits, targets)
    assert not got[:3].isfinite().any() and got[3] == torch.inf
    assert got[0].isnan()
    assert function(logits[:0], targets[:0]).shape == (0,)
