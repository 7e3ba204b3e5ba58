"""What a scan cannot beat on this machine: its fewest bytes and its operations, at measured rates."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from statescope.experiments.bench.subjects import Shape
from statescope.experiments.bench.timing import device_seconds, host_seconds, is_gpu
from statescope.models import as_dtype

FIELDS = 5
"""Numbers a measured token has for each head, float32: those of :class:`~statescope.scan.Steps`."""

CHUNK = 64
"""Tokens of the Gram-sized products that are counted; see :mod:`statescope.kernels.fused`."""


def rates(device: str, dtype: str) -> dict[str, float]:
    """Measure what this machine copies and multiplies in a second.

    Returns
    -------
    dict
        ``copy_bandwidth_bytes_per_s``: bytes read and written by a copy. ``matrix_product_size``, and
        ``matrix_product_operations_per_s`` of a square product of that size, two for each multiplication.
    """
    gpu = is_gpu(device)
    source = torch.empty(2 ** (30 if gpu else 28), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copying = _median(lambda: target.copy_(source), device)
    size = 8192 if gpu else 1024
    a = torch.randn(size, size, device=device).to(as_dtype(dtype))
    b, out = torch.randn_like(a), torch.empty_like(a)
    multiplying = _median(lambda: torch.mm(a, b, out=out), device)
    return {
        "copy_bandwidth_bytes_per_s": 2 * source.numel() / copying,
        "matrix_product_size": size,
        "matrix_product_operations_per_s": 2 * size**3 / multiplying,
    }


def floor(shape: Shape, tokens: int, item: int, measured: dict[str, float]) -> dict[str, float]:
    """Least time of a scan that gives ``y``, the measurements of every token and the final state.

    Bytes: every input (x, B, C, dt) read once, every output written once. Operations on the matrix units, for
    ``h`` heads of ``k`` keys and ``v`` values: ``2 h (5 k v + 64 (2 k + 2 v))`` a token, as our kernel works.

    Parameters
    ----------
    shape : Shape
        One layer of it.
    tokens : int
        How many.
    item : int
        Bytes of a number in the inputs' dtype.
    measured : dict
        What :func:`rates` returned.
    """
    h, k, v = shape.heads, shape.key, shape.value
    inputs = tokens * item * (h * v + 2 * k + h)
    outputs = tokens * (item * h * v + 4 * FIELDS * h) + 4 * h * k * v
    operations = tokens * 2 * h * (5 * k * v + CHUNK * (2 * k + 2 * v))
    bytes_ms = 1e3 * (inputs + outputs) / measured["copy_bandwidth_bytes_per_s"]
    operations_ms = 1e3 * operations / measured["matrix_product_operations_per_s"]
    return {
        "bytes": inputs + outputs,
        "bytes_ms": bytes_ms,
        "operations": operations,
        "operations_ms": operations_ms,
        "ms": max(bytes_ms, operations_ms),
    }


def compare(row: dict[str, Any], least: dict[str, float]) -> dict[str, float]:
    """Add what a timed row takes (on the device, where that is known) as a multiple of the least time."""
    taken = row.get("device_median_ms", row["median_ms"])
    return least | {
        "measured_ms": taken,
        "measured_over_bytes": taken / least["bytes_ms"],
        "measured_over_operations": taken / least["operations_ms"],
        "measured_over_floor": taken / least["ms"],
    }


def _median(work: Any, device: str) -> float:
    seconds = [device_seconds(work) if is_gpu(device) else host_seconds(work, device) for _ in range(13)]
    return statistics.median(seconds[3:])
