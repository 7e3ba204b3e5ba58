"""The record's names: groups, variables, dimensions, units. Numpy and the standard library only."""

from __future__ import annotations

from dataclasses import dataclass

SCHEMA_VERSION = 1
"""Raised when a reader of the former version would misread a record."""

PER_STEP = ("sequence", "layer", "token", "head")
PER_PROBE = ("sequence", "layer", "probe", "token", "head")
AT_PROBE = ("sequence", "layer", "probe", "head")

ROOT_ATTRIBUTES = (
    "schema_version",
    "created_at",
    "statescope_version",
    "model_id",
    "model_type",
    "train_length",
    "dtype",
    "backend",
    "outputs",
    "segment",
    "versions",
    "watch",
    "tokens",
    "committed",
    "complete",
)
"""Attributes every record has at its root."""


@dataclass(frozen=True)
class Variable:
    """One variable of the record."""

    dims: tuple[str, ...]
    long_name: str
    units: str
    dtype: str = "float32"
    attrs: tuple[tuple[str, str], ...] = ()


GROUPS: dict[str, dict[str, Variable]] = {
    "tokens": {
        "token_id": Variable(("sequence", "token"), "token read", "1", "int64"),
        "loss": Variable(("sequence", "token"), "loss of predicting this token from those before it", "nat"),
    },
    "steps": {
        "log_decay": Variable(PER_STEP, "log of the decay applied to the state before this token", "nat"),
        "write_norm": Variable(PER_STEP, "norm of what this token writes into the state", "1"),
        "state_norm": Variable(PER_STEP, "Frobenius norm of the state after this token", "1"),
        "state_mean": Variable(PER_STEP, "mean entry of the state after this token", "1"),
        "write_overlap": Variable(PER_STEP, "cosine between the write and the decayed state", "1"),
    },
    "snapshots": {
        "state": Variable(
            ("sequence", "layer", "position", "head", "key", "value"), "state after this position", "1"
        ),
    },
    "probes": {
        "contribution": Variable(PER_PROBE, "norm of what survives of this token's write at the probe", "1"),
        "share": Variable(
            PER_PROBE, "signed share of this token's write in the state's energy at the probe", "1"
        ),
        "attention": Variable(PER_PROBE, "implicit attention of the probe to this token, signed", "1"),
        "output_contribution": Variable(PER_PROBE, "norm of this token's part of the probe's output", "1"),
        "output_share": Variable(PER_PROBE, "signed share of this token in the probe's output", "1"),
        "share_before": Variable(AT_PROBE, "share of everything written before the probe's reach", "1"),
        "output_share_before": Variable(
            AT_PROBE, "share in the output of everything written before the probe's reach", "1"
        ),
        "output_norm": Variable(AT_PROBE, "norm of what the probe's query reads of the state", "1"),
    },
}
"""Variables by group; ``snapshots`` and ``probes`` are present where they were asked for."""

READ_BY_QUERY = ("attention", "output_contribution", "output_share", "output_share_before", "output_norm")
"""Variables of ``probes`` that early records, made before these were added, have none of."""

STATE_NORM_MAX = Variable(PER_STEP, "largest Frobenius norm of the state within the window", "1")

ERASED: dict[str, Variable] = {
    "erase_norm": Variable(PER_STEP, "norm of what this token erases along its key", "1"),
    "erase_strength": Variable(PER_STEP, "part erased of what the key reads", "1"),
}
"""Variables of ``steps`` of models with the delta rule; early records have neither."""

COORDINATES: dict[str, Variable] = {
    "sequence": Variable(("sequence",), "sequence of the batch", "1", "int64"),
    "layer": Variable(("layer",), "depth in the model", "1", "int64"),
    "token": Variable(("token",), "last token absorbed", "1", "int64"),
    "head": Variable(("head",), "head", "1", "int64"),
    "probe": Variable(("probe",), "token whose state is attributed", "1", "int64"),
    "position": Variable(("position",), "token after which the state was kept", "1", "int64"),
    "key": Variable(("key",), "row of the state", "1", "int64"),
    "value": Variable(("value",), "column of the state", "1", "int64"),
}
"""Coordinates by dimension."""


def group_variables(group: str, window: int = 1, erases: bool = False) -> dict[str, Variable]:
    """List the variables of a group, those of windows and of the delta rule included."""
    variables = dict(GROUPS[group])
    if group == "steps" and window > 1:
        variables["state_norm_max"] = STATE_NORM_MAX
    if group == "steps" and erases:
        variables |= ERASED
    return variables
