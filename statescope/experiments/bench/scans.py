"""One layer's scan beside its peers: held against float64 first, then timed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from statescope.experiments.bench import accuracy, signatures
from statescope.experiments.bench import floor as floors
from statescope.experiments.bench.apart import Apart, Here, Lost, reason, workplace
from statescope.experiments.bench.settings import Settings
from statescope.experiments.bench.subjects import (
    SHAPES,
    SIGNATURES,
    Shape,
    as_recurrence,
    draw,
    mamba_ssm_scan,
    transformers_scan,
)
from statescope.experiments.bench.timing import Timing, host_seconds, is_gpu, rows, table, take_turns
from statescope.kernels import chunked, reference
from statescope.models import as_dtype
from statescope.recurrence import Recurrence
from statescope.scan import choose, scan

OURS = "statescope, y and measurements"
PEERS = ("mamba_ssm", "transformers in torch")
"""Baselines of the ratios."""

VERIFIED = 1000
"""Tokens held against float64 before anything is timed."""

LIMITS = {"y": 1e-2, "state_norm worst": 1e-3, "final_state": 1e-4}
"""Largest errors with which timing goes on (bfloat16 inputs, y rounded to bfloat16)."""

STEPPED = 256
"""Tokens that are stepped one at a time; the time is scaled to the whole length, and said to be."""

SLOW = 16384
"""Longest text for which the scans in torch are timed on a GPU."""

TUNED = 65536
"""Longest text on which mamba_ssm chooses its configuration, which it keeps for every length."""


class WrongKernel(RuntimeError):
    """A kernel's error is beyond :data:`LIMITS`: it is not timed."""


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield this machine's rates, then an entry for each shape and length."""
    with workplace(settings.gpu) as work:
        rates = work.call(
            "statescope.experiments.bench.floor.rates", device=settings.device, dtype=settings.dtype
        )
        yield {"rates": rates}
        for name in settings.shapes:
            if name in SIGNATURES:
                yield from signatures.measure(name, settings, work)
                continue
            shape = vars(SHAPES[name])
            where = {"shape": shape, "device": settings.device, "dtype": settings.dtype}
            about = {"shape": name, **shape}
            tokens = min(max(settings.lengths), TUNED)
            try:
                verified = work.call(f"{__name__}.verified", tokens=tokens, **where)
                stepping = work.call(f"{__name__}.stepping", **where)
            except Lost as lost:
                yield about | {"skipped": str(lost)}
                continue
            if "refused" in verified:
                yield about | verified
                continue
            for length in settings.lengths:
                entry = _entry(work, length, settings.rounds, where)
                if "rows" in entry:
                    entry["rows"].append(_scaled(stepping, length, entry["rows"]))
                    ours = next((r for r in entry["rows"] if r["name"] == OURS and "skipped" not in r), None)
                    if ours is not None:
                        item = as_dtype(settings.dtype).itemsize
                        least = floors.floor(SHAPES[name], length, item, rates)
                        entry["floor"] = floors.compare(ours, least)
                yield about | {"tokens": length} | verified | entry


def describe(entry: dict[str, Any]) -> Iterator[str]:
    """Put an entry into words."""
    if "rates" in entry:
        r = entry["rates"]
        yield (
            f"copy {r['copy_bandwidth_bytes_per_s'] / 1e9:,.0f} GB/s, products of {r['matrix_product_size']}"
            f" squared {r['matrix_product_operations_per_s'] / 1e12:,.2f} T operations/s"
        )
        return
    title = f"scan, {entry['shape']} ({entry['heads']} x {entry['value']} x {entry['key']})"
    if "rows" not in entry:
        yield f"{title}: {entry.get('refused') or entry.get('skipped')}"
        return
    errors = ", ".join(f"{k} {v:.1e}" for k, v in entry["errors"].items())
    peer = entry.get("peer_errors", {})
    if peer and "skipped" not in peer:
        errors += f"; the peer's: {', '.join(f'{k} {v:.1e}' for k, v in peer.items())}"
    yield from table(f"{title}, {entry['tokens']:,} tokens; errors: {errors}", entry["rows"])
    if "floor" in entry:
        f = entry["floor"]
        yield (
            f"floor: {f['bytes'] / 1e6:,.1f} MB in {f['bytes_ms']:.3f} ms, {f['operations'] / 1e9:,.1f} G"
            f" operations in {f['operations_ms']:.3f} ms; ours takes {f['measured_over_floor']:.2f} x that"
        )


def verified(tokens: int, shape: dict[str, int], device: str, dtype: str) -> dict[str, Any]:
    """Let mamba_ssm choose its configuration on a long text, then hold both kernels against float64.

    Returns
    -------
    dict
        ``errors`` of ours, ``mamba_ssm_errors`` of its ``y`` as it will be timed; ``refused`` instead, with
        the reason, if ours must not be timed.
    """
    what, kind = Shape(**shape), as_dtype(dtype)
    tuning = None
    if is_gpu(device):
        try:
            tuning = host_seconds(mamba_ssm_scan(draw(what, tokens, device, kind)), device)
        except Exception:  # its reason stands in the rows of every length
            torch.cuda.synchronize()  # raises if the device is lost
    try:
        errors, peer = verify(what, device, kind)
    except WrongKernel as error:
        return {"refused": str(error)}
    return {"errors": errors, "mamba_ssm_errors": peer, "mamba_ssm_tuning_s": tuning}


def verify(shape: Shape, device: str, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, Any]]:
    """Hold the kernel that would be timed against stepping in float64; return its errors and the peer's.

    Raises
    ------
    WrongKernel
        If an error is beyond :data:`LIMITS`.
    """
    call = draw(shape, VERIFIED, device, dtype)
    r = as_recurrence(call)
    want = reference.scan(r)
    errors = accuracy.errors(scan(r), want)
    for name, limit in LIMITS.items():
        if not errors[name] <= limit:
            raise WrongKernel(
                f"{choose(r)} is wrong here: error of {name} is {errors[name]:.1e} > {limit:.0e}"
            )
    return errors, accuracy.peer_error(call, VERIFIED, want)


def timed(
    tokens: int, shape: dict[str, int], device: str, dtype: str, rounds: int, peer: bool
) -> list[dict[str, Any]]:
    """Time the scans of one layer in turns.

    Parameters
    ----------
    tokens, rounds : int
        Length, and rounds that count.
    shape, device, dtype
        What is scanned, and where.
    peer : bool
        Whether mamba_ssm takes part.
    """
    if is_gpu(device):
        torch.cuda.empty_cache()  # of what another length left
    call = draw(Shape(**shape), tokens, device, as_dtype(dtype))
    contestants: dict[str, Callable[[], Any]] = {
        OURS: lambda: scan(as_recurrence(call)),
        "statescope, y only": lambda: scan(as_recurrence(call), measure=False),
        "statescope, measurements only": lambda: scan(as_recurrence(call), outputs=False),
    }
    skipped = []
    slow = choose(as_recurrence(call)) == "fused" and tokens > SLOW
    find: dict[str, Callable[[], Callable[[], Any]]] = {
        "statescope in torch": lambda: lambda: chunked.scan(as_recurrence(call)),
        "transformers in torch": lambda: transformers_scan(call),
        **({"mamba_ssm": lambda: mamba_ssm_scan(call)} if peer else {}),
    }
    for name, found in find.items():
        if slow and name.endswith("in torch"):
            skipped.append(Timing(name, skipped=f"too slow: timed to {SLOW:,} tokens"))
            continue
        try:
            contestants[name] = found()
        except (ImportError, RuntimeError) as error:
            skipped.append(Timing(name, skipped=reason(error)))
    timings = take_turns(contestants, rounds, device, on_device=True)
    return rows([*timings, *skipped], PEERS)


def stepping(shape: dict[str, int], device: str, dtype: str) -> list[float]:
    """Seconds a token takes when the state is stepped and its norms are read back, as users do by hand."""
    r = as_recurrence(draw(Shape(**shape), STEPPED, device, as_dtype(dtype)))
    [timing] = take_turns({"step": lambda: _step(r)}, 3, device, warm=1)
    return [s / STEPPED for s in timing.seconds]


def _step(r: Recurrence) -> None:
    state = r.start_state(torch.float32)
    for t in range(r.time):
        one = r.between(t, t + 1, state)
        k = one.k.float().repeat_interleave(r.heads // r.groups, 2)[:, 0]
        v = one.v.float()[:, 0] * (one.write_scale[:, 0, :, None] if one.write_scale is not None else 1)
        state = one.log_decay[:, 0].exp()[..., None, None] * state + k[..., None] * v[:, :, None]
        state.norm(dim=(-2, -1)).cpu()


def _entry(work: Apart | Here, tokens: int, rounds: int, where: dict[str, Any]) -> dict[str, Any]:
    """Time one length; if that is lost with mamba_ssm, time it without."""
    job: dict[str, Any] = {"tokens": tokens, "rounds": rounds, **where}
    try:
        return {"rows": work.call(f"{__name__}.timed", peer=True, **job)}
    except Lost as lost:
        peer = {"name": "mamba_ssm", "skipped": f"all timing was lost with it: {lost}"}
    try:
        return {"rows": [*work.call(f"{__name__}.timed", peer=False, **job), peer]}
    except Lost as lost:
        return {"skipped": str(lost)}


def _scaled(per_token: list[float], tokens: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    timing = Timing("one token at a time", [s * tokens for s in per_token], note=f"{STEPPED} tokens, scaled")
    timed_ms = {row["name"]: row["median_ms"] for row in found if "skipped" not in row}
    row = timing.row({name: timed_ms[name] / 1e3 for name in PEERS if name in timed_ms})
    ours = timed_ms.get(OURS)
    return row if ours is None else row | {"times_ours": 1e3 * statistics.median(timing.seconds) / ours}
