r"""Any erase term in chunks of matrix products (torch): two writes for every token.

With :math:`z_t = S_{t-1}^\top b_t`, what the erase term reads,

.. math:: S_t = \operatorname{diag}(e^{g_t}) S_{t-1} + a_t z_t^\top + k_t u_t^\top, \qquad u_t = w_t v_t ,

has two writes of rank one and no erase term left: as a sequence of twice the tokens, of which the first of
each pair decays and writes :math:`a_t z_t^\top` and the second only writes, it is one for
:mod:`statescope.kernels.keyed`. In a chunk entered with :math:`S_{in}`, :math:`z` solves a triangular
system,

.. math:: (I - M)\, Z = N U + \operatorname{diag}(e^{G_{t-1}})\, B S_{in}, \qquad
          M_{tj} = \sum_k e^{G_{t-1,k} - G_{jk}}\, b_{tk} a_{jk}, \quad
          N_{tj} = \sum_k e^{G_{t-1,k} - G_{jk}}\, b_{tk} k_{jk} \quad (j < t) .

Source: the WY form of *Parallelizing Linear Transformers with the Delta Rule* (arXiv 2406.06484), section 3,
for two vectors, as RWKV-7 (arXiv 2503.14456, eq. 16) has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statescope.recurrence import Recurrence

from . import keyed
from .decays import Decays
from .interface import Attribution, ScanOutput
from .writes import of_heads, scaled


def scan(
    recurrence: Recurrence,
    dtype: torch.dtype,
    *,
    outputs: bool = True,
    measure: bool = True,
    positions: Sequence[int] = (),
) -> ScanOutput | None:
    """Run a recurrence with vectors ``a`` and ``b``; parameters and None as :func:`keyed.scan`."""
    r = recurrence
    assert r.a is not None
    z = read_by_erase(r, dtype)
    if not torch.isfinite(z).all():
        return None
    k, u = of_heads(r, r.k).to(dtype), scaled(r, dtype)
    q, log_decay = of_heads(r, r.q).to(dtype), _of_keys(r).to(dtype)
    twice = Recurrence(
        q=_alternate(torch.zeros_like(q), q),
        k=_alternate(r.a.to(dtype), k),
        v=_alternate(z, u),
        log_decay=_alternate(log_decay, torch.zeros_like(log_decay)),
        initial_state=r.initial_state,
    )
    found = keyed.run(twice, dtype, outputs, measure, [2 * p + 1 for p in positions], True)
    if found is None:
        return None
    y = None
    if found.y is not None:
        y = found.y[:, 1::2] if r.skip is None else found.y[:, 1::2] + r.v * r.skip.to(dtype)[:, None]
    steps = None
    if found.measured is not None:
        erased, added = found.measured.every_other()
        both = (r.a.to(dtype) * k).sum(-1) * (z * u).sum(-1)
        whole = keyed.Measured(
            decayed=erased.decayed,
            written=(erased.written + added.written + 2 * both).clamp(min=0),
            cross=erased.cross + added.cross,
            mean=added.mean,
        )
        own = r.log_decay.to(dtype)
        steps = whole.steps(own if r.scalar_decay else own.mean(-1))
    return ScanOutput(y, steps, found.states, found.final_state)


def read_by_erase(recurrence: Recurrence, dtype: torch.dtype) -> Tensor:
    """Return :math:`z_t = S_{t-1}^T b_t`, (batch, time, heads, value)."""
    r = recurrence
    state = r.start_state(dtype)
    found = torch.empty(r.v.shape, dtype=dtype, device=r.v.device)
    for first, stop in keyed.blocks(r):
        chunks = _Chunks.split(r, first, stop, dtype)
        right = torch.cat([chunks.n @ chunks.u, chunks.b * chunks.before], -1)
        own, of_state = chunks.solve(right).split([r.value, r.key], -1)
        local = chunks.remaining(chunks.k).transpose(-2, -1) @ chunks.u
        erased = chunks.remaining(chunks.a).transpose(-2, -1)
        for c in range(own.shape[1]):
            own[:, c] += of_state[:, c] @ state
            state = torch.addcmul(local[:, c], state, chunks.kept[:, c]) + erased[:, c] @ own[:, c]
        found[:, first:stop] = chunks.tokens(own)
    return found


def probe(
    recurrence: Recurrence, state: Tensor, query: Tensor, after: Tensor | None, dtype: torch.dtype
) -> Attribution:
    r"""Attribute the state at a probe to the writes of earlier tokens, by chunks from the last to the first.

    With :math:`X = (I - M)^{-\top} A_{rem}`, where :math:`A_{rem}` holds :math:`a_t` decayed to the chunk's
    end, what survives there of the keys is :math:`K_{rem} + N^\top X`, and a chunk takes the state that
    enters it through :math:`\operatorname{diag}(e^{G_{end}}) + X^\top \operatorname{diag}(e^{G_{t-1}}) B`.
    Parameters and result as :func:`statescope.kernels.reference.probe`.
    """
    r = recurrence
    probed = keyed.Probed(r, state, query, dtype)
    survives = _identity(r, dtype) if after is None else after.to(dtype)
    for first, stop, chunks in _from_the_last(r, dtype):
        keys, maps = chunks.surviving()
        for c in reversed(range(keys.shape[1])):
            keys[:, c] = keys[:, c] @ survives.transpose(-2, -1)
            survives = survives @ maps[:, c]
        probed.take(first, stop, keys, chunks.u)
    return probed.attribution(survives @ r.start_state(dtype))


def transition(recurrence: Recurrence, dtype: torch.dtype) -> Tensor:
    """Return the map from the state before the first token to that after the last."""
    survives = _identity(recurrence, dtype)
    for _, _, chunks in _from_the_last(recurrence, dtype):
        maps = chunks.surviving()[1]
        for c in reversed(range(maps.shape[1])):
            survives = survives @ maps[:, c]
    return survives


@dataclass(frozen=True, eq=False)
class _Chunks:
    """A stretch of time cut into chunks. Letters as in :class:`statescope.kernels.keyed.Chunks`."""

    time: int
    k: Tensor  # b c h i k
    a: Tensor  # b c h i k
    b: Tensor  # b c h i k
    u: Tensor  # b c h i v, scaled
    run: Tensor  # b c h i k, float64
    before: Tensor  # b c h i k: decay from the chunk's start to where b reads
    kept: Tensor  # b c h k 1: decay of the whole chunk
    system: Tensor  # b c h i j: -M
    n: Tensor  # b c h i j

    @classmethod
    def split(cls, r: Recurrence, first: int, stop: int, dtype: torch.dtype) -> _Chunks:
        cut = keyed.Cut(r, first, stop)
        vectors = r.between(first, stop, None).to(dtype).erase_vectors()
        assert vectors is not None
        here = keyed.Cut(r, 0, stop - first)
        a, b = (here.of_tokens(x, dtype) for x in vectors)
        k = cut.of_groups(r.k, dtype)
        log_decay = cut.of_tokens(_of_keys(r), torch.float64).clamp(min=keyed.SMALLEST)
        run = log_decay.cumsum(-2)
        before = run - log_decay
        decays = Decays(run, dtype, before)
        v = cut.of_tokens(r.v, dtype)
        return cls(
            time=stop - first,
            k=k,
            a=a,
            b=b,
            u=v if r.write_scale is None else v * cut.of_tokens(r.write_scale[..., None], dtype),
            run=run,
            before=before.to(dtype).exp(),
            kept=run[..., -1, :, None].to(dtype).exp(),
            system=-decays.matrix(b, a, False),
            n=decays.matrix(b, k, False),
        )

    def solve(self, right: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.system, right, upper=False, unitriangular=True)

    def remaining(self, x: Tensor) -> Tensor:
        """Vectors of the state's size, decayed to the chunk's end."""
        return (self.run[..., -1:, :] - self.run).to(x.dtype).exp() * x

    def surviving(self) -> tuple[Tensor, Tensor]:
        """What is left of every key at its chunk's end, (b c h i k), and each chunk's map, (b c h k k)."""
        erased = torch.linalg.solve_triangular(
            self.system.transpose(-2, -1), self.remaining(self.a), upper=True, unitriangular=True
        )
        maps = erased.transpose(-2, -1) @ (self.b * self.before)
        maps.diagonal(dim1=-2, dim2=-1).add_(self.kept[..., 0])
        return self.remaining(self.k) + self.n.transpose(-2, -1) @ erased, maps

    def tokens(self, x: Tensor) -> Tensor:
        """Bring (b c h i x) back to (batch, time, heads, x) and drop the padding."""
        return x.transpose(2, 3).flatten(1, 2)[:, : self.time]


def _identity(r: Recurrence, dtype: torch.dtype) -> Tensor:
    return torch.eye(r.key, dtype=dtype, device=r.v.device).expand(r.batch, r.heads, -1, -1)


def _from_the_last(r: Recurrence, dtype: torch.dtype) -> Iterator[tuple[int, int, _Chunks]]:
    for first, stop in reversed(list(keyed.blocks(r))):
        yield first, stop, _Chunks.split(r, first, stop, dtype)


def _alternate(first: Tensor, second: Tensor) -> Tensor:
    """Two writes a token, (batch, 2 time, heads, x)."""
    return torch.stack([first, second], 2).flatten(1, 2)


def _of_keys(r: Recurrence) -> Tensor:
    return r.log_decay[..., None].expand(*r.log_decay.shape, r.key) if r.scalar_decay else r.log_decay
