"""The scans of other signatures than Mamba-2's: held against float64 first, then timed in turns."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from statescope.adapters import ADAPTERS
from statescope.experiments.bench import accuracy
from statescope.experiments.bench.apart import Apart, Here, Lost, reason
from statescope.experiments.bench.settings import Settings
from statescope.experiments.bench.subjects import SIGNATURES
from statescope.experiments.bench.timing import Timing, is_gpu, rows, take_turns
from statescope.kernels import chunked, reference
from statescope.kernels.interface import ScanOutput
from statescope.models import as_dtype
from statescope.recurrence import Recurrence
from statescope.scan import choose, scan

OURS = "statescope, y and measurements"
PLAIN = "statescope, y only"
PEERS = (PLAIN, "fla", "mamba_ssm")
"""Baselines of the ratios."""

VERIFIED = 300
"""Tokens held against float64 before anything is timed."""

LONGEST = 65536
"""Most tokens that are timed. On as many a peer chooses its configuration, which it keeps."""

SLOW = 16384
"""Longest text for which the scans in torch are timed on a GPU beside the fused ones."""

LIMITS = {"y": 1e-2, "state_norm worst": 1e-3, "final_state": 1e-4}
"""Largest errors with which timing goes on."""

PEER_SCANS = {
    "gated-delta": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "KDA": ("fla.ops.kda", "chunk_kda"),
    "GLA": ("fla.ops.gla", "chunk_gla"),
    "HGRN-2": ("fla.ops.gla", "chunk_gla"),
    "RetNet": ("fla.ops.retention", "chunk_retention"),
    "RWKV-7": ("fla.ops.rwkv7", "chunk_rwkv7"),
    "Mamba-1": ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
}
"""Modules and functions of the peers' plain forward scans."""

READ_AS = {"chunk_kda": "chunk_gated_delta_rule"}
"""Functions without an adapter of their own, and those whose arguments they share."""

PEER_OPTIONS = {"RWKV-7": {"safe_gate": True, "lower_bound": -math.exp(-0.5), "chunk_size": 64}}
"""How fla's own layer calls its scan, where that is faster than its default; no part of the recurrence."""


def measure(name: str, settings: Settings, work: Apart | Here) -> Iterator[dict[str, Any]]:
    """Yield an entry for each length of one signature."""
    s = SIGNATURES[name]
    about = {"shape": name, "heads": s.heads, "value": s.value, "key": s.key}
    where = {"name": name, "device": settings.device, "dtype": settings.dtype}
    try:
        verified = work.call(f"{__name__}.verified", **where)
    except Lost as lost:
        yield about | {"skipped": str(lost)}
        return
    if "refused" in verified:
        yield about | verified
        return
    for tokens in sorted({min(n, LONGEST) for n in settings.lengths}):
        try:
            entry = {"rows": work.call(f"{__name__}.timed", tokens=tokens, rounds=settings.rounds, **where)}
        except Lost as lost:
            entry = {"skipped": str(lost)}
        yield about | {"tokens": tokens} | verified | entry


def verified(name: str, device: str, dtype: str) -> dict[str, Any]:
    """Hold the kernel that would be timed, and the peer's, against stepping in float64.

    Returns
    -------
    dict
        ``errors`` of ours and ``peer_errors``, of its ``y``; ``refused`` instead, with the reason, if ours
        must not be timed.
    """
    if is_gpu(device):  # the peer tunes itself on its first call, and keeps what it finds
        with contextlib.suppress(ImportError, RuntimeError):
            peer_scan(name, draw(name, LONGEST, device, as_dtype(dtype)))()
    call = draw(name, VERIFIED, device, as_dtype(dtype))
    r = as_recurrence(name, call)
    want = reference.scan(r)
    errors = accuracy.errors(scan(r), want)
    wrong = [f"{what} {errors[what]:.1e} > {limit:.0e}" for what, limit in LIMITS.items()
             if not errors[what] <= limit]  # fmt: skip
    if wrong:
        return {"refused": f"{choose(r)} is wrong here: error of {', '.join(wrong)}"}
    return {"kernel": choose(r), "errors": errors, "peer_errors": _peer_errors(name, call, want)}


def _peer_errors(name: str, call: dict[str, Tensor], want: ScanOutput) -> dict[str, Any]:
    try:
        y = peer_scan(name, call)()
    except Exception as error:  # the peer's failure is its own row
        if is_gpu(str(want.final_state.device)):
            torch.cuda.synchronize()  # raises if the device is lost
        return {"skipped": reason(error)}
    y = y[0] if isinstance(y, tuple) else y.transpose(1, 2)  # mamba_ssm: (batch, channel, time)
    assert want.y is not None
    found = ScanOutput(y.reshape(want.y.shape), None, want.states, want.final_state)
    return accuracy.errors(found, want)


def timed(name: str, tokens: int, device: str, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Time the scans of one layer in turns: ours, ours without measurements or in torch, and the peer's."""
    if is_gpu(device):
        torch.cuda.empty_cache()  # of what another length left
    call = draw(name, tokens, device, as_dtype(dtype))
    r = as_recurrence(name, call)
    contestants: dict[str, Callable[[], Any]] = {OURS: lambda: scan(r), PLAIN: lambda: scan(r, measure=False)}
    skipped = []
    if choose(r) == "fused" and tokens <= SLOW:
        contestants["statescope in torch"] = lambda: chunked.scan(r)
    elif choose(r) == "fused":
        skipped.append(Timing("statescope in torch", skipped=f"too slow: timed to {SLOW:,} tokens"))
    peer = PEER_SCANS[name][0].partition(".")[0]
    try:
        contestants[peer] = peer_scan(name, call)
    except (ImportError, RuntimeError) as error:
        skipped.append(Timing(peer, skipped=reason(error)))
    return rows([*take_turns(contestants, rounds, device, on_device=True), *skipped], PEERS)


def draw(name: str, time: int, device: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Draw a layer's scan call as its model makes it: slow and fast heads and keys, correlated keys.

    Arguments are the peer's. Queries and keys of the delta rule are of unit length already.
    """
    s, g = SIGNATURES[name], torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, time, *shape, device=device, generator=g)

    if name == "Mamba-1":
        channels = s.heads * s.value
        rates = -torch.arange(1, s.key + 1, device=device).float()
        x, step, b, c = normal(channels), softplus(normal(channels).sub_(3)), normal(s.key), normal(s.key)
        found = {"u": x, "delta": step, "B": b, "C": c}
        laid = {n: t.to(dtype).transpose(1, 2).contiguous() for n, t in found.items()}
        return laid | {"A": rates.expand(channels, -1).contiguous()}
    q, k = (normal(s.heads, s.key).add_(0.2) for _ in range(2))
    v, beta = normal(s.heads, s.value), normal(s.heads).sigmoid_()
    slow = -torch.logspace(-2.5, 0.5, s.heads, device=device)
    if name == "RWKV-7":
        unit, rate = normalize(k, dim=-1), normal(s.heads, s.key).sigmoid_()
        found = {"r": q * s.key**-0.5, "k": k, "v": v, "a": -unit, "b": unit * rate}
        decay = PEER_OPTIONS[name]["lower_bound"] * normal(s.heads, s.key).sub_(2).sigmoid_()
        return {n: x.to(dtype) for n, x in found.items()} | {"w": decay}
    found = {"q": q, "k": k, "v": v}
    if name in ("gated-delta", "KDA"):
        found |= {"q": normalize(q, dim=-1), "k": normalize(k, dim=-1), "beta": beta}
    if name == "gated-delta":
        decays = {"g": slow * softplus(normal(s.heads))}
    elif name == "RetNet":  # fixed by the head
        decays = {}
    else:
        decays = {"g": slow[:, None] * softplus(normal(s.heads, s.key))}
    if name == "HGRN-2":
        found["k"] = -torch.expm1(decays["g"])
    return {n: x.to(dtype) for n, x in found.items()} | decays


def as_recurrence(name: str, call: dict[str, Tensor]) -> Recurrence:
    """Read a drawn call by the adapter that reads a model's."""
    function = PEER_SCANS[name][1]
    return ADAPTERS[READ_AS.get(function, function)].read(False, **call).recurrence


def peer_scan(name: str, call: dict[str, Tensor]) -> Callable[[], Any]:
    """Return the plain forward scan of fla, or of mamba_ssm for Mamba-1.

    Raises
    ------
    ImportError, RuntimeError
        If it is not installed, or the call is not on a GPU.
    """
    module, function = PEER_SCANS[name]
    own = getattr(importlib.import_module(module), function)
    if not next(iter(call.values())).is_cuda:
        raise RuntimeError(f"{module.partition('.')[0]} needs a GPU")
    options = PEER_OPTIONS.get(name, {})

    def work() -> Any:
        with torch.no_grad():
            return own(**call, **options)

    return work
