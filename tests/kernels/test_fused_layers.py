"""The fused scans on layers of public models, which fill a GPU; elsewhere one head of each and few tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import OUTPUTS, RMS, STATES, WORST, errors, relative
from conftest import needs
from torch import Tensor

from statescope.experiments.bench import signatures
from statescope.experiments.bench.subjects import SIGNATURES
from statescope.kernels import fused, reference
from statescope.recurrence import Recurrence

needs("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::RuntimeWarning:numpy")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, MANY = (8192, 65536) if DEVICE == "cuda" else (70, 70)


def layer(name: str, tokens: int) -> Recurrence:
    """A layer as the benchmark draws it, of one head where there is no GPU."""
    r = signatures.as_recurrence(name, signatures.draw(name, tokens, DEVICE, torch.bfloat16))
    if DEVICE == "cuda":
        return r
    first = {
        n: x[:, :, :1].contiguous() for n, x in r.tensors().items() if x.ndim > 2 and x.shape[1] == tokens
    }
    return r.replace(**first, **{n: x[:1] for n, x in r.tensors().items() if x.ndim == 1})


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_layer_matches_stepping(name: str) -> None:
    r = layer(name, TOKENS)
    got, want = fused.scan(r), reference.scan(r)
    assert relative(got.y, want.y) <= OUTPUTS[r.v.dtype]
    assert relative(got.final_state, want.final_state) <= STATES[r.v.dtype]
    for step, error in errors(got.steps, want.steps, torch.zeros(r.batch, r.heads, device=DEVICE)).items():
        assert error.max() <= WORST[r.v.dtype], step
        assert error.square().mean().sqrt() <= RMS[r.v.dtype], step


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_layer_is_the_same_thrice(name: str) -> None:
    """Launches that overlap, and programs that share a list of chunks, leave nothing to chance."""
    r = layer(name, MANY)

    def found() -> list[Tensor]:
        out = fused.scan(r)
        return [out.y, out.final_state, *(getattr(out.steps, f.name) for f in dataclasses.fields(out.steps))]

    first = found()
    assert all(bool(x.isfinite().all()) for x in first)
    for _ in range(2):
        assert all(torch.equal(x, y) for x, y in zip(first, found(), strict=True))
