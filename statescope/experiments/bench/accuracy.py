"""Errors of the kernel that would be timed, and of its peer, against float64 stepping of the same inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from statescope.experiments.bench.apart import Apart, Here, Lost, reason
from statescope.experiments.bench.settings import Settings
from statescope.experiments.bench.subjects import Shape, as_recurrence, draw, mamba_ssm_scan
from statescope.experiments.bench.timing import is_gpu
from statescope.kernels import chunked, reference
from statescope.kernels.interface import ScanOutput, Steps
from statescope.models import as_dtype
from statescope.recurrence import Recurrence
from statescope.scan import choose, scan

STEPPED = 10_000
"""Tokens stepped in float64; beyond, the truth is chunked in float64, itself held against stepping."""

REPEATED = 1000
"""Tokens at the end of the longest text that are stepped as well, to hold the chunked truth against."""

STRETCH = 16384
"""Tokens whose float64 copy is in memory at once on the way to the tail of a long text."""


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield errors by length and dtype, then errors in the tails of long texts, ours and the peer's."""
    # One configuration of mamba_ssm's kernels at once: nothing is timed here, and tuning takes minutes.
    where = Apart({"MAMBA_DETERMINISTIC": "1"}) if settings.gpu else Here()
    with where as work:
        small = Shape(1, 0, 8 if settings.gpu else 4)
        common = {"device": settings.device, "shape": vars(small), "lengths": list(settings.accuracy)}
        about = {"check": "lengths", "heads": small.heads, "value": small.value, "key": small.key}
        yield about | _call(work, f"{__name__}.by_length", **common)
        for tokens in settings.tails:
            for who in ("statescope", "mamba_ssm"):
                shape = Shape(1, 0, 80 if settings.gpu else 4)
                about = {"check": "tail", "who": who, "tokens": tokens, "tail": settings.tail}
                about |= {"heads": shape.heads, "value": shape.value, "key": shape.key}
                job = {"tokens": tokens, "tail": settings.tail, "who": who, "shape": vars(shape)}
                yield about | _call(
                    work, f"{__name__}.in_tail", **job, device=settings.device, dtype=settings.dtype
                )


def describe(entry: dict[str, Any]) -> Iterator[str]:
    """Put an entry into words."""
    heads = f"{entry['heads']} x {entry['value']} x {entry['key']}"
    if entry["check"] == "lengths":
        yield f"errors against float64, {heads}" + (
            f": skipped: {entry['skipped']}" if "skipped" in entry else f" (truth: {entry['truth']})"
        )
        for row in entry.get("rows", []):
            yield f"{row['tokens']:>9,} tokens, {row['dtype']}, {row['kernel']}: {_listed(row['errors'])}"
            if "mamba_ssm" in row:
                peer = row["mamba_ssm"]
                yield " " * 18 + f"mamba_ssm: {peer.get('skipped') or _listed(peer)}"
        return
    found = entry.get("skipped") or _listed(entry["errors"])
    yield f"last {entry['tail']:,} of {entry['tokens']:,} tokens, {heads}, {entry['who']}: {found}"


def by_length(device: str, shape: dict[str, int], lengths: Sequence[int]) -> dict[str, Any]:
    """Hold the kernel against float64 at several lengths of one text, in bfloat16 and float32."""
    longest = max(lengths)
    dtypes = (torch.bfloat16, torch.float32)
    calls = [draw(Shape(**shape), longest, device, dtype) for dtype in dtypes]
    recurrences = [as_recurrence(call) for call in calls]
    truth = Truth.of(recurrences, lengths)
    found = []
    for i, dtype in enumerate(dtypes):
        for tokens in lengths:
            r = recurrences[i].between(0, tokens, None)
            got, want = scan(r), truth.prefix(i, tokens)
            row = {"tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "kernel": choose(r)}
            row["errors"] = errors(got, want)
            if dtype == torch.bfloat16 and tokens in (1000, STEPPED):
                row["mamba_ssm"] = peer_error(calls[i], tokens, want)
            found.append(row)
    return {"truth": truth.said, "chunked_against_stepping": truth.chunked_against_stepping, "rows": found}


def in_tail(
    tokens: int, tail: int, who: str, shape: dict[str, int], device: str, dtype: str
) -> dict[str, Any]:
    """Hold the last tokens of a long text against stepping from a state that float64 brought there."""
    call = draw(Shape(**shape), tokens, device, as_dtype(dtype))
    r, first = as_recurrence(call), tokens - tail
    if who == "mamba_ssm":
        got = ScanOutput(mamba_ssm_scan(call)()[0][:, first:].clone(), None, *(r.v[:0],) * 2)
    else:
        whole = scan(r)
        assert whole.y is not None and whole.steps is not None
        got = ScanOutput(
            whole.y[:, first:].clone(), between(whole.steps, first, tokens), whole.states, whole.final_state
        )
        del whole
    state = state_before(r, first)
    want = reference.scan(r.between(first, tokens, state))
    return {"errors": errors(got, want, state)}


def errors(got: ScanOutput, want: ScanOutput, entering: Tensor | None = None) -> dict[str, float]:
    """Errors of whatever was computed.

    ``y``, ``final_state``: distance over the norm of the truth. ``y worst``: of any head, the same.
    ``state_norm``: of every token over (decayed old norm + write norm), root mean square and worst.
    """
    assert got.y is not None and want.y is not None
    off, size = ((x.square().sum((0, 1, 3))).sqrt() for x in (got.y.double() - want.y, want.y))
    found = {"y": relative(got.y, want.y), "y worst": float((off / size).max())}
    if got.steps is not None and want.steps is not None:
        found["final_state"] = relative(got.final_state, want.final_state)
        found |= norm_errors(got.steps, want.steps, entering)
    return found


def norm_errors(got: Steps, want: Steps, entering: Tensor | None = None) -> dict[str, float]:
    """Error of every state norm over (decayed old norm + write norm): root mean square, and worst.

    Parameters
    ----------
    got, want : Steps
        What is judged, and the truth.
    entering : Tensor, (batch, heads, key, value), optional
        The state before the first token; zero where it is absent.
    """
    old = pad(want.state_norm[:, :-1].double(), (0, 0, 1, 0))
    if entering is not None:
        old[:, 0] = entering.double().norm(dim=(-2, -1))
    scale = old * want.log_decay.double().exp() + want.write_norm
    error = (got.state_norm.double() - want.state_norm).abs() / scale
    return {"state_norm rms": float(error.square().mean().sqrt()), "state_norm worst": float(error.max())}


def relative(got: Tensor, want: Tensor) -> float:
    """Distance over the norm of the truth."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def peer_error(call: dict[str, Any], tokens: int, want: ScanOutput) -> dict[str, Any]:
    """Error of mamba_ssm's ``y`` on the first tokens of a call, or why there is none."""
    per_token = ("hidden_states", "dt", "B", "C")
    cut = {name: x[:, :tokens] if name in per_token else x for name, x in call.items()}
    try:
        y = mamba_ssm_scan(cut)()[0]
    except Exception as error:  # the peer's failure is its own row
        if is_gpu(str(want.final_state.device)):
            torch.cuda.synchronize()  # raises if the device is lost
        return {"skipped": reason(error)}
    return errors(ScanOutput(y, None, want.states, want.final_state), want)


def between(steps: Steps, start: int, stop: int) -> Steps:
    """Cut a stretch of tokens out."""
    return Steps(*(getattr(steps, f.name)[:, start:stop] for f in fields(Steps)))


def state_before(r: Recurrence, token: int) -> Tensor:
    """Bring the state to a token in float64, stretch by stretch, in matrix products."""
    state = r.start_state(torch.float64)
    for first in range(0, token, STRETCH):
        part = r.between(first, min(first + STRETCH, token), None).to(torch.float64)
        part = part.replace(initial_state=state)
        state = chunked.scan(part, outputs=False, measure=False).final_state
    return state


@dataclass(frozen=True, eq=False)
class Truth:
    """Float64 results of several recurrences alike in shape, one a sequence, over one text."""

    output: ScanOutput
    positions: tuple[int, ...]
    said: str
    chunked_against_stepping: dict[str, dict[str, float]]

    @classmethod
    def of(cls, recurrences: Sequence[Recurrence], lengths: Sequence[int]) -> Truth:
        """Step through the first tokens; take what lies beyond in chunks, and check that against stepping."""
        r = _together(recurrences)
        stepped = r.time if r.time < 2 * STEPPED else STEPPED
        positions = tuple(sorted(n - 1 for n in lengths))
        near = [p for p in positions if p < stepped]
        head = reference.scan(r.between(0, stepped, None), positions=near)
        if r.time == stepped:
            return cls(head, positions, "stepping", {})
        again = r.time - min(REPEATED, (r.time - stepped) // 2)
        far = [p for p in positions if p >= stepped]
        asked = [p - stepped for p in (*far, again - 1)]
        rest = chunked.scan(r.between(stepped, r.time, head.final_state), positions=asked)
        assert head.y is not None and rest.y is not None and head.steps is not None and rest.steps is not None
        at = rest.states[:, -1]
        tail = ScanOutput(
            rest.y[:, again - stepped :],
            between(rest.steps, again - stepped, r.time - stepped),
            rest.states,
            rest.final_state,
        )
        agreement = {
            f"first {stepped:,}": errors(chunked.scan(r.between(0, stepped, None)), head),
            f"last {r.time - again:,}": errors(tail, reference.scan(r.between(again, r.time, at)), at),
        }
        whole = ScanOutput(
            torch.cat([head.y, rest.y], 1),
            Steps.concatenate([head.steps, rest.steps]),
            torch.cat([head.states, rest.states[:, :-1]], 1),
            rest.final_state,
        )
        worst = max(max(e.values()) for e in agreement.values())
        said = f"stepping to {stepped:,} tokens, then float64 chunks, {worst:.0e} from stepping"
        return cls(whole, positions, said, agreement)

    def prefix(self, sequence: int, tokens: int) -> ScanOutput:
        """Results of one recurrence as if the text ended after some tokens."""
        o, one = self.output, slice(sequence, sequence + 1)
        assert o.y is not None and o.steps is not None
        cut = between(o.steps, 0, tokens)
        steps = Steps(*(getattr(cut, f.name)[one] for f in fields(Steps)))
        state = o.states[one, self.positions.index(tokens - 1)]
        return ScanOutput(o.y[one, :tokens], steps, o.states[one], state)


def _together(recurrences: Sequence[Recurrence]) -> Recurrence:
    """Join recurrences as sequences of one batch, in float64: stepping them costs as much as stepping one."""
    parts = [r.to(torch.float64).tensors() for r in recurrences]
    joined = {name: torch.cat([p[name] for p in parts]) for name in parts[0] if name != "skip"}
    return Recurrence(**joined, skip=parts[0]["skip"])


def _call(work: Apart | Here, function: str, **arguments: Any) -> dict[str, Any]:
    try:
        return work.call(function, **arguments)
    except Lost as lost:
        return {"skipped": str(lost)}


def _listed(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in found.items()) + (
        "  (not finite)" if not all(math.isfinite(v) for v in found.values()) else ""
    )
