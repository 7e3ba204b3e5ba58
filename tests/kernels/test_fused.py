"""The fused kernel against stepping in float64: on the GPU if there is one, else in triton's interpreter."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from cases import CASES, LONG_CASES, OUTPUTS, RMS, STATES, WORST, Case, draw, errors, relative

from statescope.kernels import (
    fused,
    fused_alike,
    fused_entries,
    fused_keyed,
    fused_pairs,
    launches,
    reference,
)
from statescope.kernels.interface import ScanOutput
from statescope.kernels.launches import Launcher
from statescope.kernels.rates import Rated
from statescope.recurrence import Recurrence
from statescope.scan import on_gpu

needs("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::RuntimeWarning:numpy")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Case(72, heads=2, initial=True, dtype=torch.bfloat16)
DELTA = dataclasses.replace(SMALL, time=40, delta=True)
HALVED = dataclasses.replace(SMALL, key=40, value=40, delta=True)
WIDE = dataclasses.replace(SMALL, key=130, value=40)
KEYED = dataclasses.replace(SMALL, time=20, delta=True, keyed=True)
ERASING = dataclasses.replace(SMALL, time=20, keyed=True, erase=True)
ENTRIES = dataclasses.replace(SMALL, time=20, entry=True)
RATED = dataclasses.replace(SMALL, time=20, key=5, value=7, rated=True)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill fresh memory with what cannot pass for a result, and copy in bulk whatever can be."""
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        tensor = real(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 12345)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(fused, "BULK_ROWS", 0)
    yield


def check(r: Recurrence, got: ScanOutput, positions: Sequence[int]) -> None:
    dtype = r.v.dtype
    want = reference.scan(r, positions=positions)
    if got.y is not None:
        assert got.y.dtype == dtype and got.y.shape == r.v.shape
        assert relative(got.y, want.y) <= OUTPUTS[dtype]
    if got.steps is not None:
        for name, error in errors(
            got.steps, want.steps, r.start_state(torch.float64).norm(dim=(-2, -1))
        ).items():
            assert getattr(got.steps, name).dtype == torch.float32
            assert error.max() <= WORST[dtype], name
            assert error.square().mean().sqrt() <= RMS[dtype], name
        assert (got.erased is None) == (want.erased is None)
        if want.erased is not None:
            for found, truth in zip(got.erased, want.erased, strict=True):
                error = relative(found, truth) if truth.any() else found.abs().max()  # nothing is there yet
                assert error <= STATES[dtype]
    assert got.states.shape == want.states.shape and got.final_state.dtype == torch.float32
    assert relative(got.final_state, want.final_state) <= STATES[dtype]
    if positions:
        assert relative(got.states, want.states) <= STATES[dtype]


@pytest.mark.parametrize("bulk", [False, True] if DEVICE == "cuda" else [False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_stepping(case: Case, bulk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "BULK_ROWS", 0 if bulk else sys.maxsize)
    r = draw(case, DEVICE)
    positions = (case.time - 1, 0, case.time // 2)
    check(r, fused.scan(r, positions=positions), positions)


@pytest.mark.skipif(DEVICE == "cpu", reason="too long for the interpreter")
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_matches_stepping_for_long(case: Case) -> None:
    r = draw(case, DEVICE)
    positions = (case.time - 2, case.time // 2, 64, 63)
    check(r, fused.scan(r, positions=positions), positions)


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_spans_of_several_chunks(programs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "PROGRAMS", programs)
    time = 270 if dtype == torch.bfloat16 else 75
    r = draw(Case(time, heads=1, initial=True, dtype=dtype), DEVICE)
    positions = (70, time // 2, time - 2)
    check(r, fused.scan(r, positions=positions), positions)


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("case", [SMALL, DELTA], ids=str)
def test_parts_on_request(case: Case, outputs: bool, measure: bool) -> None:
    r = draw(case, DEVICE)
    got = fused.scan(r, outputs=outputs, measure=measure)
    assert (got.y is not None, got.steps is not None) == (outputs, measure)
    check(r, got, ())


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU takes bulk copies by itself")
@pytest.mark.parametrize(("time", "batch"), [(128, 1), (90, 1), (128, 2)])
def test_bulk_copies(time: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.tools.tensor_descriptor")
    monkeypatch.setattr(fused, "_bulk_copies", lambda _: True)
    r = draw(dataclasses.replace(SMALL, time=time, batch=batch), DEVICE)
    check(r, fused.scan(r, positions=(70,)), (70,))


@pytest.mark.parametrize("case", [SMALL, Case(70, batch=2, heads=3, key=20, value=33), ENTRIES], ids=str)
def test_any_layout(case: Case) -> None:
    r = draw(case, DEVICE)
    twisted = {
        name: getattr(r, name).movedim(1, -1).contiguous().movedim(-1, 1)
        for name in ("q", "k", "v", "log_decay", "write_scale")
    }
    if r.initial_state is not None:
        twisted["initial_state"] = r.initial_state.mT.contiguous().mT
    check(r, fused.scan(r.replace(**twisted), positions=(9,)), (9,))


@pytest.mark.parametrize(
    ("case", "field", "value"),
    [(SMALL, field, float("nan")) for field in ("q", "k", "v", "log_decay", "write_scale")]
    + [(SMALL, "v", float("inf")), (DELTA, "k", float("nan")), (DELTA, "v", float("inf"))]
    + [(HALVED, field, float("nan")) for field in ("k", "v", "a", "log_decay")]
    + [(WIDE, "k", float("nan")), (WIDE, "v", float("inf")), (WIDE, "write_scale", float("nan"))]
    + [(KEYED, "log_decay", float("nan")), (KEYED, "v", float("inf"))]
    + [(ERASING, field, float("nan")) for field in ("a", "b", "v", "log_decay")]
    + [(ENTRIES, "v", float("inf")), (ENTRIES, "log_decay", float("nan"))],
    ids=str,
)
def test_a_spoiled_token_reaches_no_earlier_one(case: Case, field: str, value: float) -> None:
    token, r = case.time - 2, draw(case, DEVICE)
    spoiled = getattr(r, field).clone()
    spoiled[:, token, 0].view(-1)[0] = value
    got = fused.scan(r.replace(**{field: spoiled}), positions=(token - 1,))
    clean = fused.scan(r, positions=(token - 1,))

    def same(a: Tensor, b: Tensor) -> bool:  # such a chunk is hard: its products are factored otherwise
        hard = case.keyed and field in ("a", "b", "log_decay")
        return torch.allclose(a, b, rtol=1e-5, atol=1e-6) if hard else torch.equal(a, b)

    if field not in ("q", "k"):  # which the heads share
        assert torch.equal(got.y[:, :, 1:], clean.y[:, :, 1:])
    assert relative(got.y[:, :token], clean.y[:, :token].double()) < 1e-2
    assert not torch.isfinite(got.y[:, token:, 0]).all()
    assert same(got.states, clean.states)
    for step in dataclasses.fields(clean.steps):
        before, after = (getattr(x.steps, step.name)[:, :token] for x in (got, clean))
        assert same(before, after), step.name
    if field != "q":
        assert not torch.isfinite(got.steps.state_norm[:, token:, 0]).any()
        assert not torch.isfinite(got.final_state[:, 0]).all()


@pytest.mark.parametrize(
    ("bits", "products", "half"), [(150, 1, True), (250, 2, True), (500, 0, True), (250, 2, False)]
)
@pytest.mark.parametrize("structure", [{}, {"delta": True}, {"erase": True}], ids=["decay", "delta", "erase"])
def test_forgetting_much(
    structure: dict[str, bool], bits: int, products: int, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a chunk are related by one product, by two, or part by part, and all is the same."""
    shape = {"key": 40, "value": 36, "dtype": torch.bfloat16} if half else {"key": 9, "value": 7}
    r = draw(Case(80, heads=2, initial=True, keyed=True, scale=False, **shape, **structure), DEVICE)
    rows = (fused_pairs if "erase" in structure else fused_keyed).tiling(r, half, half).chunk
    spread = 1 + 0.2 * torch.rand(r.log_decay.shape, device=DEVICE).sub_(0.5)
    log_decay = -bits * math.log(2) / rows * spread
    log_decay[:, rows:, 0] = -1e-3  # one head turns to remembering
    taken: list[Tensor] = []
    real = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: taken.append(real(*a, **k)) or taken[-1])
    got = fused.scan(r.replace(log_decay=log_decay), positions=(3, 79))
    hard = next(t for t in taken if t.dtype == torch.int32)[0]
    assert (hard > 0) == (products == 0)
    check(r.replace(log_decay=log_decay), got, (3, 79))


@pytest.mark.parametrize("case", [SMALL, DELTA, HALVED, WIDE, KEYED, ERASING, ENTRIES], ids=str)
def test_forgetting_everything(case: Case) -> None:
    r = draw(case, DEVICE)
    log_decay = r.log_decay.clone()
    log_decay[:, 5] = -torch.inf
    log_decay[:, 17:19] = -1e4
    got = fused.scan(r.replace(log_decay=log_decay))
    want = reference.scan(r.replace(log_decay=log_decay))
    assert relative(got.y, want.y) <= OUTPUTS[r.v.dtype]
    for name in ("write_norm", "state_norm", "state_mean", "write_overlap"):
        torch.testing.assert_close(
            getattr(got.steps, name).double(), getattr(want.steps, name), rtol=2e-3, atol=1e-3
        )


def test_a_step_without_end_forgets_everything() -> None:
    """Where an infinite step stands for it, no rate of 0 that pads a tile makes a NaN of it."""
    r = draw(RATED, DEVICE)
    steps = r.log_decay.step.clone()
    steps[:, 5] = torch.inf
    r = r.replace(log_decay=Rated(steps, r.log_decay.rate))
    got, want = fused.scan(r), reference.scan(r)
    assert relative(got.y, want.y) <= OUTPUTS[r.v.dtype]
    assert relative(got.steps.state_norm, want.steps.state_norm) <= WORST[r.v.dtype]


def test_a_rated_log_decay_is_not_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    r = draw(RATED, DEVICE)
    plain = fused.scan(r.replace(log_decay=r.log_decay.written_out()))
    monkeypatch.setattr(Rated, "written_out", None)
    steps = r.log_decay.step.movedim(1, -1).contiguous().movedim(-1, 1)  # as a convolution leaves them
    got = fused.scan(r.replace(log_decay=Rated(steps, r.log_decay.rate)), positions=(7,))
    assert relative(got.y, plain.y.double()) < 1e-6
    assert relative(got.final_state, plain.final_state.double()) < 1e-6


@pytest.mark.parametrize("case", [SMALL, HALVED, WIDE, ENTRIES], ids=str)
def test_same_twice(case: Case) -> None:
    r = draw(case, DEVICE)
    first, second = fused.scan(r), fused.scan(r)
    assert torch.equal(first.y, second.y) and torch.equal(first.final_state, second.final_state)
    assert torch.equal(first.steps.state_norm, second.steps.state_norm)


def test_tells_what_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    r = draw(SMALL, DEVICE)
    assert fused.supports(r) is None
    per_entry = draw(ENTRIES, DEVICE)
    erase = torch.zeros(1, r.time, r.heads, r.key, device=DEVICE)
    assert fused.supports(per_entry) is None and fused.supports(r.replace(a=erase, b=erase)) is None
    per_entry = per_entry.replace(a=erase[:, :20], b=erase[:, :20])
    assert "per entry, with an erase term" in fused.supports(per_entry)
    assert fused.supports(draw(DELTA, DEVICE)) is None and fused.supports(draw(KEYED, DEVICE)) is None
    assert "float64" in fused.supports(r.to(torch.float64))
    assert "257" in fused.supports(draw(Case(1, key=257), DEVICE))
    with pytest.raises(ValueError, match="per entry"):
        fused.scan(per_entry)
    monkeypatch.setattr(fused, "_interpreted", lambda: False)
    assert "not on a GPU" in fused.supports(Recurrence(**{n: t.cpu() for n, t in r.tensors().items()}))


@pytest.mark.parametrize("structure", ["delta", "erase", "entry", "rated"])
def test_in_stretches(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text is worked on stretch by stretch, here of one chunk."""
    for launcher in (fused_alike, fused_keyed):
        monkeypatch.setattr(launcher, "ROWS", 1)
    monkeypatch.setattr(fused_entries, "STATES", 1)
    r = draw(Case(70, heads=1, initial=True, **{structure: True}), DEVICE)
    positions = (69, 0, 40)
    check(r, fused.scan(r, positions=positions), positions)
    check(r, fused.scan(r, outputs=False), ())


@pytest.mark.parametrize("case", [HALVED, WIDE], ids=str)
def test_stretches_beside_one_another(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU one is walked while others are prepared and read; here of one chunk, and the last cut."""
    monkeypatch.setattr(fused_alike, "ROWS", 1)
    r = draw(dataclasses.replace(case, time=200), DEVICE)
    r = r.replace(initial_state=r.initial_state.to(torch.bfloat16))  # others are float32
    positions = (199, 3, 64, 130)
    check(r, fused.scan(r, positions=positions), positions)


def test_who_decays_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of Mamba-2 are another scan's, and so is whatever it is faster at."""
    served = []

    def alike(r: Recurrence, *_: Any) -> ScanOutput:
        served.append(r)
        return ScanOutput(None, None, r.v, r.v)

    monkeypatch.setattr(fused_alike, "scan", alike)
    few = {"time": 3, "value": 40, "dtype": torch.bfloat16}
    for case in (Case(3, key=128, value=64, dtype=torch.bfloat16), Case(3, key=130, value=40),
                 Case(3, keyed=True), Case(3, erase=True), Case(3, keyed=True, delta=True)):  # fmt: skip
        fused.scan(draw(case, DEVICE))
    assert not served
    fused.scan(draw(Case(key=128, delta=True, **few), DEVICE))
    assert len(served) == 1
    if DEVICE == "cpu" or torch.cuda.get_device_capability()[0] in (9, 10):
        fused.scan(draw(Case(key=130, **few), DEVICE))
        assert len(served) == 2


def test_what_a_gpu_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_interpreted", lambda: False)
    for structure in ("keyed", "delta", "erase", "skip", "entry", "rated"):
        assert on_gpu(draw(Case(1, key=64, value=64, **{structure: True}), "cpu")) == "fused"
    plain = draw(Case(1, key=64, value=300, dtype=torch.bfloat16), "cpu")
    assert on_gpu(plain) == on_gpu(plain.to(torch.float32)) == "fused"
    assert on_gpu(draw(Case(1, key=257), "cpu")) == "chunked"


class Compiled:
    """Stands for a kernel, and for what it was compiled to."""

    arg_names = ("x", "y", "SIZE", "FLAG")

    def __init__(self, remembers: bool = True) -> None:
        self.remembers, self.calls = remembers, []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.calls.append((grid, arguments, constants))
            return Compiled.again if self.remembers and constants else None

        return run


@pytest.mark.parametrize("remembers", [True, False])
def test_launches_again_what_was_compiled(remembers: bool) -> None:
    """Calls alike reach what was compiled, all arguments in its order; one that is interpreted does not."""
    first, Compiled.again = Compiled(remembers), Compiled()
    launches._launcher.cache_clear()
    x = torch.zeros(3, 4)
    for _ in range(2):
        launch = Launcher.of((1, 1), x, None)
        launch(first, (1, 1, 1), (x, 7), {"FLAG": True, "SIZE": 5}, num_warps=4)
    named = ((1, 1, 1), (x, 7), {"FLAG": True, "SIZE": 5, "num_warps": 4})
    if remembers:
        assert first.calls == [named] and Compiled.again.calls == [((1, 1, 1), (x, 7, 5, True), {})]
    else:
        assert first.calls == [named, named]
    launch(first, (1, 1, 1), (x, 9), {"FLAG": True, "SIZE": 5}, keep=False)
    assert first.calls[-1][1] == (x, 9)
    launch(first, (1,), (x, 8), {"FLAG": False, "SIZE": 5}, variant="other")
    assert first.calls[-1] == ((1, 1, 1), (x, 8), {"FLAG": False, "SIZE": 5})
    others = (x.double(), x.T, x[:2], torch.zeros(14)[1:13].view(3, 4), x.to(torch.bfloat16))
    launchers = {id(Launcher.of((1, 1), y, None)) for y in (x, *others)}
    launchers |= {id(Launcher.of(choices, x, z)) for choices, z in (((1, 0), None), ((1, 1), x))}
    assert len(launchers) == 8
