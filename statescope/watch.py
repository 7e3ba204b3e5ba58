"""What to keep of a trace."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from statescope.kernels.interface import Steps


@dataclass(frozen=True)
class Probes:
    """Positions whose state is attributed to the tokens that made it.

    Where a model erases (the delta rule), what survives is counted of the value each token was given; what it
    erased is missing from the tokens before it. So the shares sum to 1 there too, and the contribution of the
    last token is the norm of its value as written, not ``write_norm``, which is that of the correction.

    Parameters
    ----------
    positions : sequence of int
        Tokens after which the state is taken apart; negative ones count from the end.
    reach : int, optional
        How many tokens, up to and including the probe, get a contribution and a share of their own;
        all before them are summed in ``share_before``. Default: every token. A reach that goes back
        beyond the segment the probe lies in costs one more reading of the text, ahead of the trace.
    """

    positions: Sequence[int]
    reach: int | None = None


@dataclass(frozen=True)
class Watch:
    """What to keep, resolved against a model and a text: no defaults, no negative positions."""

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    snapshots: tuple[int, ...]
    probes: tuple[int, ...]
    reach: int
    window: int

    @classmethod
    def resolve(
        cls,
        *,
        tokens: int,
        model_layers: Sequence[int],
        model_heads: int,
        layers: Iterable[int] | int | None = None,
        heads: Iterable[int] | int | None = None,
        snapshots: Iterable[int] | int | None = None,
        probes: Iterable[int] | int | Probes | None = None,
        window: int = 1,
    ) -> Watch:
        """Check what was asked for against what there is.

        Raises
        ------
        ValueError
            Names the argument, what was given and what there is.
        """
        if not isinstance(probes, Probes):
            probes = Probes(_integers("probes", probes))
        reach = tokens if probes.reach is None else probes.reach
        if not isinstance(reach, int) or reach < 1:
            raise ValueError(f"probes has reach={reach!r}; expected 1 token or more, or None for all")
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ValueError(f"window={window!r}; expected a number of tokens, 1 or more")
        return cls(
            layers=_choose("layers", layers, model_layers),
            heads=_choose("heads", heads, range(model_heads)),
            snapshots=_positions("snapshots", _integers("snapshots", snapshots), tokens),
            probes=_positions("probes", _integers("probes", probes.positions), tokens),
            reach=min(reach, tokens),
            window=window,
        )

    def to_json(self) -> str:
        """Write as JSON, as the record's ``watch`` attribute."""
        return json.dumps(asdict(self))

    def probe_start(self, probe: int) -> int:
        """First token with a share of its own at a probe."""
        return max(0, probe - self.reach + 1)


def _integers(name: str, given: Any) -> list[int]:
    if given is None:
        return []
    items = list(given) if isinstance(given, Iterable) else [given]
    for item in items:
        if isinstance(item, bool) or not hasattr(item, "__index__"):
            raise ValueError(f"{name} holds {item!r}; expected integers")
    return [int(item) for item in items]


def _choose(name: str, given: Any, available: Sequence[int]) -> tuple[int, ...]:
    chosen = list(available) if given is None else _integers(name, given)
    unknown = sorted(set(chosen) - set(available))
    if unknown or not chosen:
        what = f"{name[:-1]} {unknown[0]}" if unknown else f"no {name[:-1]}"
        raise ValueError(f"{name} names {what}; this model records {name} {_span(available)}")
    return tuple(sorted(set(chosen)))


def _span(available: Sequence[int]) -> str:
    items = list(available)
    if items == list(range(items[0], items[-1] + 1)):
        return f"{items[0]} to {items[-1]}"
    return ", ".join(map(str, items))


def _positions(name: str, given: Sequence[int], tokens: int) -> tuple[int, ...]:
    for position in given:
        if not -tokens <= position < tokens:
            raise ValueError(f"{name} names position {position}; the text has tokens 0 to {tokens - 1}")
    return tuple(sorted({position % tokens for position in given}))


def thin(steps: Steps, window: int) -> dict[str, Tensor]:
    r"""Keep one entry for every ``window`` tokens, on the device the measurements are on.

    Over the tokens :math:`t` of a window: :math:`\sum \log\alpha_t` (so that retention stays exact);
    ``state_norm`` and ``state_mean`` at the last token; ``state_norm_max``; ``write_norm``
    :math:`= \sqrt{\sum |U_t|^2}`; ``write_overlap`` :math:`= \sum |U_t|^2 c_t / \sum |U_t|^2`, the mean
    cosine :math:`c_t` weighted by energy. A last window may be shorter.

    Parameters
    ----------
    steps : Steps
        Measurements of consecutive tokens, beginning at a window's first token.
    window : int
        Tokens of one entry; 1 keeps everything.

    Returns
    -------
    dict of str to Tensor, (batch, ceil(time / window), heads)
        By the variables' names in the record.
    """
    fields = {name: getattr(steps, name) for name in Steps.__dataclass_fields__}
    if window == 1:
        return fields
    time = steps.log_decay.shape[1]
    last = torch.arange(window - 1, time + window - 1, window, device=steps.log_decay.device)
    last = last.clamp(max=time - 1)
    energy = steps.write_norm.double().square()
    total = _sums(energy, window)
    weighted = _sums(energy * steps.write_overlap, window)
    overlap = torch.where(total == 0, torch.zeros_like(total), weighted / total)
    return {
        "log_decay": _sums(steps.log_decay.double(), window).to(steps.log_decay.dtype),
        "write_norm": total.sqrt().to(steps.write_norm.dtype),
        "state_norm": steps.state_norm[:, last],
        "state_mean": steps.state_mean[:, last],
        "write_overlap": overlap.to(steps.write_overlap.dtype),
        "state_norm_max": _windows(steps.state_norm, window, -torch.inf).amax(2),
    }


def at_rest(steps: Steps, lengths: Tensor) -> Steps:
    """Let nothing happen after the end of each sequence, so that windows close as if it ended there.

    Parameters
    ----------
    steps : Steps
        Measurements from the first token on, (batch, time, heads).
    lengths : Tensor, (batch,)
        Tokens before the padding.
    """
    token = torch.arange(steps.log_decay.shape[1], device=lengths.device)[None]
    padding = (token >= lengths[:, None])[..., None]
    last = torch.minimum(token, lengths[:, None] - 1)[..., None]
    nothing = {
        n: getattr(steps, n).masked_fill(padding, 0) for n in ("log_decay", "write_norm", "write_overlap")
    }
    stays = {n: getattr(steps, n) for n in ("state_norm", "state_mean")}
    return Steps(**nothing, **{n: x.gather(1, last.expand_as(x)) for n, x in stays.items()})


def _windows(x: Tensor, window: int, fill: float) -> Tensor:
    missing = -x.shape[1] % window
    return torch.nn.functional.pad(x, (0, 0, 0, missing), value=fill).unflatten(1, (-1, window))


def _sums(x: Tensor, window: int) -> Tensor:
    return _windows(x, window, 0.0).sum(2)
