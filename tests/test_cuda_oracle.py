"""Outputs of mamba_ssm's own CUDA and Triton kernels, recorded on a GPU, reproduced by the recurrence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import skip
from torch import Tensor
from torch.nn.functional import silu, softplus

from statescope.adapters.mamba2 import read_chunk_scan
from statescope.recurrence import Recurrence
from statescope.scan import BACKENDS, choose, scan

HEAD = 0
"""The head of the recorded cases whose A is negative; mamba_ssm clamps the decay of the other one."""


@pytest.fixture(scope="module")
def cases(shared: Path) -> dict[str, Any]:
    path = shared / "data" / "oracles" / "mamba_ssm_cuda" / "mamba_reference_cases.json"
    if not path.is_file():
        skip(f"{path} is absent")
    return json.loads(path.read_text())


def tensors(case: dict[str, Any]) -> dict[str, Any]:
    """Inputs and outputs of a case by name."""
    return {
        name: torch.tensor(x["data"], dtype=torch.float32).reshape(x["shape"]) if isinstance(x, dict) else x
        for part in ("inputs", "outputs")
        for name, x in case[part].items()
    }


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(
        got.float(), want, rtol=2e-3, atol=2e-3
    )  # the recorded kernels multiply in tf32


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def run(recurrence: Recurrence, backend: str) -> Any:
    """Run on a backend, or skip where it needs a GPU."""
    try:
        choose(recurrence, backend)
    except ValueError as reason:
        skip(str(reason))
    return scan(recurrence, backend=backend)


def test_combined_scan(cases: dict[str, Any], backend: str) -> None:
    """The other recorded case, combined_varlen, has negative dt, where mamba_ssm clamps."""
    c = tensors(cases["ssd_combined"]["combined_full"])
    assert c["A"][HEAD] < 0
    call = read_chunk_scan(
        False, c["X"], c["dt"], c["A"], c["B"], c["C"], c["chunk_size"],
        dt_bias=c["dt_bias"], initial_states=c["initial_states"], dt_softplus=True,
    )  # fmt: skip
    output = run(call.recurrence, backend)
    y = (output.y + c["D"] * c["X"]) * silu(c["z"])
    close(y[:, :, HEAD], c["y"][:, :, HEAD])
    close(output.final_state[:, HEAD].transpose(-2, -1), c["final_states"][:, HEAD])


@pytest.mark.parametrize("name", ["chunk_scan_vector_D", "chunk_scan_matrix_D_z"])
def test_chunk_scan(cases: dict[str, Any], name: str, backend: str) -> None:
    """Two chunks, each with a recorded entering state."""
    c = tensors(cases["ssd_components"][name])
    run_sum, dt = c["dA_cumsum"], c["dt"]  # (batch, heads, chunks, chunk)
    chunk = run_sum.shape[-1]
    for i in range(run_sum.shape[2]):
        log_decay = torch.diff(run_sum[:, :, i], dim=-1, prepend=torch.zeros_like(run_sum[:, :, i, :1]))
        part = slice(i * chunk, (i + 1) * chunk)
        output = run(
            Recurrence(
                q=c["C"][:, part], k=c["B"][:, part], v=c["x"][:, part],
                log_decay=log_decay.transpose(1, 2), write_scale=dt[:, :, i].transpose(1, 2),
                initial_state=c["states"][:, i].transpose(-2, -1),
            ),
            backend,
        )  # fmt: skip
        d = c["D"] if c["D"].ndim == 2 else c["D"][:, None]
        y = output.y + d * c["x"][:, part]
        y = y * silu(c["z"][:, part]) if "z" in c else y
        falling = (log_decay[:, :, 1:] <= 0).all(-1)  # where it rises, mamba_ssm clamps
        assert falling.any()
        close(y.transpose(1, 2)[falling], c["y"][:, part].transpose(1, 2)[falling])


def test_chunk_states(cases: dict[str, Any], backend: str) -> None:
    c = tensors(cases["ssd_components"]["chunk_state"])
    run_sum = c["dA_cumsum"]
    chunk = run_sum.shape[-1]
    for i in range(run_sum.shape[2]):
        log_decay = torch.diff(run_sum[:, :, i], dim=-1, prepend=torch.zeros_like(run_sum[:, :, i, :1]))
        part = slice(i * chunk, (i + 1) * chunk)
        output = run(
            Recurrence(
                q=c["B"][:, part], k=c["B"][:, part], v=c["x"][:, part],
                log_decay=log_decay.transpose(1, 2), write_scale=c["dt"][:, :, i].transpose(1, 2),
            ),
            backend,
        )  # fmt: skip
        falling = (log_decay[:, :, 1:] <= 0).all(-1)
        assert falling.any()
        close(output.final_state.transpose(-2, -1)[falling], c["states"][:, i][falling])


@pytest.mark.parametrize(("name", "use_softplus"), [("baseline_full", True), ("grouped", False)])
def test_state_update(cases: dict[str, Any], name: str, use_softplus: bool) -> None:
    """One token of Mamba-1, every channel a head with a decay per key."""
    c = tensors(cases["selective_state_update"][name])
    batch, channels, key = c["x"].shape[0], c["x"][0].numel(), c["B"].shape[-1]
    dt = c["dt"] + c["dt_bias"]
    dt = (softplus(dt) if use_softplus else dt).reshape(batch, 1, channels)
    output = scan(
        Recurrence(
            q=c["C"].reshape(batch, 1, -1, key),
            k=c["B"].reshape(batch, 1, -1, key),
            v=c["x"].reshape(batch, 1, channels, 1),
            log_decay=dt[..., None] * c["A"].reshape(channels, key),
            write_scale=dt,
            initial_state=c["state"].reshape(batch, channels, key, 1),
        )
    )
    y = output.y.reshape(c["y"].shape)
    y = (y + c["D"] * c["x"]) * silu(c["z"]) if "z" in c else y
    close(y, c["y"])
    close(output.final_state.reshape(c["updated_state"].shape), c["updated_state"])


@pytest.mark.parametrize(
    ("name", "use_softplus"), [("minimal", False), ("time_varying_3d", True), ("full", True)]
)
def test_selective_scan(cases: dict[str, Any], name: str, use_softplus: bool) -> None:
    """Mamba-1 over time, (batch, channels, time): every channel a head with a decay per key."""
    c = tensors(cases["selective_scan"][name])
    batch, channels, time = c["u"].shape
    delta = c["delta"] + c["delta_bias"][:, None] if "delta_bias" in c else c["delta"]
    delta = (softplus(delta) if use_softplus else delta).transpose(1, 2)

    def over_time(x: Tensor) -> Tensor:
        """To (batch, time, groups, key), from one row per channel or from (batch, key, time)."""
        return x.expand(batch, time, channels, -1) if x.ndim == 2 else x.transpose(1, 2)[:, :, None]

    output = scan(
        Recurrence(
            q=over_time(c["C"]),
            k=over_time(c["B"]),
            v=c["u"].transpose(1, 2)[..., None],
            log_decay=delta[..., None] * c["A"],
            write_scale=delta,
        )
    )
    y = output.y[..., 0].transpose(1, 2)
    y = y + c["D"][:, None] * c["u"] if "D" in c else y
    close(y * silu(c["z"]) if "z" in c else y, c["y"])
