"""Products of bfloat16 halves, which only GPUs have: in triton's interpreter, taught to multiply bfloat16."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import OUTPUTS, STATES, WORST, Case, draw, errors, relative
from conftest import needs
from test_fused import check, poisoned

from statescope.kernels import fused, launches, reference

needs("triton")
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::RuntimeWarning:numpy"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies bfloat16 by itself"),
    pytest.mark.usefixtures(poisoned.__name__),
]

HALF = Case(70, heads=2, key=40, value=40, initial=True, dtype=torch.bfloat16)
CASES = {
    "decay per head": HALF,
    "decay per key": dataclasses.replace(HALF, keyed=True),
    "delta rule, decay per key": dataclasses.replace(HALF, keyed=True, delta=True),
    "erase term": dataclasses.replace(HALF, keyed=True, erase=True),
    "erase term, scaled": dataclasses.replace(HALF, keyed=True, erase=True, scale=True, key=72),
    "delta rule": dataclasses.replace(HALF, delta=True),
    "many keys": dataclasses.replace(HALF, key=130),
}


@pytest.fixture(autouse=True)
def multiplied(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep bfloat16 as its 16 bits, as the interpreter does, but round to it, and multiply it exactly."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def exact(x: Any) -> Any:
        if x.dtype.scalar == bfloat16:
            return (x.data.astype(np.uint32) << 16).view(np.float32)
        return x.data

    products = []

    def dot(_: Any, a: Any, b: Any, c: Any, *_options: Any) -> Any:
        assert a.dtype.scalar == b.dtype.scalar
        products.append(a.dtype.scalar == bfloat16)
        with np.errstate(all="ignore"):  # as elsewhere, what is infinite on the way may be masked
            found = np.matmul(exact(a), exact(b), dtype=c.data.dtype) + c.data
        return TensorHandle(found, c.dtype.scalar)

    real = InterpreterBuilder.cast_impl

    def cast(self: Any, x: Any, kind: Any) -> Any:
        if (x.dtype.scalar, kind.scalar) != (float32, bfloat16):
            return real(self, x, kind)
        rounded = torch.from_numpy(np.ascontiguousarray(x.data)).to(torch.bfloat16).view(torch.int16)
        return TensorHandle(rounded.numpy().view(np.uint16).reshape(x.data.shape), bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)
    for name in ("create_fp_trunc", "create_fp_ext"):
        monkeypatch.setattr(InterpreterBuilder, name, cast)
    monkeypatch.setattr(launches, "multiplies_bfloat16", lambda _: True)
    yield
    assert sum(products) > len(products) / 2


@pytest.mark.parametrize("name", CASES)
def test_matches_stepping(name: str) -> None:
    r = draw(CASES[name], "cpu")
    positions = (69, 3, 64)
    check(r, fused.scan(r, positions=positions), positions)


@pytest.mark.parametrize("bits", [250, 500])
@pytest.mark.parametrize("name", ["delta rule, decay per key", "erase term"])
def test_forgetting_much(name: str, bits: int) -> None:
    """Rows of a chunk are related by two products, or part by part."""
    r = draw(CASES[name], "cpu")
    log_decay = -bits * math.log(2) / 64 * (1 + 0.2 * torch.rand(r.log_decay.shape).sub_(0.5))
    log_decay[:, 64:, 0] = -1e-3  # one head turns to remembering
    r = r.replace(log_decay=log_decay)
    check(r, fused.scan(r, positions=(3, 69)), (3, 69))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [("erase term", f, float("nan")) for f in ("a", "b", "v", "log_decay")]
    + [("delta rule, decay per key", f, float("inf")) for f in ("a", "v")],
)
def test_a_spoiled_token_reaches_no_earlier_one(name: str, field: str, value: float) -> None:
    token, r = 40, draw(CASES[name], "cpu")
    spoiled = getattr(r, field).clone()
    spoiled[:, token, 0].view(-1)[0] = value
    got = fused.scan(r.replace(**{field: spoiled}), positions=(token - 1,))
    before = {n: x[:, :token] for n, x in r.tensors().items() if x.ndim > 2 and x.shape[1] == r.time}
    want = reference.scan(r.replace(**before), positions=(token - 1,))
    steps = {f.name: getattr(got.steps, f.name)[:, :token] for f in dataclasses.fields(got.steps)}
    assert relative(got.y[:, :token], want.y) <= OUTPUTS[torch.bfloat16]
    assert relative(got.states, want.states) <= STATES[torch.bfloat16]
    entering = r.start_state(torch.float64).norm(dim=(-2, -1))
    for step, error in errors(type(got.steps)(**steps), want.steps, entering).items():
        assert error.max() <= WORST[torch.bfloat16], step
    assert not torch.isfinite(got.steps.state_norm[:, token:, 0]).any()
    assert not torch.isfinite(got.final_state[:, 0]).all()
