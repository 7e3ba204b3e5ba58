"""Inputs and tolerances the kernel tests share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from statescope.kernels.interface import Steps
from statescope.kernels.rates import Rated
from statescope.recurrence import Recurrence


@dataclass(frozen=True)
class Case:
    """One shape; what is absent from the recurrence is absent from the name."""

    time: int
    batch: int = 1
    heads: int = 2
    groups: int = 1
    key: int = 16
    value: int = 16
    initial: bool = False
    scale: bool = True
    skip: bool = True
    delta: bool = False
    keyed: bool = False
    erase: bool = False
    entry: bool = False
    rated: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.time}x{self.heads}h{self.groups}g{self.key}x{self.value}"
        flags = "".join(
            f"-{name}"
            for name in ("initial", "scale", "skip", "delta", "keyed", "erase", "entry", "rated")
            if getattr(self, name)
        )
        return f"{shape}{flags}-{str(self.dtype).removeprefix('torch.')}"


CASES = (
    Case(1),
    Case(33, initial=True),
    Case(63, dtype=torch.bfloat16),
    Case(64, dtype=torch.bfloat16),
    Case(65, initial=True, dtype=torch.bfloat16),
    Case(40, batch=2, heads=4, groups=2, initial=True),
    Case(70, batch=2, heads=4, groups=2, initial=True, dtype=torch.bfloat16),
    Case(128, batch=2, heads=4, groups=2, initial=True, dtype=torch.bfloat16),
    Case(40, heads=3, groups=3, key=5, value=7),
    Case(130, heads=3, groups=3, key=5, value=7, dtype=torch.bfloat16),
    Case(70, key=100, value=48, initial=True, scale=False, dtype=torch.bfloat16),
    Case(40, key=100, value=48, skip=False),
    Case(90, key=20, value=130, initial=True, dtype=torch.bfloat16),
    Case(20, key=256, value=256, heads=1, dtype=torch.bfloat16),
    Case(20, key=256, value=200, heads=1),
    Case(40, key=16, value=40, dtype=torch.float16),
    Case(10, key=1, value=1),
    Case(5, heads=1, value=300),
    Case(1, delta=True),
    Case(31, groups=2, key=24, value=33, initial=True, delta=True),
    Case(65, heads=1, batch=2, initial=True, skip=False, delta=True, dtype=torch.bfloat16),
    Case(40, heads=1, key=40, value=5, scale=False, delta=True, dtype=torch.float16),
    Case(140, groups=2, key=40, value=70, initial=True, delta=True, dtype=torch.bfloat16),
    Case(150, batch=2, key=130, value=70, initial=True, dtype=torch.bfloat16),
    Case(1, keyed=True),
    Case(18, groups=2, key=9, value=20, initial=True, keyed=True),
    Case(33, heads=1, key=33, value=5, scale=False, skip=False, keyed=True, dtype=torch.float16),
    Case(17, batch=2, heads=1, initial=True, delta=True, keyed=True, dtype=torch.bfloat16),
    Case(5, heads=1, value=300, delta=True, keyed=True),
    Case(70, heads=2, key=40, value=40, initial=True, delta=True, keyed=True, dtype=torch.bfloat16),
    Case(1, erase=True),
    Case(17, groups=2, key=24, value=33, initial=True, erase=True),
    Case(9, batch=2, heads=1, key=33, value=5, initial=True, keyed=True, erase=True),
    Case(40, heads=1, scale=False, skip=False, keyed=True, erase=True, dtype=torch.float16),
    Case(33, heads=1, initial=True, keyed=True, erase=True, dtype=torch.bfloat16),
    Case(1, entry=True),
    Case(63, heads=1, skip=False, entry=True, dtype=torch.bfloat16),
    Case(64, heads=1, scale=False, rated=True, dtype=torch.float16),
    Case(65, heads=1, initial=True, rated=True),
    Case(9, batch=2, heads=4, groups=2, key=5, value=7, initial=True, rated=True),
    Case(
        17, groups=2, key=1, value=64, scale=False, skip=False, initial=True, entry=True, dtype=torch.bfloat16
    ),
    Case(9, heads=1, key=256, value=3, rated=True),
    Case(9, heads=1, value=70, initial=True, entry=True),
    Case(200, heads=1, key=4, value=3, initial=True, rated=True),
)

LONG_CASES = (
    Case(1000, batch=2, heads=6, groups=2, key=128, value=64, initial=True, dtype=torch.bfloat16),
    Case(4096, heads=5, key=128, value=64, dtype=torch.bfloat16),
    Case(1000, heads=5, key=64, value=96, initial=True),
    Case(1000, heads=2, key=128, value=64, initial=True, dtype=torch.float16),
    Case(1000, batch=2, heads=4, groups=2, key=128, value=128, initial=True, delta=True),
    Case(4096, heads=3, key=64, value=64, delta=True, dtype=torch.bfloat16),
    Case(300, heads=1, key=256, value=200, delta=True),
    Case(1000, batch=2, heads=4, groups=2, key=128, value=128, initial=True, keyed=True),
    Case(1000, heads=4, key=128, value=128, initial=True, delta=True, keyed=True),
    Case(4096, heads=3, key=64, value=64, delta=True, keyed=True, dtype=torch.bfloat16),
    Case(300, heads=2, key=256, value=200, keyed=True, dtype=torch.bfloat16),
    Case(1000, heads=4, key=128, value=128, delta=True, dtype=torch.bfloat16),
    Case(1000, heads=4, key=128, value=256, keyed=True, dtype=torch.bfloat16),
    Case(1000, heads=4, key=128, value=128, initial=True, delta=True, keyed=True, dtype=torch.bfloat16),
    Case(1000, batch=2, heads=4, key=64, value=64, initial=True, keyed=True, erase=True),
    Case(4096, heads=4, key=64, value=64, keyed=True, erase=True, dtype=torch.bfloat16),
    Case(1000, heads=2, key=128, value=96, erase=True, dtype=torch.bfloat16),
    Case(300, heads=2, key=256, value=200, keyed=True, erase=True),
    Case(1000, heads=2, key=256, value=512, initial=True, dtype=torch.bfloat16),
    Case(300, heads=2, key=64, value=320, delta=True, dtype=torch.bfloat16),
    Case(1000, batch=2, heads=24, value=64, initial=True, scale=False, skip=False, rated=True),
    Case(4096, heads=6, value=64, rated=True, dtype=torch.bfloat16),
    Case(4096, heads=4, key=1, value=64, entry=True),
    Case(1000, heads=3, groups=3, key=64, value=100, initial=True, entry=True),
    Case(300, heads=2, key=256, value=200, rated=True, dtype=torch.float16),
)
"""Too long for the interpreter."""

WORST = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-3}
"""Largest error of any step, in the units of `errors`; inputs are exact in float64, arithmetic is not."""

RMS = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 2e-4}
"""Root mean square of the same."""

OUTPUTS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Of y, over its own norm: it is rounded to the dtype of v."""

STATES = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 3e-5}
"""Of a state, over its own norm."""


def draw(case: Case, device: str, seed: int = 0) -> Recurrence:
    """Draw a recurrence like a trained Mamba-2's: slow and fast heads, correlated keys, strided slices."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = (case.batch, case.time)
    shared = (*tokens, case.groups, case.key)
    width = case.heads * case.value
    keys = case.groups * case.key
    joined = normal(*tokens, width + 2 * keys) + 0.3
    joined = joined.to(device=device, dtype=case.dtype)
    v, k, q = joined.split([width, keys, keys], -1)
    step = torch.nn.functional.softplus(normal(*tokens, case.heads) - 2)
    rate = torch.logspace(-2, 1, case.heads)
    k = k.reshape(shared)
    if case.delta:  # a corrected key is of unit length, and a correction at most a reflection
        k, step = torch.nn.functional.normalize(k.float(), dim=-1).to(case.dtype), step.clamp(max=1)
    a, b = -2 * step.to(device) if case.delta else None, None
    if case.erase:  # along a direction of its own, of which at most all is taken
        b = torch.nn.functional.normalize(normal(*tokens, case.heads, case.key), dim=-1)
        a = (-b * normal(*tokens, case.heads, case.key).sigmoid()).to(device=device, dtype=case.dtype)
        b = b.to(device=device, dtype=case.dtype)
    log_decay = -step * rate
    if case.keyed:
        log_decay = log_decay[..., None] * torch.logspace(-1, 0.5, case.key)
    if case.entry or case.rated:  # like a trained Mamba-1's: a step for every column, rates that grow by key
        steps = torch.nn.functional.softplus(normal(*tokens, case.heads, case.value) - 2)
        spread = torch.logspace(-1, 0.5, case.key)[:, None] * normal(case.key, case.value).div(3).exp()
        log_decay = Rated(steps.to(device), (-rate[:, None, None] * spread).to(device))
        log_decay = log_decay if case.rated else log_decay.written_out()
    return Recurrence(
        q=q.reshape(shared),
        k=k,
        v=v.reshape(*tokens, case.heads, case.value),
        log_decay=log_decay.to(device),
        write_scale=step.to(device) if case.scale else None,
        a=a,
        b=b,
        initial_state=normal(case.batch, case.heads, case.key, case.value).to(device)
        if case.initial
        else None,
        skip=normal(case.heads).to(device) if case.skip else None,
    )


def errors(got: Steps, truth: Steps, entering_norm: Tensor) -> dict[str, Tensor]:
    r"""Error of each field, on a scale that does not vanish where the value does.

    ``state_norm`` over the decayed old norm plus the norm of the write, as everything is that is made
    of the state; a cosine and a log decay as they are.
    """
    old = torch.cat([entering_norm[:, None], truth.state_norm[:, :-1]], 1) * truth.log_decay.exp()
    scale = (old + truth.write_norm).clamp(min=1e-30)
    scales = {"state_norm": scale, "state_mean": scale, "write_norm": scale}
    return {
        name: (getattr(got, name).double() - getattr(truth, name)).abs() / scales.get(name, 1.0)
        for name in ("log_decay", "write_norm", "state_norm", "state_mean", "write_overlap")
    }


def relative(got: Tensor, truth: Tensor) -> float:
    """Distance over the norm of the truth."""
    return float((got.double() - truth).norm() / truth.norm().clamp(min=1e-30))
