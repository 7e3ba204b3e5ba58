r"""Decay per key in chunks of matrix products (torch).

What a row reads of the chunk is a product with factors from :mod:`statescope.kernels.decays`. The norm of the
state needs the energy of each of its rows, as rows decay at their own rates:

.. math::

    |S_t|^2 = \sum_k E_{tk}, \qquad
    E_{tk} = e^{2 g_{tk}} E_{t-1,k} + 2 k_{tk} R_{tk} + k_{tk}^2 |u_t|^2, \qquad
    R_{tk} = D_t[k, :] \cdot u_t = e^{G_{tk}} S_{in}[k, :] \cdot u_t
        + \sum_{j < t} e^{G_{tk} - G_{jk}} k_{jk} (u_j \cdot u_t) ,

with :math:`u_t` what is written. :math:`R` is again a product (of the values' Gram matrix and the keys), and
the energies restart from :math:`S_{in}` in every chunk.

Source: *Gated Linear Attention Transformers* (arXiv 2312.06635), section 4; the delta rule as in
:mod:`statescope.kernels.delta` (*Kimi Linear*, arXiv 2510.26692).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from statescope.recurrence import Recurrence

from . import delta
from .decays import Decays, masked
from .interface import Attribution, ScanOutput, Steps

CHUNK = 64
"""Tokens of a chunk, a power of two."""

ROWS = {"cpu": 2**12, "cuda": 2**18}
"""Tokens times heads times sequences worked on at once, by device: bounds the memory whatever the length."""

SMALLEST = -800.0
"""exp of it is 0 in float64: clamping there changes nothing, and keeps -inf - (-inf) out."""


def scan(
    recurrence: Recurrence,
    dtype: torch.dtype,
    *,
    outputs: bool = True,
    measure: bool = True,
    positions: Sequence[int] = (),
) -> ScanOutput | None:
    """Run a recurrence whose keys decay, each at its own rate; an erase term must be the delta rule's.

    Parameters
    ----------
    recurrence : Recurrence
        What to run.
    dtype : torch.dtype
        Arithmetic and results.
    outputs, measure : bool
        Whether to compute ``y`` and ``steps``.
    positions : sequence of int
        Tokens after which the state is kept.

    Returns
    -------
    ScanOutput or None
        None if a state stopped being finite: a product spreads a NaN to earlier tokens of its chunk.
    """
    r = recurrence
    found = run(r, dtype, outputs, measure, positions)
    if found is None:
        return None
    if found.y is not None and r.skip is not None:
        found.y.addcmul_(r.v.to(dtype), r.skip.to(dtype)[:, None])
    steps = None if found.measured is None else found.measured.steps(r.log_decay.to(dtype).mean(-1))
    return ScanOutput(found.y, steps, found.states, found.final_state, found.erased)


def run(
    r: Recurrence,
    dtype: torch.dtype,
    outputs: bool,
    measure: bool,
    positions: Sequence[int],
    pairs: bool = False,
) -> Found | None:
    """Run block by block, without skip; with ``pairs`` as :meth:`Chunks.measure` says."""
    start = state = r.start_state(dtype)
    y = torch.empty(r.v.shape, dtype=dtype, device=state.device) if outputs else None
    measured: list[Measured] = []
    erased: list[Tensor] = []
    kept: dict[int, Tensor] = {}
    for first, stop in blocks(r):
        chunks = Chunks.split(r, first, stop, dtype)
        entering, state = chunks.correct(state) if r.erases else chunks.pass_states(state)
        if y is not None:
            y[:, first:stop] = chunks.read(entering)
        if measure:
            measured.append(chunks.measure(entering, pairs))
        if measure and r.delta_rule:
            erased.append(delta.erased(r.between(first, stop, None), chunks.tokens(chunks.u)))
        kept |= {p: chunks.state_after(entering, p - first) for p in positions if first <= p < stop}
    if not torch.isfinite(state).logical_or(~torch.isfinite(start)).all():
        return None
    states = torch.stack([kept[p] for p in positions], 1) if positions else state[:, None][:, :0]
    return Found(
        y,
        Measured.concatenate(measured) if measure else None,
        states,
        state,
        torch.cat(erased, 2) if erased else None,
    )


def probe(
    recurrence: Recurrence, state: Tensor, query: Tensor, after: Tensor | None, dtype: torch.dtype
) -> Attribution:
    """Attribute the state at a probe, and what the query reads of it, to earlier writes, where none erases.

    See :func:`statescope.kernels.reference.probe`.
    """
    r = recurrence
    probed = Probed(r, state, query, dtype)
    shape = (r.batch, r.heads, r.key)
    later = state.new_zeros(shape, dtype=torch.float64) if after is None else after.double().expand(shape)
    for first, stop in reversed(list(blocks(r))):
        chunks = Chunks.split(r, first, stop, dtype, decays=False)
        for c in reversed(range(chunks.run.shape[1])):
            run_c = chunks.run[:, c]
            survives = (run_c[:, :, -1:] - run_c + later[:, :, None]).to(dtype).exp_()
            chunks.k[:, c] *= survives
            later = later + run_c[:, :, -1]
        probed.take(first, stop, chunks.k, chunks.u)
    return probed.attribution(r.start_state(dtype) * later.to(dtype).exp()[..., None])


class Probed:
    """A state and a query at a probe, and what is known so far of the tokens that made them."""

    def __init__(self, r: Recurrence, state: Tensor, query: Tensor, dtype: torch.dtype) -> None:
        self.r, self.state = r, state.to(dtype)
        self.query = query.to(dtype).repeat_interleave(r.heads // r.groups, 1)[..., None]  # b h k 1
        output = (self.query.transpose(-2, -1) @ self.state)[..., 0, :]
        self.output_norm = output.norm(dim=-1)
        self.along = (output / self.output_norm.square()[..., None])[..., None]  # b h v 1
        self.found = torch.empty((5, *r.v.shape[:3]), dtype=dtype, device=r.v.device)

    def take(self, first: int, stop: int, keys: Tensor, u: Tensor) -> None:
        """Take what survives of keys, (b c h i k), and the values as scaled, (b c h i v), of a stretch."""
        read, value_norm = keys @ self.query[:, None], u.norm(dim=-1, keepdim=True)
        rows = (
            keys.norm(dim=-1, keepdim=True) * value_norm,
            ((keys @ self.state[:, None]) * u).sum(-1, keepdim=True),
            read,
            read.abs() * value_norm,
            read * (u @ self.along[:, None]),
        )
        for row, values in zip(self.found, rows, strict=True):
            row[:, first:stop] = values.transpose(2, 3).flatten(1, 2)[:, : stop - first, :, 0]

    def attribution(self, left: Tensor) -> Attribution:
        """Put everything together, with what is left of the initial state, (b h k v)."""
        energy = self.state.square().sum((-2, -1))
        self.found[1] /= energy[:, None]
        if self.r.write_scale is not None:
            self.found[2] *= self.r.write_scale.to(self.found.dtype)  # the values are scaled already
        return Attribution._make(
            [
                *self.found,
                (left * self.state).sum((-2, -1)) / energy,
                ((self.query.transpose(-2, -1) @ left) @ self.along)[..., 0, 0],
                self.output_norm,
            ]
        )


def blocks(r: Recurrence) -> Iterator[tuple[int, int]]:
    """Stretches of time worked on at once, whole chunks."""
    rows = ROWS["cuda" if r.v.is_cuda else "cpu"]
    block = CHUNK * max(1, rows // (r.batch * r.heads * CHUNK))
    return ((first, min(first + block, r.time)) for first in range(0, r.time, block))


@dataclass(frozen=True, eq=False)
class Measured:
    """What the fields of :class:`Steps` are made of, each (batch, time, heads)."""

    decayed: Tensor  # |D_t|^2
    written: Tensor  # |U_t|^2
    cross: Tensor  # <D_t, U_t>
    mean: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence[Measured]) -> Measured:
        """Join consecutive stretches of time."""
        return cls(*(torch.cat([getattr(p, f) for p in parts], 1) for f in cls.__dataclass_fields__))

    @property
    def energy(self) -> Tensor:
        """:math:`|S_t|^2`."""
        return (self.decayed + 2 * self.cross + self.written).clamp(min=0)

    def every_other(self) -> tuple[Measured, Measured]:
        """Those of tokens 0, 2, 4 and on, and those of 1, 3, 5 and on."""
        first, second = ([getattr(self, f)[:, i::2] for f in self.__dataclass_fields__] for i in (0, 1))
        return Measured(*first), Measured(*second)

    def steps(self, log_decay: Tensor) -> Steps:
        """Take roots and the cosine."""
        written = self.written.clamp(min=0).sqrt()
        scale = self.decayed.clamp(min=0).sqrt() * written
        overlap = torch.where(scale == 0, torch.zeros_like(scale), self.cross / scale).clamp(-1, 1)
        return Steps(log_decay, written, self.energy.sqrt(), self.mean, overlap)


@dataclass(frozen=True, eq=False)
class Found:
    """What :func:`run` found; fields as :class:`ScanOutput`'s."""

    y: Tensor | None
    measured: Measured | None
    states: Tensor
    final_state: Tensor
    erased: Tensor | None


@dataclass(eq=False)
class Chunks:
    """A stretch of time cut into chunks; the last one padded with tokens that do nothing.

    Letters: b batch, c chunk, h head, i, j token in the chunk, k key, v value.
    """

    time: int
    q: Tensor  # b c h i k
    k: Tensor  # b c h i k
    u: Tensor  # b c h i v: what is written, once :meth:`correct` has been called
    a: Tensor | None  # b c h i
    run: Tensor  # b c h i k, float64
    decays: Decays

    @classmethod
    def split(cls, r: Recurrence, first: int, stop: int, dtype: torch.dtype, decays: bool = True) -> Chunks:
        """Cut tokens ``first`` to ``stop - 1`` out, with what is forgotten between them if asked."""
        cut = Cut(r, first, stop)
        run = cut.of_tokens(r.log_decay, torch.float64).clamp(min=SMALLEST).cumsum(-2)
        v = cut.of_tokens(r.v, dtype)
        return cls(
            time=stop - first,
            q=cut.of_groups(r.q, dtype),
            k=cut.of_groups(r.k, dtype),
            u=v if r.write_scale is None else v * cut.of_tokens(r.write_scale[..., None], dtype),
            a=None if r.a is None else cut.of_tokens(r.a[..., None], dtype),
            run=run,
            decays=Decays(run if decays else run[..., :1, :], dtype),
        )

    def pass_states(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state entering every chunk, (b c h k v), and the one leaving the last."""
        local = self._remaining().transpose(-2, -1) @ self.u
        return passed(state, local, self._kept())

    def correct(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for what the delta rule writes; return what :meth:`pass_states` does."""
        assert self.a is not None
        system = self.decays.matrix(self.k, self.k, False).mul_(-self.a)
        right = torch.cat([self.u, self.k * self._since_start() * self.a], -1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        self.u, of_state = solved.split([self.u.shape[-1], self.k.shape[-1]], -1)
        remaining, kept = self._remaining().transpose(-2, -1), self._kept()
        states = state.new_empty((state.shape[0], self.u.shape[1] + 1, *state.shape[1:]))
        states[:, 0] = state
        for c in range(self.u.shape[1]):
            self.u[:, c] += of_state[:, c] @ states[:, c]
            torch.addcmul(remaining[:, c] @ self.u[:, c], states[:, c], kept[:, c], out=states[:, c + 1])
        return states[:, :-1], states[:, -1].clone()

    def read(self, entering: Tensor) -> Tensor:
        """What the queries read, (batch, time, heads, value)."""
        inside = self.decays.matrix(self.q, self.k, True) @ self.u
        return self.tokens(inside.add_((self.q * self._since_start()) @ entering))

    def measure(self, entering: Tensor, pairs: bool = False) -> Measured:
        """Bring what is written and what is stored together.

        With ``pairs``, of two tokens' writes the second's ``cross`` leaves the first's out: where the old
        state is far smaller than either, nothing is lost by taking it away again.
        """
        gram = masked(self.u @ self.u.transpose(-2, -1), False)
        between = gram.diagonal(offset=-1, dim1=-2, dim2=-1)[..., ::2]
        first = between.clone()
        if pairs:
            between.zero_()
        since = self._since_start()
        stored = self.decays.gather(gram, self.k).addcmul_(self.u @ entering.transpose(-2, -1), since)
        crossed = stored.mul_(self.k)
        squares = self.u.square().sum(-1, keepdim=True)
        written = self.k.square() * squares
        rows = entering.square().sum(-1, keepdim=True)
        gained = torch.add(written, crossed, alpha=2)
        if pairs:
            gained[..., 1::2, :] += 2 * first[..., None] * self.k[..., 1::2, :] * self.k[..., ::2, :]
        decayed = (since.square() @ rows)[..., 0] + self.decays.total(gained, 2)
        sums = self.u.sum(-1, keepdim=True)
        added = self.k * sums
        entries = (
            (since @ entering.sum(-1, keepdim=True))[..., 0] + self.decays.total(added, 1) + added.sum(-1)
        )
        found = (
            decayed,
            written.sum(-1),
            crossed.sum(-1),
            entries / (entering.shape[-2] * entering.shape[-1]),
        )
        return Measured(*(self.tokens(x[..., None])[..., 0] for x in found))

    def state_after(self, entering: Tensor, token: int) -> Tensor:
        """The state after one token, (batch, heads, key, value)."""
        c, i = divmod(token, self.k.shape[3])
        run, past = self.run[:, c], slice(0, i + 1)
        remaining = (run[:, :, i : i + 1] - run[:, :, past]).to(self.k.dtype).exp() * self.k[:, c, :, past]
        kept = run[:, :, i].to(self.k.dtype).exp()[..., None] * entering[:, c]
        return kept + remaining.transpose(-2, -1) @ self.u[:, c, :, past]

    def tokens(self, x: Tensor) -> Tensor:
        """Bring (b c h i x) back to (batch, time, heads, x) and drop the padding."""
        return x.transpose(2, 3).flatten(1, 2)[:, : self.time]

    def _since_start(self) -> Tensor:
        return self.run.to(self.k.dtype).exp()

    def _remaining(self) -> Tensor:
        """Keys, decayed to the chunk's end."""
        return (self.run[..., -1:, :] - self.run).to(self.k.dtype).exp() * self.k

    def _kept(self) -> Tensor:
        """Decay of the whole chunk, (b c h k 1)."""
        return self.run[..., -1, :, None].to(self.k.dtype).exp()


@dataclass(frozen=True)
class Cut:
    """Cuts a stretch of time into chunks."""

    r: Recurrence
    first: int
    stop: int

    def of_tokens(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Bring (batch, time, heads, x) to (b c h i x), zero in the padding."""
        x = x[:, self.first : self.stop].to(dtype)
        length = self.stop - self.first
        size = min(CHUNK, 1 << (length - 1).bit_length())
        missing = -length % size
        x = pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        return x.unflatten(1, (-1, size)).transpose(2, 3).contiguous()

    def of_groups(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The same of what heads share."""
        return self.of_tokens(x, dtype).repeat_interleave(self.r.heads // self.r.groups, 2)


def passed(state: Tensor, local: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Pass the state through chunks: what each adds, (b c h k v), and how much it keeps, (b c h k 1)."""
    states = local.new_empty((local.shape[0], local.shape[1] + 1, *local.shape[2:]))
    states[:, 0] = state
    for c in range(local.shape[1]):
        torch.addcmul(local[:, c], states[:, c], kept[:, c], out=states[:, c + 1])
    return states[:, :-1], states[:, -1].clone()
