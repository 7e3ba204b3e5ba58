r"""The recurrence in chunks of matrix products (torch).

With :math:`G` the running sum of the log decay inside a chunk and :math:`S_{in}` the state that
enters it, any row vector :math:`c_t` reads the past as

.. math:: S_t^\top c_t = e^{G_t} S_{in}^\top c_t + \sum_{j \le t} e^{G_t - G_j} w_j (c_t \cdot k_j) v_j .

The query gives the output; the *key* gives the overlap of a write with the decayed state,
:math:`\langle D_t, U_t \rangle = w_t\, v_t \cdot (D_t^\top k_t)`, and with it the exact norm of every
state without any of them in memory:

.. math:: |S_t|^2 = e^{2 g_t} |S_{t-1}|^2 + 2 \langle D_t, U_t \rangle + |U_t|^2 .

The norm restarts from :math:`S_{in}` in every chunk, so its error does not build up. The delta rule is
brought to this form by :mod:`statescope.kernels.delta`. Decay per key is for :mod:`statescope.kernels.keyed`,
other erase terms are for :mod:`statescope.kernels.erasing`, decay per entry is for
:mod:`statescope.kernels.stepped`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from statescope.recurrence import Recurrence

from . import delta, erasing, keyed, reference, stepped
from .interface import Attribution, ScanOutput, Steps

CHUNK, NARROW_CHUNK = 64, 32
"""Tokens of one matrix product; the narrow one for up to 32 keys, where states are cheap to pass on."""

ROWS = {"cpu": 2**12, "cuda": 2**19}
"""Tokens times heads times sequences worked on at once, by device: bounds the memory whatever the length.

On a CPU the work stays in the caches, and under the size from which the allocator returns memory each time.
"""


def supports(recurrence: Recurrence) -> str | None:
    """Return None: every structure is served."""
    return None


def scan(
    recurrence: Recurrence,
    *,
    outputs: bool = True,
    measure: bool = True,
    positions: Sequence[int] = (),
) -> ScanOutput:
    """Run the recurrence in float32 (float64 for float64 input).

    Parameters
    ----------
    recurrence : Recurrence
        What to run.
    outputs, measure : bool
        Whether to compute ``y`` and ``steps``.
    positions : sequence of int
        Tokens after which the state is kept.
    """
    dtype = _working_dtype(recurrence)
    if recurrence.erases or not recurrence.scalar_decay:
        return _of_structure(recurrence, outputs, measure, positions, dtype)
    start = state = recurrence.start_state(dtype)
    y = torch.empty(recurrence.v.shape, dtype=dtype, device=state.device) if outputs else None
    steps: list[Steps] = []
    kept: dict[int, Tensor] = {}
    block = block_tokens(recurrence)
    for first in range(0, recurrence.time, block):
        stop = min(first + block, recurrence.time)
        chunks = _Chunks.split(recurrence, first, stop, dtype)
        entering, state = chunks.pass_states(state)
        measured = chunks.read(entering, None if y is None else y[:, first:stop], measure, recurrence.skip)
        if measured is not None:
            steps.append(measured)
        for p in positions:
            if first <= p < stop:
                kept[p] = chunks.state_after(entering, p - first)
    if not torch.isfinite(state).logical_or(~torch.isfinite(start)).all():
        # A matrix product spreads a NaN to earlier tokens of its chunk (0 * NaN is NaN); stepping does not.
        return reference.scan(recurrence, outputs=outputs, measure=measure, positions=positions, dtype=dtype)
    return ScanOutput(
        y=y,
        steps=Steps.concatenate(steps) if measure else None,
        states=torch.stack([kept[p] for p in positions], 1) if positions else state[:, None][:, :0],
        final_state=state,
    )


def _of_structure(
    r: Recurrence, outputs: bool, measure: bool, positions: Sequence[int], dtype: torch.dtype
) -> ScanOutput:
    """Pass a recurrence on whose keys or entries decay, or that erases."""
    asked: dict[str, Any] = {"outputs": outputs, "measure": measure, "positions": positions}
    served = r.delta_rule or not r.erases
    if r.log_decay.ndim == 5 and served:
        return stepped.scan(r, dtype, **asked)
    if r.log_decay.ndim == 5:
        return reference.scan(r, dtype=dtype, **asked)
    if r.scalar_decay and r.delta_rule:
        found = _delta_rule(r, dtype, asked)
    else:
        found = (keyed if served else erasing).scan(r, dtype, **asked)
    if found is None and served and not r.scalar_decay:  # a NaN: none may reach an earlier token
        return stepped.scan(r, dtype, **asked)
    return reference.scan(r, dtype=dtype, **asked) if found is None else found


def _delta_rule(r: Recurrence, dtype: torch.dtype, asked: dict[str, Any]) -> ScanOutput | None:
    """Solve for what is written; what is left erases nothing."""
    values = delta.written_values(r, dtype, block_tokens(r))
    if not torch.isfinite(values).all():
        return None
    found = scan(r.replace(v=values, write_scale=None, a=None, skip=None), **asked)
    y = None if found.y is None else _with_skip(r, found.y)
    erased = delta.erased(r, values) if asked["measure"] else None
    return ScanOutput(y, found.steps, found.states, found.final_state, erased)


def probe(recurrence: Recurrence, state: Tensor, query: Tensor, after: Tensor | None = None) -> Attribution:
    r"""Attribute the state at a probe, and what the query reads of it, to the writes of earlier tokens.

    With one decay per head, ``contribution`` :math:`= e^{G_p - G_t} |U_t|`, ``share`` :math:`= e^{G_p -
    G_t} w_t\, k_t^\top S_p v_t / |S_p|^2` and ``attention`` :math:`= e^{G_p - G_t} w_t\, k_t \cdot q_p`;
    other structures as :func:`statescope.kernels.reference.probe`.

    Parameters
    ----------
    recurrence : Recurrence
        Tokens up to the probe, or an earlier stretch.
    state : Tensor, (batch, heads, key, value)
        The state at the probe.
    query : Tensor, (batch, groups, key)
        The query there.
    after : Tensor, optional
        What happens from the end of this stretch to the probe; as there.
    """
    dtype = _working_dtype(recurrence)
    if recurrence.scalar_decay and recurrence.delta_rule:
        return delta.probe(recurrence, state, query, after, dtype, block_tokens(recurrence))
    if recurrence.erases and recurrence.log_decay.ndim == 5:
        return reference.probe(recurrence, state, query, after, dtype=dtype)
    if recurrence.erases or not recurrence.scalar_decay:
        kernel = erasing if recurrence.erases else stepped if recurrence.log_decay.ndim == 5 else keyed
        return kernel.probe(recurrence, state, query, after, dtype)
    r = recurrence.to(dtype)
    state, query = state.to(dtype), query.to(dtype)
    after = torch.zeros_like(r.v[:, 0, :, 0]) if after is None else after.to(dtype)
    # Summed from the end, so that what lies near the probe keeps its precision.
    decay = r.log_decay.flip(1).cumsum(1).flip(1)
    survives = (pad(decay[:, 1:], (0, 0, 0, 1)) + after[:, None]).exp()
    if r.write_scale is not None:
        survives = survives * r.write_scale
    energy = state.square().sum((-2, -1))
    heads_per_group = r.heads // r.groups
    grouped = state.unflatten(1, (r.groups, heads_per_group)).transpose(2, 3).flatten(3)
    read = torch.einsum("btgk,bgkx->btgx", r.k, grouped).unflatten(-1, (heads_per_group, r.value))
    share = survives * (read.flatten(2, 3) * r.v).sum(-1) / energy[:, None]
    key_norm, read_key = r.k.norm(dim=-1), torch.einsum("btgk,bgk->btg", r.k, query)
    key_norm, read_key = (x.repeat_interleave(heads_per_group, -1) for x in (key_norm, read_key))
    value_norm = r.v.norm(dim=-1)
    attention = survives * read_key
    query = query.repeat_interleave(heads_per_group, 1)[:, :, None]
    output = (query @ state)[:, :, 0]
    output_norm = output.norm(dim=-1)
    along = output / output_norm.square()[..., None]
    start, left = r.start_state(dtype), (decay[:, 0] + after).exp()
    return Attribution(
        contribution=survives.abs() * key_norm * value_norm,
        share=share,
        attention=attention,
        output_contribution=attention.abs() * value_norm,
        output_share=attention * torch.einsum("bthv,bhv->bth", r.v, along),
        share_before=left * (start * state).sum((-2, -1)) / energy,
        output_share_before=left * ((query @ start)[:, :, 0] * along).sum(-1),
        output_norm=output_norm,
    )


def transition(recurrence: Recurrence) -> Tensor:
    """How a recurrence that erases maps the state; see :func:`statescope.kernels.reference.transition`."""
    dtype = _working_dtype(recurrence)
    if recurrence.scalar_decay and recurrence.delta_rule:
        return delta.transition(recurrence, dtype, block_tokens(recurrence))
    if recurrence.erases and recurrence.log_decay.ndim < 5:
        return erasing.transition(recurrence, dtype)
    return reference.transition(recurrence, dtype=dtype)


def _with_skip(recurrence: Recurrence, y: Tensor) -> Tensor:
    if recurrence.skip is None:
        return y
    return y.addcmul_(recurrence.v.to(y.dtype), recurrence.skip.to(y.dtype)[:, None])


def block_tokens(recurrence: Recurrence) -> int:
    """Tokens worked on at once, whole chunks."""
    rows = ROWS["cuda" if recurrence.v.is_cuda else "cpu"]
    chunk = _chunk_tokens(recurrence)
    return chunk * max(1, rows // (recurrence.batch * recurrence.heads * chunk))


def _chunk_tokens(recurrence: Recurrence) -> int:
    return NARROW_CHUNK if recurrence.key <= NARROW_CHUNK else CHUNK


def _working_dtype(recurrence: Recurrence) -> torch.dtype:
    return torch.float64 if recurrence.v.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class _Chunks:
    """A stretch of time cut into chunks; the last one padded with tokens that do nothing.

    Letters: b batch, c chunk, i token in the chunk, g group, h head of a group, k key, v value.
    """

    time: int
    q: Tensor  # b c g i k
    k: Tensor  # b c g i k
    v: Tensor  # b c g h i v
    values: Tensor  # b c g h i v, as they are written
    log_decay: Tensor  # b c g h i
    run: Tensor  # b c g h i, float64: the running sum of log_decay / log 2, of which only differences matter

    @classmethod
    def split(cls, r: Recurrence, first: int, stop: int, dtype: torch.dtype) -> _Chunks:
        length = stop - first
        size = min(_chunk_tokens(r), length)
        missing = -length % size
        heads = (r.groups, r.heads // r.groups)

        def cut(x: Tensor) -> Tensor:
            x = x[:, first:stop].to(dtype)
            x = pad(x, [0, 0] * (x.ndim - 2) + [0, missing]) if missing else x
            return x.unflatten(1, (-1, size))

        def per_head(x: Tensor) -> Tensor:
            return cut(x).unflatten(-1, heads).movedim(2, -1).contiguous()

        log_decay, v = per_head(r.log_decay), cut(r.v).unflatten(3, heads).movedim(2, 4).contiguous()
        return cls(
            time=length,
            q=cut(r.q).transpose(2, 3).contiguous(),
            k=cut(r.k).transpose(2, 3).contiguous(),
            v=v,
            values=v if r.write_scale is None else v * per_head(r.write_scale)[..., None],
            log_decay=log_decay,
            run=(log_decay.double() / math.log(2)).cumsum(-1),
        )

    def pass_states(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state entering every chunk, (b c g k h v), and the one leaving the last."""
        groups, heads, size, value = self.v.shape[2:]
        remaining = _power(self.run[..., -1:] - self.run, self.v)[..., None]
        written = self.v.new_empty((*self.v.shape[:2], groups, size, heads, value))
        torch.mul(self.values, remaining, out=written.transpose(3, 4))
        local = self.k.transpose(-2, -1) @ written.flatten(4)
        decay = _power(self.run[..., -1], self.v)[..., None, :, None]
        decay = decay.expand(-1, -1, -1, -1, -1, value).flatten(4)  # long rows are quick to walk
        states = local.new_empty((local.shape[0], local.shape[1] + 1, *local.shape[2:]))
        states[:, 0] = state.unflatten(1, (groups, heads)).transpose(2, 3).flatten(3)
        for c in range(local.shape[1]):
            torch.addcmul(local[:, c], states[:, c], decay[:, c], out=states[:, c + 1])
        states = states.unflatten(-1, (heads, -1))
        return states[:, :-1], states[:, -1].transpose(2, 3).flatten(1, 2).contiguous()

    def read(self, entering: Tensor, y: Tensor | None, measure: bool, skip: Tensor | None) -> Steps | None:
        """Read the past with the query, into ``y``, and with the key, for the measurements."""
        difference = (self.run[..., :, None] - self.run[..., None, :]).to(self.v)
        future = torch.full_like(difference[0, 0, 0, 0], -torch.inf).triu(1)
        weights = difference.add_(future).exp2_()  # b c g h i j
        if y is not None:
            read = self._past(self.q, weights, entering)
            if skip is not None:
                read.addcmul_(self.v, skip.to(read).view(*read.shape[2:4], 1, 1))
            self._write(y, read)
        return self._measure(weights, entering) if measure else None

    def _past(self, rows: Tensor, weights: Tensor, entering: Tensor, strictly: bool = False) -> Tensor:
        """What each row vector reads from the entering state and from this chunk, (b c g h i v)."""
        across = (rows @ entering.flatten(4)).unflatten(-1, entering.shape[4:]).transpose(3, 4)
        past = torch.mul(across, self._decay()[..., None], out=across.new_empty(self.v.shape))
        inside = (rows @ self.k.transpose(-2, -1))[:, :, :, None] * weights
        if strictly:
            inside.diagonal(dim1=-2, dim2=-1).zero_()
        past.flatten(0, 3).baddbmm_(inside.flatten(0, 3), self.values.flatten(0, 3))
        return past

    def _measure(self, weights: Tensor, entering: Tensor) -> Steps:
        """Turn what the keys read into the norm of every state; overwrites the weights."""
        cross = (self._past(self.k, weights, entering, strictly=True) * self.values).sum(-1)
        write = self.k.norm(dim=-1)[:, :, :, None] * self.values.norm(dim=-1)
        decay = self._decay()
        mean_written = self.k.mean(-1)[:, :, :, None] * self.values.mean(-1)
        mean = decay * entering.mean((3, 5))[..., None] + _accumulate(weights, mean_written)
        norm_in = entering.square().sum((3, 5)).sqrt()[..., None]
        energy = (decay * norm_in).square() + _accumulate(weights.square_(), 2 * cross + write.square())
        norm = energy.clamp(min=0).sqrt()
        before = torch.cat([norm_in, norm[..., :-1]], -1) * self.log_decay.exp()
        scale = before * write
        overlap = torch.where(scale == 0, torch.zeros_like(scale), cross / scale).clamp(-1, 1)
        fields = (self.log_decay, write, norm, mean, overlap)
        return Steps(*(self._tokens(x[..., None])[..., 0] for x in fields))

    def _decay(self) -> Tensor:
        """Decay of the entering state up to every token."""
        return _power(self.run, self.v)

    def _tokens(self, x: Tensor) -> Tensor:
        """Bring (b c g h i x) back to (batch, time, heads, x) and drop the padding."""
        x = x.permute(0, 1, 4, 2, 3, 5)
        return x.reshape(x.shape[0], -1, x.shape[3] * x.shape[4], x.shape[5])[:, : self.time]

    def _write(self, y: Tensor, x: Tensor) -> None:
        """Write (b c g h i v) into (batch, time, heads, v), in one copy where nothing is padded."""
        chunks, groups, heads, size = x.shape[1:5]
        if chunks * size == self.time:
            y.unflatten(2, (groups, heads)).unflatten(1, (chunks, size)).copy_(x.permute(0, 1, 4, 2, 3, 5))
        else:
            y.copy_(self._tokens(x))

    def state_after(self, entering: Tensor, token: int) -> Tensor:
        """The state after one token, (batch, heads, key, value)."""
        c, i = divmod(token, self.k.shape[3])
        run = self.run[:, c]
        remaining = _power(run[..., i : i + 1] - run[..., : i + 1], self.v)
        written = torch.einsum(
            "bgik,bghi,bghiv->bghkv", self.k[:, c, :, : i + 1], remaining, self.values[:, c, ..., : i + 1, :]
        )
        kept = _power(run[..., i], self.v)[..., None, None] * entering[:, c].transpose(2, 3)
        return (kept + written).flatten(1, 2)


def _power(exponent: Tensor, like: Tensor) -> Tensor:
    """Two to a power. What underflows takes torch's ``exp`` on a CPU up to a hundred times as long."""
    return exponent.to(like.dtype).exp2()


def _accumulate(weights: Tensor, amounts: Tensor) -> Tensor:
    """Sum amounts over the past, each with its decay."""
    return (weights * amounts[..., None, :]).sum(-1)
