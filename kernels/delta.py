r"""The delta rule in chunks of matrix products (torch): what each token writes, once the past is erased.

With the erase term :math:`a_t k_t (k_t^\top D_t)`, where :math:`D_t = e^{g_t} S_{t-1}` is the decayed state,
token :math:`t` adds one matrix of rank one,

.. math:: U_t = k_t u_t^\top, \qquad u_t = w_t v_t + a_t\, D_t^\top k_t ,

so with :math:`u` in the place of :math:`w v` the recurrence has no erase term left, and all that
:mod:`statescope.kernels.chunked` says holds: outputs, states and their exact norms. In a chunk entered with
:math:`S_{in}`, and with :math:`G` the running sum of the log decay, :math:`u` solves a triangular system,

.. math:: (I - M)\, U = W V + \operatorname{diag}(a_t e^{G_t})\, K S_{in}, \qquad
          M_{tj} = a_t e^{G_t - G_j} (k_t \cdot k_j) \; (j < t) .

Source: *Gated Delta Networks* (arXiv 2412.06464), section 3, where :math:`w_t = \beta_t = -a_t` (the UT
transform of *Parallelizing Linear Transformers with the Delta Rule*, arXiv 2406.06484, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from statescope.recurrence import Recurrence

from .interface import Attribution
from .writes import of_heads, scaled

CHUNK = 64
"""Tokens of one triangular system."""


def written_values(recurrence: Recurrence, dtype: torch.dtype, block: int) -> Tensor:
    """Return the value every token writes, :math:`u_t`, (batch, time, heads, value).

    Parameters
    ----------
    recurrence : Recurrence
        With one decay per head and the delta rule's erase term.
    dtype : torch.dtype
        Arithmetic and result.
    block : int
        Tokens worked on at once.
    """
    r = recurrence
    state = r.start_state(dtype).unflatten(1, (r.groups, -1))
    values = torch.empty(r.v.shape, dtype=dtype, device=r.v.device)
    for first in range(0, r.time, block):
        stop = min(first + block, r.time)
        chunks = _Chunks.split(r, first, stop, dtype)
        own, of_state = chunks.solve(torch.cat([chunks.v, chunks.read], -1)).split([r.value, r.key], -1)
        remaining = chunks.remaining.transpose(-2, -1)
        for c in range(own.shape[1]):
            u = torch.matmul(of_state[:, c], state).add_(own[:, c])
            own[:, c] = u
            state = torch.matmul(remaining[:, c], u).addcmul_(state, chunks.decay[:, c])
        values[:, first:stop] = chunks.tokens(own)
    return values


def erased(recurrence: Recurrence, values: Tensor) -> Tensor:
    """Return what :class:`statescope.kernels.interface.ScanOutput` calls so, (2, batch, time, heads).

    Parameters
    ----------
    recurrence : Recurrence
        With the delta rule's erase term.
    values : Tensor, (batch, time, heads, value)
        The value every token writes; less the one it was given, it is what it erases.
    """
    r, dtype = recurrence, values.dtype
    assert r.a is not None
    key = of_heads(r, r.k.to(dtype).norm(dim=-1))
    return torch.stack([key * (values - scaled(r, dtype)).norm(dim=-1), -r.a.to(dtype) * key.square()])


def probe(
    recurrence: Recurrence,
    state: Tensor,
    query: Tensor,
    after: Tensor | None,
    dtype: torch.dtype,
    block: int,
) -> Attribution:
    r"""Attribute the state at a probe to the writes of earlier tokens, by chunks from the last to the first.

    What survives at the end of its chunk of the key of token ``t`` is row ``t`` of
    :math:`(I - M)^{-\top} \operatorname{diag}(e^{G_{end} - G_t}) K`, and a chunk takes the state that enters
    it through :math:`\Phi = e^{G_{end}} I + P^\top \operatorname{diag}(a_t e^{G_t}) K`, with :math:`P`
    these rows. The query reads what is left of a key as it reads the key itself.

    Parameters
    ----------
    recurrence : Recurrence
        Tokens up to the probe, or an earlier stretch.
    state : Tensor, (batch, heads, key, value)
        The state at the probe.
    query : Tensor, (batch, groups, key)
        The query there.
    after : Tensor, (batch, heads, key, key), optional
        The map from the state at the end of this stretch to that at the probe; the identity if it ends there.
    dtype : torch.dtype
        Arithmetic and results.
    block : int
        Tokens worked on at once.

    Returns
    -------
    Attribution
        As :func:`statescope.kernels.reference.probe`.
    """
    r, state = recurrence, state.to(dtype)
    grouped = state.unflatten(1, (r.groups, -1))
    energy = state.square().sum((-2, -1))
    query = query.to(dtype)[:, :, None, :, None]  # b g 1 k 1, for every head of the group
    output = (query.transpose(-2, -1) @ grouped)[..., 0, :]
    output_norm = output.norm(dim=-1)
    along = (output / output_norm.square()[..., None])[..., None]
    found = torch.empty((5, *r.v.shape[:3]), dtype=dtype, device=r.v.device)
    survives = _identity(r, dtype) if after is None else after.to(dtype).unflatten(1, (r.groups, -1))
    for first, stop, chunks in _from_the_last(r, dtype, block):
        keys = chunks.surviving_keys()
        maps = chunks.maps(keys)
        for c in reversed(range(keys.shape[1])):
            keys[:, c] = torch.matmul(keys[:, c], survives.transpose(-2, -1))
            survives = torch.matmul(survives, maps[:, c])
        read, value_norm = (keys @ query[:, None])[..., 0], chunks.v.norm(dim=-1)
        rows = (
            keys.norm(dim=-1) * value_norm,
            (torch.matmul(keys, grouped[:, None]) * chunks.v).sum(-1),
            read,
            read.abs() * value_norm,
            read * (chunks.v @ along[:, None])[..., 0],
        )
        for row, values in zip(found, rows, strict=True):
            row[:, first:stop] = chunks.tokens(values)
    if r.write_scale is not None:
        found[2] *= r.write_scale.to(dtype)  # the values of the chunks are scaled already
    found[1] /= energy[:, None]
    left = torch.matmul(survives, r.start_state(dtype).unflatten(1, (r.groups, -1)))
    return Attribution._make(
        [
            *found,
            (left * grouped).sum((-2, -1)).flatten(1) / energy,
            ((query.transpose(-2, -1) @ left) @ along)[..., 0, 0].flatten(1),
            output_norm.flatten(1),
        ]
    )


def transition(recurrence: Recurrence, dtype: torch.dtype, block: int) -> Tensor:
    """Return the map from the state before the first token to that after the last."""
    survives = _identity(recurrence, dtype)
    for _, _, chunks in _from_the_last(recurrence, dtype, block):
        maps = chunks.maps(chunks.surviving_keys())
        for c in reversed(range(maps.shape[1])):
            survives = torch.matmul(survives, maps[:, c])
    return survives.flatten(1, 2)


def _identity(r: Recurrence, dtype: torch.dtype) -> Tensor:
    eye = torch.eye(r.key, dtype=dtype, device=r.v.device)
    return eye.expand(r.batch, r.groups, r.heads // r.groups, -1, -1)


def _from_the_last(r: Recurrence, dtype: torch.dtype, block: int) -> Iterator[tuple[int, int, _Chunks]]:
    for first in reversed(range(0, r.time, block)):
        stop = min(first + block, r.time)
        yield first, stop, _Chunks.split(r, first, stop, dtype)


@dataclass(frozen=True, eq=False)
class _Chunks:
    """A stretch of time cut into chunks; the last one padded with tokens that do nothing.

    Letters: b batch, c chunk, g group, h head of a group, i, j token in the chunk, k key, v value.
    """

    time: int
    v: Tensor  # b c g h i v, scaled
    system: Tensor  # b c g h i j: -M below the diagonal
    read: Tensor  # b c g h i k: what each token reads of the entering state, diag(a e^G) K
    remaining: Tensor  # b c g h i k: keys, decayed to the chunk's end
    decay: Tensor  # b c g h 1 1: of the whole chunk

    @classmethod
    def split(cls, r: Recurrence, first: int, stop: int, dtype: torch.dtype) -> _Chunks:
        assert r.a is not None
        size = min(CHUNK, stop - first)
        missing = -(stop - first) % size
        heads = (r.groups, r.heads // r.groups)

        def cut(x: Tensor) -> Tensor:
            x = x[:, first:stop].to(dtype)
            x = pad(x, [0, 0] * (x.ndim - 2) + [0, missing]) if missing else x
            return x.unflatten(1, (-1, size))

        def per_head(x: Tensor) -> Tensor:
            return cut(x).unflatten(3, heads).movedim(2, 4)

        k, a, log_decay, v = cut(r.k).transpose(2, 3), *map(per_head, (r.a, r.log_decay, r.v))
        run = log_decay.double().cumsum(-1)  # in float64: only differences matter
        difference = (run[..., :, None] - run[..., None, :]).to(dtype)
        present = torch.ones(difference.shape[-2:], dtype=torch.bool, device=a.device).tril(-1)
        weights = difference.masked_fill_(~present, -torch.inf).exp_()
        gram = (k @ k.transpose(-2, -1))[:, :, :, None]
        keys = k[:, :, :, None]
        return cls(
            time=stop - first,
            v=v if r.write_scale is None else v * per_head(r.write_scale)[..., None],
            system=weights.mul_(gram).mul_(-a[..., None]),
            read=keys * (a * run.to(dtype).exp())[..., None],
            remaining=keys * (run[..., -1:] - run).to(dtype).exp()[..., None],
            decay=run[..., -1].to(dtype).exp()[..., None, None],
        )

    def solve(self, right: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.system, right, upper=False, unitriangular=True)

    def surviving_keys(self) -> Tensor:
        """What is left of every key at the end of its chunk, (b c g h i k)."""
        transposed = self.system.transpose(-2, -1)
        return torch.linalg.solve_triangular(transposed, self.remaining, upper=True, unitriangular=True)

    def maps(self, surviving_keys: Tensor) -> Tensor:
        """How each chunk takes the state that enters it to the one that leaves, (b c g h k k)."""
        maps = surviving_keys.transpose(-2, -1) @ self.read
        maps.diagonal(dim1=-2, dim2=-1).add_(self.decay[..., 0])
        return maps

    def tokens(self, x: Tensor) -> Tensor:
        """Bring (b c g h i ...) back to (batch, time, heads, ...) and drop the padding."""
        return x.movedim(4, 2).flatten(3, 4).flatten(1, 2)[:, : self.time]
