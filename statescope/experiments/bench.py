"""The benchmark: verify first, then time side by side in one run, on the user's own machine.

Contestants take turns, so that a machine whose speed drifts is unfair to none; what is not installed is
named as skipped. Nothing here decides whether a figure is good.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statescope.adapters.mamba2 import read_chunk_scan
from statescope.kernels import chunked, reference
from statescope.kernels.interface import Steps
from statescope.models import load
from statescope.recurrence import Recurrence
from statescope.scan import choose, scan
from statescope.tracing import trace, versions


@dataclass(frozen=True)
class Shape:
    """A public Mamba-2 model's shape; heads of 64 x 128."""

    layers: int
    width: int
    heads: int
    value: int = 64
    key: int = 128


SHAPES = {
    "130M": Shape(24, 768, 24),
    "370M": Shape(48, 1024, 32),
    "1.3B": Shape(48, 2048, 64),
    "2.7B": Shape(64, 2560, 80),
}

STEPPED = 256
"""Tokens that are stepped one at a time; the time is scaled to the whole length, and said to be."""

VERIFIED = 1000
"""Tokens held against float64 before anything is timed."""

LIMITS = {"y": 1e-2, "state_norm worst": 1e-3, "final_state": 1e-4}
"""Largest errors with which timing goes on (bfloat16 inputs, y rounded to bfloat16)."""


@dataclass
class Timing:
    """One contestant's rounds."""

    name: str
    seconds: list[float] = field(default_factory=list)
    note: str = ""

    def row(self, baseline: float) -> dict[str, Any]:
        """Median, spread and ratio to the baseline's median."""
        if not self.seconds:
            return {"name": self.name, "skipped": self.note}
        median = statistics.median(self.seconds)
        return {
            "name": self.name,
            "median_ms": 1e3 * median,
            "min_ms": 1e3 * min(self.seconds),
            "max_ms": 1e3 * max(self.seconds),
            "ratio": median / baseline,
            "note": self.note,
        }


def draw(shape: Shape, time: int, device: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Draw a layer's scan call: slow and fast heads; x, B and C slices of one convolution's output."""
    g = torch.Generator(device=device).manual_seed(seed)
    width = shape.heads * shape.value
    xbc = torch.randn(1, time, width + 2 * shape.key, device=device, generator=g).add_(0.2).to(dtype)
    x, b, c = xbc.split([width, shape.key, shape.key], -1)
    return {
        "hidden_states": x.unflatten(2, (shape.heads, shape.value)),
        "dt": torch.randn(1, time, shape.heads, device=device, generator=g).sub_(1).to(dtype),
        "A": -torch.logspace(-1, 1.2, shape.heads, device=device),
        "B": b[:, :, None],
        "C": c[:, :, None],
        "D": torch.randn(shape.heads, device=device, generator=g),
        "dt_bias": torch.randn(shape.heads, device=device, generator=g) * 1.5 - 2.5,
    }


def as_recurrence(call: dict[str, Any]) -> Recurrence:
    """Read a drawn call as the adapter reads a model's."""
    return read_chunk_scan(False, **call, chunk_size=256, dt_softplus=True).recurrence


def verify(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Hold the kernel that would be timed against stepping in float64.

    Raises
    ------
    RuntimeError
        If an error is beyond :data:`LIMITS`: a wrong kernel is not timed.
    """
    r = as_recurrence(draw(shape, VERIFIED, device, dtype))
    got, want = scan(r), reference.scan(r)
    assert got.y is not None and want.y is not None
    errors = {"y": _relative(got.y, want.y), "final_state": _relative(got.final_state, want.final_state)}
    errors |= norm_errors(got.steps, want.steps)
    for name, limit in LIMITS.items():
        if not errors[name] <= limit:
            raise RuntimeError(
                f"{choose(r)} is wrong here: error of {name} is {errors[name]:.1e} > {limit:.0e}"
            )
    return errors


def norm_errors(got: Steps | None, want: Steps | None) -> dict[str, float]:
    """Error of every state norm over (decayed old norm + write norm): root mean square, and worst."""
    assert got is not None and want is not None
    old = (
        torch.nn.functional.pad(want.state_norm[:, :-1], (0, 0, 1, 0)).double()
        * want.log_decay.double().exp()
    )
    error = (got.state_norm.double() - want.state_norm).abs() / (old + want.write_norm)
    return {"state_norm rms": float(error.square().mean().sqrt()), "state_norm worst": float(error.max())}


def bench_scan(shape: Shape, time: int, device: str, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Time one layer's scan; ratios are to mamba_ssm's plain forward scan, or to transformers' torch scan."""
    call = draw(shape, time, device, dtype)
    contestants: dict[str, Callable[[], Any]] = {
        "statescope, y and measurements": lambda: scan(as_recurrence(call)),
        "statescope, y only": lambda: scan(as_recurrence(call), measure=False),
        "statescope, measurements only": lambda: scan(as_recurrence(call), outputs=False),
        "statescope in torch": lambda: chunked.scan(as_recurrence(call)),
    }
    skipped: list[Timing] = []
    for name, find in (("mamba_ssm", _mamba_ssm_scan), ("transformers in torch", _transformers_scan)):
        try:
            contestants[name] = find(call)
        except (ImportError, RuntimeError) as error:
            skipped.append(Timing(name, note=f"{type(error).__name__}: {error}"))
    timings = _take_turns(contestants, rounds, device)
    stepped = _time_stepping(call, time, device)
    baseline = next(t for t in reversed(timings) if t.seconds and "statescope" not in t.name)
    baseline = next((t for t in timings if t.name == "mamba_ssm" and t.seconds), baseline)
    median = statistics.median(baseline.seconds)
    return [t.row(median) for t in [*timings, stepped, *skipped]]


def bench_trace(model: nn.Module, tokens: int, rounds: int, segment: int) -> list[dict[str, Any]]:
    """Time a whole traced forward; ratios are to the plain forward of the same model, in one piece."""
    device = str(next(model.parameters()).device)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.randint(0, vocabulary, (1, tokens))
    on_device = ids.to(device)

    def plain() -> None:
        with torch.no_grad():
            model(on_device)

    def traced(**how: Any) -> Callable[[], Any]:
        return lambda: trace(model, ids, segment=segment, progress=False, **how)

    with tempfile.TemporaryDirectory() as folder:
        disk = {"store": Path(folder) / "run.zarr", "overwrite": True}
        kernel = "fused" if device.startswith("cuda") else "chunked"
        contestants = {
            "plain forward": plain,
            "traced, the model's own scan": traced(),
            "traced, our scan": traced(backend=kernel),
            "traced, our scan, window=64": traced(backend=kernel, window=64),
            "traced, our scan, to disk": traced(backend=kernel, **disk),
            "traced, our scan, window=64, to disk": traced(backend=kernel, window=64, **disk),
        }
        timings = _take_turns(contestants, rounds, device)
    return [t.row(statistics.median(timings[0].seconds)) for t in timings]


def random_model(shape: Shape, device: str, dtype: torch.dtype) -> nn.Module:
    """Build a transformers Mamba-2 of a public shape with random weights."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=50288, hidden_size=shape.width, num_hidden_layers=shape.layers, num_heads=shape.heads,
        head_dim=shape.value, state_size=shape.key, n_groups=1, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(device):
        model: nn.Module = Mamba2ForCausalLM(config)
    return model.to(dtype).eval()


def copy_bandwidth(device: str, gigabytes: float) -> float:
    """Bytes a copy reads and writes in a second."""
    source = torch.empty(int(gigabytes * 2**30), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    [timing] = _take_turns({"copy": lambda: target.copy_(source)}, 10, device)
    return 2 * source.numel() / statistics.median(timing.seconds)


def run(
    shapes: list[str],
    lengths: list[int],
    rounds: int,
    say: Callable[[str], None],
    end_to_end: bool = True,
) -> dict[str, Any]:
    """Verify, time, print a table; return everything, with device, versions, date and command."""
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    result: dict[str, Any] = {
        "command": f"statescope bench --shapes {','.join(shapes)} --lengths {','.join(map(str, lengths))}"
        f" --rounds {rounds} --{'' if end_to_end else 'no-'}end-to-end",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions(),
        "copy_bandwidth_bytes_per_s": copy_bandwidth(device, 4 if gpu else 0.25),
        "scan": [],
        "trace": [],
    }
    say(f"{result['device']}, {result['dtype']}, copy {result['copy_bandwidth_bytes_per_s'] / 1e9:.0f} GB/s")
    for name in shapes:
        shape = SHAPES[name]
        errors = verify(shape, device, dtype)
        say(f"\n{name}: errors against float64: " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
        for length in lengths:
            rows = bench_scan(shape, length, device, dtype, rounds)
            result["scan"].append(
                {"shape": name, **asdict(shape), "tokens": length, "errors": errors, "rows": rows}
            )
            _print(
                say, f"scan, {name} ({shape.heads} x {shape.value} x {shape.key}), {length:,} tokens", rows
            )
            if gpu:
                torch.cuda.empty_cache()
    if end_to_end:
        names = shapes[:1] if gpu else ["mamba2-byte-n64-t512"]
        for name in names:
            model = random_model(SHAPES[name], device, dtype) if gpu else load(name)
            length = lengths[-1] if gpu else 8192
            segment = min(length, 16384) if gpu else 2048
            rows = bench_trace(model, length, rounds, segment)
            result["trace"].append({"model": name, "tokens": length, "segment": segment, "rows": rows})
            _print(say, f"forward, {name}, {length:,} tokens, segments of {segment:,}", rows)
    return result


def save(result: dict[str, Any], path: Path) -> None:
    """Write the result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _take_turns(contestants: dict[str, Callable[[], Any]], rounds: int, device: str) -> list[Timing]:
    timings = [Timing(name) for name in contestants]
    for round_ in range(rounds + 2):  # two rounds to warm up
        for timing, work in zip(timings, contestants.values(), strict=True):
            if timing.note:
                continue
            try:
                seconds = _time(work, device)
            except torch.OutOfMemoryError:
                timing.note, timing.seconds = "out of memory", []
                torch.cuda.empty_cache()
                continue
            if round_ >= 2:
                timing.seconds.append(seconds)
    return timings


def _time(work: Callable[[], Any], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _time_stepping(call: dict[str, Any], tokens: int, device: str) -> Timing:
    """Step one token at a time, reading the norm of every state back, as users do by hand."""
    r = as_recurrence(call)
    count = min(STEPPED, tokens)

    def step() -> None:
        state = r.start_state(torch.float32)
        for t in range(count):
            one = r.between(t, t + 1, state)
            k = one.k.float().repeat_interleave(r.heads // r.groups, 2)[:, 0]
            v = one.v.float()[:, 0] * (one.write_scale[:, 0, :, None] if one.write_scale is not None else 1)
            state = one.log_decay[:, 0].exp()[..., None, None] * state + k[..., None] * v[:, :, None]
            state.norm(dim=(-2, -1)).cpu()

    [timing] = _take_turns({"one token at a time": step}, 3, device)
    timing.seconds = [s * tokens / count for s in timing.seconds]
    timing.note = f"{count} tokens, scaled" if count < tokens else ""
    return timing


def _mamba_ssm_scan(call: dict[str, Any]) -> Callable[[], Any]:
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_fwd as forward

    x, dt, a, b, c = (call[name] for name in ("hidden_states", "dt", "A", "B", "C"))
    if not x.is_cuda:
        raise RuntimeError("needs a GPU")
    return lambda: forward(x, dt, a, b, c, 256, D=call["D"], dt_bias=call["dt_bias"], dt_softplus=True)


def _transformers_scan(call: dict[str, Any]) -> Callable[[], Any]:
    from transformers.models.mamba2 import modeling_mamba2

    own: Any = modeling_mamba2.mamba2_chunk_scan
    in_torch = own.__wrapped__

    def work() -> None:
        with torch.no_grad():
            in_torch(**call, chunk_size=256, dt_softplus=True)

    return work


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def _print(say: Callable[[str], None], title: str, rows: list[dict[str, Any]]) -> None:
    say(f"\n{title}\n{'':38} {'median':>10} {'min':>10} {'max':>10} {'ratio':>7}")
    for row in rows:
        if "skipped" in row:
            say(f"{row['name']:38} skipped: {row['skipped']}")
            continue
        times = " ".join(f"{row[k]:>10.3f}" for k in ("median_ms", "min_ms", "max_ms"))
        say(f"{row['name']:38} {times} {row['ratio']:>7.2f} {row['note']}")
