"""The scans of other signatures than Mamba-2's: held against float64 first, then timed in turns."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from statescope.experiments.bench import accuracy
from statescope.experiments.bench.apart import Apart, Here, Lost, reason
from statescope.experiments.bench.settings import Settings
from statescope.experiments.bench.subjects import SIGNATURES
from statescope.experiments.bench.timing import Timing, is_gpu, rows, take_turns
from statescope.kernels import chunked, reference
from statescope.models import as_dtype
from statescope.recurrence import Recurrence
from statescope.scan import choose, scan

OURS = "statescope, y and measurements"
PLAIN = "statescope, y only"
PEERS = (PLAIN, "fla", "mamba_ssm")
"""Baselines of the ratios."""

VERIFIED = 300
"""Tokens held against float64 before anything is timed."""

LIMITS = {"y": 1e-2, "state_norm worst": 1e-3, "final_state": 1e-4}
"""Largest errors with which timing goes on."""

PEER_SCANS = {
    "gated-delta": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "KDA": ("fla.ops.kda", "chunk_kda"),
    "GLA": ("fla.ops.gla", "chunk_gla"),
    "Mamba-1": ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
}
"""Modules and functions of the peers' plain forward scans."""


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
    for tokens in sorted({min(n, s.longest) for n in settings.lengths}):
        try:
            entry = {"rows": work.call(f"{__name__}.timed", tokens=tokens, rounds=settings.rounds, **where)}
        except Lost as lost:
            entry = {"skipped": str(lost)}
        yield about | {"tokens": tokens} | verified | entry


def verified(name: str, device: str, dtype: str) -> dict[str, Any]:
    """Hold the kernel that would be timed against stepping in float64."""
    r = as_recurrence(name, draw(name, VERIFIED, device, as_dtype(dtype)))
    errors = accuracy.errors(scan(r), reference.scan(r))
    wrong = [f"{what} {errors[what]:.1e} > {limit:.0e}" for what, limit in LIMITS.items()
             if not errors[what] <= limit]  # fmt: skip
    if wrong:
        return {"refused": f"{choose(r)} is wrong here: error of {', '.join(wrong)}"}
    return {"kernel": choose(r), "errors": errors}


def timed(name: str, tokens: int, device: str, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Time the scans of one layer in turns: ours, ours without measurements or in torch, and the peer's."""
    if is_gpu(device):
        torch.cuda.empty_cache()  # of what another length left
    call = draw(name, tokens, device, as_dtype(dtype))
    r = as_recurrence(name, call)
    contestants: dict[str, Callable[[], Any]] = {OURS: lambda: scan(r), PLAIN: lambda: scan(r, measure=False)}
    if choose(r) == "fused":
        contestants["statescope in torch"] = lambda: chunked.scan(r)
    skipped = []
    peer = PEER_SCANS[name][0].partition(".")[0]
    try:
        contestants[peer] = peer_scan(name, call)
    except (ImportError, RuntimeError) as error:
        skipped.append(Timing(peer, skipped=reason(error)))
    return rows([*take_turns(contestants, rounds, device, on_device=True), *skipped], PEERS)


def draw(name: str, time: int, device: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Draw a layer's scan call as its model makes it: slow and fast heads and keys, correlated keys."""
    s, g = SIGNATURES[name], torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, time, *shape, device=device, generator=g)

    if name == "Mamba-1":
        return {
            "x": normal(s.heads * s.value).to(dtype),
            "dt": softplus(normal(s.heads * s.value).sub_(3)).to(dtype),
            "A": -torch.arange(1, s.key + 1, device=device)
            .float()
            .expand(s.heads * s.value, -1)
            .contiguous(),
            "B": normal(s.key).to(dtype),
            "C": normal(s.key).to(dtype),
        }
    q, k = (normal(s.heads, s.key).add_(0.2) for _ in range(2))
    v, beta = normal(s.heads, s.value), normal(s.heads).sigmoid_()
    slow = -torch.logspace(-2.5, 0.5, s.heads, device=device)
    if name == "gated-delta":
        decay = slow * softplus(normal(s.heads))
    else:  # of each key
        decay = slow[:, None] * softplus(normal(s.heads, s.key))
    found = {"q": q * s.key**-0.5, "k": k, "v": v, "g": decay, "beta": beta}
    return {n: x if n == "g" else x.to(dtype) for n, x in found.items()}


def as_recurrence(name: str, call: dict[str, Tensor]) -> Recurrence:
    """Read a drawn call as the adapters read a model's: normalised keys are float32."""
    s = SIGNATURES[name]
    if name == "Mamba-1":
        step = call["dt"].float()
        rates = call["A"].unflatten(0, (s.heads, s.value)).transpose(-2, -1)
        return Recurrence(
            q=call["C"][:, :, None],
            k=call["B"][:, :, None],
            v=(step * call["x"]).unflatten(2, (s.heads, s.value)),
            log_decay=step.unflatten(2, (s.heads, s.value))[:, :, :, None] * rates,
        )
    if name == "GLA":
        return Recurrence(q=call["q"], k=call["k"], v=call["v"], log_decay=call["g"])
    q, k = (normalize(call[n].float(), dim=-1) for n in ("q", "k"))
    beta = call["beta"].float()
    return Recurrence(q=q * s.key**-0.5, k=k, v=call["v"], log_decay=call["g"], write_scale=beta, a=-beta)


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
    if name == "Mamba-1":
        x, dt, b, c = (call[n].transpose(1, 2).contiguous() for n in ("x", "dt", "B", "C"))
        return lambda: own(x, dt, call["A"], b, c)
    q, k, v, g, beta = call.values()
    if name == "GLA":
        return lambda: own(q, k, v, g, scale=1.0)
    return lambda: own(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)
