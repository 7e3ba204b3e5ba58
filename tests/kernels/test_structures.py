"""Every structure of the recurrence: stepping against closed forms, chunks against stepping."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statescope.kernels import chunked, keyed, reference, stepped
from statescope.kernels.interface import ScanOutput, Steps
from statescope.recurrence import Recurrence

STRUCTURES = ("scalar", "per_key", "per_entry", "delta", "erase", "per_key_erase", "per_key_delta")
LENGTHS = (1, 63, 64, 65, 1000)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6}
"""Of chunks against stepping on the same (rounded) inputs, over the root mean square of the truth."""


def draw(
    structure: str = "scalar",
    time: int = 65,
    initial: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    batch: int = 2,
    heads: int = 6,
    groups: int = 3,
    key: int = 5,
    value: int = 7,
) -> Recurrence:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    per_head = (batch, time, heads)
    own = {"per_key": (key,), "per_entry": (key, value)}
    gate = normal(*per_head, *next((size for name, size in own.items() if structure.startswith(name)), ()))
    unit = torch.nn.functional.normalize(normal(*per_head, key), dim=-1)
    beta = normal(*per_head).sigmoid()[..., None]
    erases, delta = structure.endswith("erase"), structure.endswith("delta")
    k = normal(batch, time, groups, key)
    r = Recurrence(
        q=normal(batch, time, groups, key),
        k=torch.nn.functional.normalize(k, dim=-1) if delta else k,
        v=normal(*per_head, value),
        log_decay=-torch.nn.functional.softplus(gate - 2),
        write_scale=normal(*per_head).exp(),
        a=-2 * beta[..., 0] if delta else -beta * unit if erases else None,
        b=unit if erases else None,
        initial_state=normal(batch, heads, key, value) if initial else None,
        skip=normal(heads),
    )
    return r.to(dtype)


ERASED = ("erase_norm", "erase_strength")


def fields(output: ScanOutput) -> dict[str, Tensor]:
    steps = output.steps
    assert steps is not None and output.y is not None
    named = {name: getattr(steps, name) for name in Steps.__dataclass_fields__}
    named |= {"y": output.y, "final_state": output.final_state, "states": output.states}
    return named if output.erased is None else named | dict(zip(ERASED, output.erased, strict=True))


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name, truth in want.items():
        assert got[name].shape == truth.shape, name
        if truth.numel():
            scale = truth.square().mean().sqrt().clamp(min=0.1)
            error = (got[name].double() - truth).square().mean().sqrt() / scale
            assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory cannot pass for a result."""
    for home, name in ((torch, "empty"), (Tensor, "new_empty")):
        real = getattr(home, name)
        monkeypatch.setattr(home, name, lambda *a, _real=real, **k: _real(*a, **k).fill_(torch.nan))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_chunks_match_stepping(structure: str, time: int, initial: bool, dtype: torch.dtype) -> None:
    r = draw(structure, time, initial, dtype)
    positions = sorted({0, time // 2, time - 1})
    want = reference.scan(r, positions=positions)
    assert_close(fields(chunked.scan(r, positions=positions)), fields(want), TOLERANCE[dtype])
    state, query = want.final_state, r.q[:, -1]
    for got, truth in zip(chunked.probe(r, state, query), reference.probe(r, state, query), strict=True):
        assert (got - truth).abs().max() <= 10 * TOLERANCE[dtype] * truth.abs().max().clamp(min=1.0)


@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), (4, 1, 16, 16), (4, 4, 100, 48), (2, 1, 1, 256), (8, 2, 256, 1)]
)
def test_any_size(size: tuple[int, int, int, int]) -> None:
    heads, groups, key, value = size
    r = draw(time=130, heads=heads, groups=groups, key=key, value=value, dtype=torch.float32)
    tolerance = 5 * TOLERANCE[torch.float32]  # a state of one entry can be cancelled almost whole by a write
    assert_close(fields(chunked.scan(r)), fields(reference.scan(r)), tolerance)


@pytest.mark.parametrize("key", [chunked.NARROW_CHUNK, chunked.NARROW_CHUNK + 1])
@pytest.mark.parametrize("time", [31, 32, 33, 63, 64, 65, 128])
def test_ends_of_chunks(time: int, key: int) -> None:
    r = draw(time=time, key=key, initial=True, dtype=torch.float32)
    positions = range(0, time, 31)
    got, want = (kernel.scan(r, positions=positions) for kernel in (chunked, reference))
    assert_close(fields(got), fields(want), TOLERANCE[torch.float32])


def test_longer_than_a_block() -> None:
    block = chunked.block_tokens(draw(batch=1))
    r = draw(time=block + 70, initial=True, batch=1, dtype=torch.float32)
    assert chunked.block_tokens(r) == block < r.time
    positions = (3, block - 1, block, block + 69)
    got, want = (kernel.scan(r, positions=positions) for kernel in (chunked, reference))
    assert_close(fields(got), fields(want), TOLERANCE[torch.float32])


@pytest.mark.parametrize("structure", ["per_key", "per_entry", "per_key_delta", "erase"])
def test_in_blocks(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    r = draw(structure, 200, initial=True)
    whole, kept = chunked.scan(r), chunked.probe(r, r.initial_state, r.q[:, 3])
    monkeypatch.setitem(stepped.ENTRIES, "cpu", 16 * r.batch * r.heads * r.key * r.value)
    monkeypatch.setitem(keyed.ROWS, "cpu", 1)
    positions = (3, 15, 16, 69, 130)
    assert_close(
        fields(chunked.scan(r, positions=positions)), fields(reference.scan(r, positions=positions)), 1e-12
    )
    torch.testing.assert_close(chunked.scan(r).final_state, whole.final_state)
    for got, want in zip(chunked.probe(r, r.initial_state, r.q[:, 3]), kept, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s.startswith("per_key")])
@pytest.mark.parametrize("rate", [1, 5, 30])
def test_strong_decay_of_keys(structure: str, rate: float) -> None:
    """Decays that leave the range of a float32 within a few tokens; one token forgets all of some keys."""
    r = draw(structure, 130, initial=True, key=16)
    log_decay = rate * r.log_decay
    log_decay[:, ::7] = -50.0
    log_decay[:, 40, :, ::2] = -torch.inf
    r = r.replace(log_decay=log_decay)
    got, want = (fields(kernel.scan(r, positions=(39, 40))) for kernel in (chunked, reference))
    assert_close(got, {n: x for n, x in want.items() if n != "log_decay"}, 1e-12)
    assert torch.equal(got["log_decay"], want["log_decay"])
    single = fields(chunked.scan(r.to(torch.float32), positions=(39, 40)))
    del want["log_decay"], want["write_overlap"]  # of e^-50 of a state, whose square is no float32
    assert_close(single, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("structure", ["delta", "per_key_delta"])
def test_delta_rule_is_its_vectors(structure: str) -> None:
    """The short form of the erase term, and the paper's: forget, then correct what the key reads."""
    r = draw(structure, 40, initial=True)
    a, b = r.erase_vectors()
    want = fields(reference.scan(r))
    general = fields(reference.scan(r.replace(a=a, b=b)))
    assert_close(general, {name: want[name] for name in general}, 1e-14)
    beta = torch.rand(2, 40, 6, dtype=torch.float64)
    gated = r.replace(write_scale=beta, a=-beta)
    state, k = r.initial_state, r.k.repeat_interleave(2, 2)
    for t in range(40):
        decay = r.log_decay[:, t].exp()
        state = state * decay.reshape(*decay.shape, *(1,) * (4 - decay.ndim))
        error = r.v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
    for kernel in (reference, chunked):
        torch.testing.assert_close(kernel.scan(gated).final_state, state)
        torch.testing.assert_close(kernel.scan(gated).erased[1], beta)  # keys are of norm 1


@pytest.mark.parametrize("structure", ["delta", "per_key_delta"])
def test_what_is_erased(structure: str) -> None:
    """With values of 0 a token does nothing but erase: the norm of its update, and what that takes."""
    r = draw(structure, 20, initial=True)
    r = r.replace(v=torch.zeros_like(r.v), k=2 * r.k)
    for kernel in (reference, chunked):
        found = kernel.scan(r, positions=range(20))
        norm, strength = found.erased
        torch.testing.assert_close(norm, found.steps.write_norm)
        before = torch.cat([r.initial_state[:, None], found.states[:, :-1]], 1)
        decay = r.log_decay.exp()
        decayed = decay.reshape(*decay.shape, *(1,) * (5 - decay.ndim)) * before
        k = r.k.repeat_interleave(2, 2)[..., None, :]
        reads = [(k @ x)[..., 0, :].norm(dim=-1) for x in (decayed, found.states)]
        torch.testing.assert_close(reads[1], (1 - strength).abs() * reads[0])
        taken = decayed.square().sum((-2, -1)) - found.states.square().sum((-2, -1))
        torch.testing.assert_close(taken, (2 - strength) / strength * norm**2)
        assert kernel.scan(r, measure=False).erased is None and kernel.scan(draw()).erased is None


def test_parts_on_request() -> None:
    r = draw()
    full = fields(chunked.scan(r))
    measured = chunked.scan(r, outputs=False)
    assert measured.y is None
    assert torch.equal(measured.steps.state_norm, full["state_norm"])
    plain = chunked.scan(r, measure=False)
    assert plain.steps is None and torch.equal(plain.y, full["y"])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nan_reaches_no_earlier_token(structure: str) -> None:
    r = draw(structure, 40)
    bad = r.v.clone()
    bad[1, 20, 2] = torch.nan
    clean, spoilt = chunked.scan(r), chunked.scan(r.replace(v=bad))
    for name, want in fields(clean).items():
        got = fields(spoilt)[name]
        if name in ("final_state", "states"):
            continue
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1, :20], want[1, :20])
    assert spoilt.steps.state_norm[1, 20:, 2].isnan().all()


# Closed forms.


def test_a_write_that_is_erased_has_no_share() -> None:
    """The delta rule with strength 1 replaces what its key held; a write along another key stays."""
    k = torch.eye(4, dtype=torch.float64)[[0, 1, 0]][None, :, None]
    v = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)[None, :, None]
    log_decay = torch.zeros(1, 3, 1, 4, dtype=torch.float64)
    r = Recurrence(q=k, k=k, v=v, log_decay=log_decay, a=-torch.ones_like(log_decay[..., 0]))
    for kernel in (reference, chunked):
        out = kernel.scan(r)
        found = kernel.probe(r, out.final_state, r.q[:, -1])
        contribution, share, before = found.contribution, found.share, found.share_before
        want = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
        torch.testing.assert_close(contribution[0, :, 0], want)
        torch.testing.assert_close(share[0, :, 0], want**2 / 5)
        assert before.abs().max() == 0
        # What is written is the correction: the asked for value less the one that is taken away.
        write = torch.tensor([5.0, 1.0, np.hypot(3, 2)], dtype=torch.float64)
        torch.testing.assert_close(out.steps.write_norm[0, :, 0], write)


def test_decay_of_keys_in_words() -> None:
    """``log_decay`` is the mean over keys; a write survives as its key does, entry by entry."""
    r = draw("per_key", 50)
    after = r.log_decay.flip(1).cumsum(1).flip(1) - r.log_decay
    keys = r.k.repeat_interleave(2, 2) * after.exp()
    value = r.write_scale[..., None] * r.v
    for kernel in (reference, chunked):
        out = kernel.scan(r)
        torch.testing.assert_close(out.steps.log_decay, r.log_decay.mean(-1))
        found = kernel.probe(r, out.final_state, r.q[:, -1])
        contribution, share = found.contribution, found.share
        torch.testing.assert_close(contribution, keys.norm(dim=-1) * value.norm(dim=-1))
        read = torch.einsum("bthk,bhkv,bthv->bth", keys, out.final_state, value)
        torch.testing.assert_close(share, read / out.final_state.square().sum((-2, -1))[:, None])


def test_no_decay_accumulates() -> None:
    r = draw(initial=True).replace(log_decay=torch.zeros(2, 65, 6, dtype=torch.float64))
    k = r.k.repeat_interleave(2, 2)
    want = r.initial_state + torch.einsum("bth,bthk,bthv->bhkv", r.write_scale, k, r.v)
    torch.testing.assert_close(reference.scan(r).final_state, want)


def test_repeated_write_is_a_geometric_series() -> None:
    one = torch.ones(1, 50, 1, 1, dtype=torch.float64)
    r = Recurrence(q=one, k=one, v=2 * one, log_decay=np.log(0.9) * one[..., 0])
    for kernel in (reference, chunked):
        steps = kernel.scan(r).steps
        want = 2 * (1 - 0.9 ** torch.arange(1, 51, dtype=torch.float64)) / 0.1
        torch.testing.assert_close(steps.state_norm[0, :, 0], want)
        torch.testing.assert_close(steps.state_mean[0, :, 0], want)
        torch.testing.assert_close(steps.write_overlap[0, 1:, 0], torch.ones(49, dtype=torch.float64))


def test_orthogonal_writes_add_in_quadrature() -> None:
    eye = torch.eye(16, dtype=torch.float64)[None, :, None]
    r = Recurrence(q=eye, k=eye, v=torch.ones(1, 16, 1, 3), log_decay=torch.zeros(1, 16, 1)).to(torch.float64)
    for kernel in (reference, chunked):
        steps = kernel.scan(r).steps
        torch.testing.assert_close(steps.state_norm[0, :, 0] ** 2, 3 * torch.arange(1.0, 17).double())
        assert steps.write_overlap.abs().max() == 0


def test_unit_key_delta_rule_overwrites() -> None:
    """With beta = 1 and no decay, reading with the last key gives back the last value."""
    r = draw("erase")
    k = torch.nn.functional.normalize(r.k, dim=-1)
    heads = k.repeat_interleave(2, 2)
    r = r.replace(
        q=k, k=k, a=-heads, b=heads, log_decay=torch.zeros_like(r.log_decay), write_scale=None, skip=None
    )
    torch.testing.assert_close(reference.scan(r).y, r.v)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_norm_budget(structure: str) -> None:
    r = draw(structure, 40, initial=True)
    output = reference.scan(r, positions=range(40))
    s = output.steps
    before = torch.cat([r.initial_state[:, None], output.states[:, :-1]], 1)
    decay = r.log_decay.exp()
    old = (decay.reshape(*decay.shape, *(1,) * (5 - decay.ndim)) * before).norm(dim=(-2, -1))
    budget = old**2 + 2 * s.write_overlap * old * s.write_norm + s.write_norm**2
    torch.testing.assert_close(s.state_norm**2, budget)
    torch.testing.assert_close(s.state_norm, output.states.norm(dim=(-2, -1)))


# Properties.


@settings(max_examples=25, deadline=None)
@given(
    structure=st.sampled_from(STRUCTURES),
    time=st.integers(2, 150),
    cut=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
)
def test_splitting_changes_nothing(structure: str, time: int, cut: float, seed: int) -> None:
    r = draw(structure, time, True, seed=seed)
    at = max(1, int(cut * r.time))
    whole = chunked.scan(r)
    first = chunked.scan(r.between(0, at, r.initial_state))
    second = chunked.scan(r.between(at, r.time, first.final_state))
    joined = {
        name: torch.cat([getattr(first.steps, name), getattr(second.steps, name)], 1)
        for name in Steps.__dataclass_fields__
    }
    joined |= {"y": torch.cat([first.y, second.y], 1), "final_state": second.final_state}
    assert_close(joined, {name: fields(whole)[name] for name in joined}, 1e-11)


@settings(max_examples=15, deadline=None)
@given(structure=st.sampled_from(STRUCTURES), seed=st.integers(0, 99))
def test_shares_sum_to_one(structure: str, seed: int) -> None:
    r = draw(structure, 40, initial=True, seed=seed)
    end = reference.scan(r.replace(skip=None), measure=False)
    for kernel in (reference, chunked):
        found = kernel.probe(r, end.final_state, r.q[:, -1])
        pairs = ((found.share, found.share_before), (found.output_share, found.output_share_before))
        for share, before in pairs:
            torch.testing.assert_close(share.sum(1) + before, torch.ones_like(before), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.output_norm, end.y[:, -1].norm(dim=-1))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_output_of_one_write(structure: str) -> None:
    """A recurrence is linear in its values: with all others 0, a token's part of the output is all of it."""
    r = draw(structure, 30).replace(skip=None)
    end = reference.scan(r, measure=False)
    y, v = end.y[:, -1], r.v
    for kernel in (reference, chunked):
        found = kernel.probe(r, end.final_state, r.q[:, -1])
        for i in (0, 11, 29):
            alone = torch.zeros_like(v)
            alone[:, i] = v[:, i]
            part = reference.scan(r.replace(v=alone), measure=False).y[:, -1]
            torch.testing.assert_close(found.output_contribution[:, i], part.norm(dim=-1))
            torch.testing.assert_close(found.output_share[:, i], (part * y).sum(-1) / y.square().sum(-1))
            nearest = (part * v[:, i]).sum(-1) / v[:, i].square().sum(-1)
            torch.testing.assert_close(found.attention[:, i], nearest)
            if structure != "per_entry":
                torch.testing.assert_close(part, found.attention[:, i, :, None] * v[:, i])
        zero = kernel.probe(r.replace(v=torch.zeros_like(v)), end.final_state, r.q[:, -1])
        assert (zero.output_contribution == 0).all() and zero.attention.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(structure=st.sampled_from(STRUCTURES), time=st.integers(2, 150), cut=st.floats(0.01, 0.99))
def test_probe_in_parts(structure: str, time: int, cut: float) -> None:
    """Attributed stretch by stretch, with what happens after each, everything is as in one."""
    r = draw(structure, time, initial=True)
    at = min(max(1, int(cut * r.time)), r.time - 1)
    state = chunked.scan(r, measure=False).final_state
    middle = chunked.scan(r.between(0, at, r.initial_state), measure=False).final_state
    late = r.between(at, r.time, middle)
    after = chunked.transition(late) if r.erases else late.log_decay.sum(1)
    query = r.q[:, -1]
    early = chunked.probe(r.between(0, at, r.initial_state), state, query, after)
    rest = chunked.probe(late, state, query)
    whole = chunked.probe(r, state, query)
    for name, want in whole._asdict().items():
        first, second = getattr(early, name), getattr(rest, name)
        joined = torch.cat([first, second], 1) if want.ndim == 3 else first
        scale = max(1.0, float(want.abs().max()))
        torch.testing.assert_close(joined, want, rtol=1e-9, atol=1e-11 * scale)
    for kind in ("share", "output_share"):
        share, before = getattr(early, kind), getattr(early, f"{kind}_before")
        found = getattr(rest, f"{kind}_before")
        scale = max(1.0, float(share.abs().max()))
        torch.testing.assert_close(found, share.sum(1) + before, rtol=1e-9, atol=1e-9 * scale)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(6)))
def test_heads_permute(order: list[int]) -> None:
    r = draw(groups=6, initial=True)
    per_head = {n: x[:, :, order] for n, x in r.tensors().items() if n not in ("initial_state", "skip")}
    moved = r.replace(**per_head, initial_state=r.initial_state[:, order], skip=r.skip[order])
    whole, permuted = chunked.scan(r), chunked.scan(moved)
    for name in Steps.__dataclass_fields__:
        torch.testing.assert_close(getattr(permuted.steps, name), getattr(whole.steps, name)[..., order])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": torch.zeros(2, 65, 3, 4)}, "q has shape"),
        ({"v": torch.zeros(2, 65, 6)}, "v has shape"),
        ({"k": torch.zeros(2, 65, 4, 5)}, "4 groups"),
        ({"k": torch.zeros(2, 65, 5)}, "k has shape"),
        ({"log_decay": torch.zeros(2, 65, 5)}, "log_decay has shape"),
        ({"write_scale": torch.zeros(2, 65)}, "write_scale has shape"),
        ({"a": torch.zeros(2, 65, 6, 5)}, "both a and b"),
        ({"a": torch.zeros(2, 65, 5)}, "a has shape"),
        ({"a": torch.zeros(2, 65, 6), "b": torch.zeros(2, 65, 6, 5)}, "b must be None"),
        ({"log_decay": torch.zeros(2, 65, 6, 5, 6)}, "log_decay has shape"),
        ({"initial_state": torch.zeros(2, 6, 7, 5)}, "initial_state has shape"),
        ({"skip": torch.zeros(5)}, "skip has shape"),
        ({"q": torch.zeros(2, 65, 3, 5, dtype=torch.int64)}, "q has dtype"),
        ({"skip": torch.zeros(6, device="meta")}, "skip is on meta"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_recurrence_that_does_not_fit(change: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        draw().replace(**change)


def test_fields_are_the_equations() -> None:
    names = [f.name for f in dataclasses.fields(Recurrence)]
    assert names == ["q", "k", "v", "log_decay", "write_scale", "a", "b", "initial_state", "skip"]
