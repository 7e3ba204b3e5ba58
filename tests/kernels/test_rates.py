"""A log decay that is a product, against the tensor it stands for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from statescope.kernels import chunked
from statescope.kernels.rates import Rated, written_out
from statescope.recurrence import Recurrence


def draw(time: int = 9, heads: int = 4, key: int = 5, value: int = 3) -> Rated:
    return Rated(torch.rand(2, time, heads, value), -torch.rand(heads, key, value))


STAYS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x[:, 2:7],
    lambda x: x[:, 0:9],
    lambda x: x[:, 3:][:, :2],
    lambda x: x[:, :0],
    lambda x: x.to(torch.bfloat16),
    lambda x: torch.cat([x, x], 2),
]
LEAVES: list[Callable[[Tensor], Tensor]] = [
    lambda x: x[:, 4],
    lambda x: x[:, -1],
    lambda x: x[:1, 2:7],
    lambda x: x[..., 0],
    lambda x: torch.cat([x, x], 1),
    lambda x: torch.cat([x, x.written_out() if isinstance(x, Rated) else x], 2),
    lambda x: x.sum((1, 2)),
    lambda x: x.mean((-2, -1)),
    lambda x: x.exp() / 8 + x,
    lambda x: x.clone(),
    lambda x: x[:, :4].cumsum(1).exp_(),
    lambda x: x.flip(1),
    lambda x: x.transpose(1, 2).contiguous(),
]


@pytest.mark.parametrize("stays", [True, False])
def test_stands_for_its_product(stays: bool) -> None:
    x = draw()
    plain = x.step[:, :, :, None] * x.rate
    assert (x.shape, x.dtype, x.device) == (plain.shape, plain.dtype, plain.device)
    for operation in STAYS if stays else LEAVES:
        got, want = operation(x), operation(plain)
        assert isinstance(got, Rated) == stays
        torch.testing.assert_close(
            got.written_out() if stays else got, want, rtol=1e-2 if stays else 1e-6, atol=0
        )


def test_sums_over_tokens_and_casts_are_of_the_factors() -> None:
    x = draw(time=500)
    exact = x.step.double()[:, :, :, None] * x.rate.double()
    torch.testing.assert_close(x[:, 3:].sum(1, dtype=torch.float64), exact[:, 3:].sum(1), rtol=1e-13, atol=0)
    torch.testing.assert_close(x.double().written_out(), exact, rtol=0, atol=0)


def test_nothing_is_written_into_it() -> None:
    x = draw()
    for write in (lambda: x.mul_(2), lambda: x[:, 2:5].zero_(), lambda: torch.exp(x, out=x)):
        with pytest.raises(ValueError, match="a product that nothing can be written into"):
            write()
    r = Recurrence(q=torch.ones(2, 9, 1, 5), k=torch.ones(2, 9, 1, 5), v=torch.ones(2, 9, 4, 3), log_decay=x)
    plain = written_out(r)
    plain.log_decay[:, 2] = 0
    assert type(plain.log_decay) is Tensor and not x[:, 2].eq(0).any() and written_out(plain) is plain
    assert "Rated(tensor(" in repr(x)


def test_scans_alike() -> None:
    x = draw(time=90)
    r = Recurrence(
        q=torch.randn(2, 90, 2, 5), k=torch.randn(2, 90, 2, 5), v=torch.randn(2, 90, 4, 3), log_decay=x
    )
    got, want = chunked.scan(r), chunked.scan(written_out(r))
    assert torch.equal(got.y, want.y) and torch.equal(got.steps.state_norm, want.steps.state_norm)
    found = (chunked.probe(each, want.final_state, r.q[:, -1]) for each in (r, written_out(r)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
