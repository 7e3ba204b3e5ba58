"""What to keep of a trace."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Probes:
    """Positions whose state is attributed to the tokens that made it.

    Where a model erases (the delta rule), what survives is counted of the value each token was given; what it
    erased is missing from the tokens before it. So the shares sum to 1 there too, and the contribution of the
    last token is the norm of its value as written, not ``write_norm``, which is that of the correction. What
    the probe's query reads is attributed in the same way; the skip term, which bypasses the state, is not.

    Parameters
    ----------
    positions : sequence of int
        Tokens after which the state is taken apart; negative ones count from the end.
    reach : int, optional
        How many tokens, up to and including the probe, get a contribution and a share of their own;
        all before them are summed in ``share_before`` (``output_share_before``). Default: every token. A
        reach that goes back
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
