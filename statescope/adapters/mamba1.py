r"""Mamba-1 (arXiv 2312.00752, eq. 2 and algorithm 2), a diagonal state space for every channel.

.. math::

    h_t = e^{\Delta_t A} \circ h_{t-1} + \Delta_t x_t\, B_t, \qquad y_t = C_t^\top h_t + D x_t

with :math:`h`, :math:`A`, :math:`B` and :math:`C` over ``d_state`` and all else one number per channel.
:math:`B` and :math:`C` are shared by all channels, so :data:`CHANNELS` of them, side by side, make a head
with a state of (key = d_state, value = channels), as Mamba-2 has by construction. In the terms of
:class:`~statescope.recurrence.Recurrence`: :math:`g_{nc} = \Delta_c A_{cn}`, one number per entry, which
stays a product (:mod:`statescope.kernels.rates`), :math:`k = B`, :math:`v_c = \Delta_c x_c`, :math:`q = C`.
A head's norms are those of its channels in quadrature, its mean and log decay their means. The skip
:math:`D x` and the gate belong to the model's output and not to the recurrence.

Neither transformers' nor mamba_ssm's mixers pass an initial state to the scan: a text read in several parts
would lose its state between them, in silence. What the state adds is linear in it, and is added here,
exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from statescope.adapters.interface import Adapter, Call
from statescope.kernels.interface import ScanOutput
from statescope.kernels.rates import Rated
from statescope.recurrence import Recurrence

MODELS = ("mamba", "falcon_mamba", "jamba", "zamba")

CHANNELS = 64
"""Channels of a head, where their number allows it: else its largest divisor below."""

ENTRIES = 2**24
"""Entries of the states worked on at once when a lost state is added."""


def read_selective_scan(
    mirror_dtype: bool,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    entering: Tensor | None = None,
    **others: Any,
) -> Call:
    """Read ``mamba_selective_scan``: a stretch of tokens.

    Shapes as transformers passes them: ``hidden_states``, ``dt`` and the gate ``z`` (batch, channel, time),
    ``A`` (channel, d_state), ``B`` and ``C`` (batch, d_state, time), ``D`` and ``delta_bias`` (channel,).
    ``entering`` (batch, channel, d_state) is the state from before, of which the function is not told.
    """
    unknown = sorted(name for name, value in others.items() if value is not None)
    if unknown:  # a state among them would be added twice
        raise ValueError(f"the model's scan was given {', '.join(unknown)}, which this adapter does not know")
    step = _step_size(dt, delta_bias, delta_softplus, mirror_dtype)
    state = None if entering is None else _to_heads(entering)
    recurrence = _recurrence(hidden_states.transpose(1, 2), step.transpose(1, 2), A, B, C, state)
    gate = 1.0 if z is None else silu(z.float())

    def answer(output: ScanOutput) -> Any:
        assert output.y is not None
        y = output.y.flatten(2).transpose(1, 2)
        y = y if D is None else y + hidden_states.to(y.dtype) * D.to(y.dtype)[:, None]
        y = (y * gate).to(hidden_states.dtype)
        return (y, _to_channels(output.final_state).float()) if return_last_state else y

    def complete(own: Any) -> Any:
        y, last = own if return_last_state else (own, None)
        missing, final = _survival(recurrence)
        y = (y.float() + missing.flatten(2).transpose(1, 2) * gate).to(y.dtype)
        return y if last is None else (y, last + _to_channels(final).to(last.dtype))

    return Call(recurrence, answer, complete=None if entering is None else complete)


def read_selective_scan_fn(
    _: bool,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    entering: Tensor | None = None,
) -> Call:
    """Read ``selective_scan_fn`` of mamba_ssm: a stretch of tokens.

    Shapes as for :func:`read_selective_scan`. It always works in float32 and answers in the dtype of ``u``.
    """
    gates = {"D": D, "z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
    last = {"return_last_state": return_last_state, "entering": entering}
    return read_selective_scan(False, u, delta, A, B, C, **gates, **last)  # type: ignore[arg-type]


def read_state_update(
    mirror_dtype: bool,
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    **_: Any,
) -> Call:
    """Read ``mamba_selective_state_update``: one token, the state updated in place.

    Shapes as transformers passes them: ``state`` (batch, channel, d_state), ``hidden_states``, ``dt`` and
    ``z`` (batch, channel), ``A`` (channel, d_state), ``B`` and ``C`` (batch, d_state), ``D`` and ``dt_bias``
    (channel,).
    """
    step = _step_size(dt[..., None], dt_bias, dt_softplus, mirror_dtype).transpose(1, 2)
    recurrence = _recurrence(hidden_states[:, None], step, A, B[..., None], C[..., None], _to_heads(state))

    def answer(output: ScanOutput) -> Tensor:
        assert output.y is not None
        state.copy_(_to_channels(output.final_state))
        y = output.y[:, 0].flatten(1)
        y = y if D is None else y + hidden_states.to(y.dtype) * D.to(y.dtype)
        y = y if z is None else y * silu(z.to(y.dtype))
        return y.to(hidden_states.dtype)

    return Call(recurrence, answer)


def _step_size(dt: Tensor, bias: Tensor | None, use_softplus: bool, mirror_dtype: bool) -> Tensor:
    """Step sizes, (batch, channel, time), float32."""
    dt = dt if mirror_dtype else dt.float()
    dt = dt if bias is None else dt + bias.to(dt.dtype)[:, None]
    return (softplus(dt) if use_softplus else dt).float()


def _recurrence(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> Recurrence:
    """Gather channels to heads; ``x`` and ``step`` are (batch, time, channel)."""
    if B.ndim != 3 or C.ndim != 3:
        raise ValueError(
            f"the scan was called with B {tuple(B.shape)} and C {tuple(C.shape)}; expected (batch, d_state,"
            " time), one vector a token for all channels"
        )
    heads = (-1, channels_of_a_head(len(A)))
    rates = A.float().T.unflatten(1, heads).transpose(0, 1)  # head, key, value
    return Recurrence(
        q=C.transpose(1, 2)[:, :, None],
        k=B.transpose(1, 2)[:, :, None],
        v=(step * x.float()).unflatten(2, heads),
        log_decay=Rated(step.unflatten(2, heads), rates),
        initial_state=state,
    )


def channels_of_a_head(channels: int) -> int:
    """How many channels make a head: :data:`CHANNELS`, or the largest divisor of their number below."""
    return max(n for n in range(1, min(channels, CHANNELS) + 1) if channels % n == 0)


def _to_heads(state: Tensor) -> Tensor:
    """(batch, channel, d_state) to (batch, head, key, value)."""
    return state.unflatten(1, (-1, channels_of_a_head(state.shape[1]))).transpose(2, 3)


def _to_channels(state: Tensor) -> Tensor:
    return state.transpose(2, 3).flatten(1, 2)


def _survival(r: Recurrence) -> tuple[Tensor, Tensor]:
    """What the initial state adds to every output, (batch, time, head, value), and to the final state."""
    state = r.start_state(torch.float32)
    missing = torch.empty(r.v.shape, dtype=state.dtype, device=state.device)
    for first, stop in _blocks(r):
        survives = r.log_decay[:, first:stop].cumsum(1).exp_() * state[:, None]
        missing[:, first:stop] = (r.q[:, first:stop, :, None].to(state.dtype) @ survives)[:, :, :, 0]
        state = survives[:, -1]
    return missing, state


def _blocks(r: Recurrence) -> Iterator[tuple[int, int]]:
    block = max(1, ENTRIES // (r.batch * r.heads * r.key * r.value))
    return ((first, min(first + block, r.time)) for first in range(0, r.time, block))


GROUPS = "n_mamba_heads"
"""Name of zamba's number of groups of channels, each scanned on its own."""

SELECTIVE_SCAN_FN = Adapter(
    "selective_scan_fn",
    "Mamba-1 of mamba_ssm",
    ("MambaLMHeadModel with layer Mamba1",),
    "decay per entry",
    read_selective_scan_fn,
    forgets=True,
    note="state repaired between segments; with attention layers in one segment only",
)
_KIND = ("Mamba-1 of transformers", MODELS, "decay per entry")
_NOTE = "state repaired between segments; zamba's layers run twice"

SELECTIVE_SCAN = Adapter(
    "mamba_selective_scan", *_KIND, read_selective_scan, forgets=True, parts=GROUPS, note=_NOTE
)
SELECTIVE_UPDATE = Adapter(
    "mamba_selective_state_update", *_KIND, read_state_update, parts=GROUPS, note=_NOTE
)
