"""``trace``: one call from a model and a text to a record."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import nn
from tqdm.auto import tqdm

from statescope import caches, record
from statescope.anatomy import survey
from statescope.capture import mixers
from statescope.carry import AHEAD, Carry
from statescope.claims import as_place, claim
from statescope.live import resolve
from statescope.memory import MemoryRecord
from statescope.plan import Plan
from statescope.reader import Edit, Reader
from statescope.recorder import Recorder, Writer
from statescope.scan import BACKENDS
from statescope.store import RecordWriter, StoreLike
from statescope.tokens import to_token_ids
from statescope.watch import Probes, Watch

SEGMENT = {"cpu": 2048, "gpu": 16384, "large gpu": 65536}
"""Tokens of one forward pass, unless said otherwise."""

LARGE_GPU = 64 * 2**30
"""Bytes of memory from which a GPU counts as large."""


def trace(
    model: nn.Module | str | Path,
    text: Any,
    *,
    tokenizer: Any = None,
    store: StoreLike | None = None,
    layers: Iterable[int] | int | None = None,
    heads: Iterable[int] | int | None = None,
    snapshots: Iterable[int] | int | None = None,
    probes: Iterable[int] | int | Probes | None = None,
    window: int = 1,
    segment: int | None = None,
    backend: str = "auto",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    train_length: int | None = None,
    edit: Edit | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> xr.DataTree:
    r"""Read a text with a model and record its recurrent states.

    For every layer, head and token: how large the state is, how much it forgets, what the token writes
    and how that lies to what is stored already (:class:`statescope.kernels.interface.Steps`). The model
    is not changed, and with ``backend="auto"`` its outputs are those of an untraced run, bit for bit.

    Parameters
    ----------
    model : transformers or mamba_ssm model, str or Path
        A live model in evaluation mode, or what :func:`statescope.load` takes. Of mamba_ssm a
        ``MambaLMHeadModel`` with Mamba-1 or Mamba-2 layers, read as without their fused path.
    text : str, or integers (token,) or (sequence, token)
        A text, or token ids as list, array or tensor.
    tokenizer : optional
        For a string: a transformers tokenizer, a hub id, a folder, a ``tokenizer.json`` or ``"bytes"``.
        Default: the model's own.
    store : str, Path or zarr store, optional
        Where to write. Default: in memory. An interrupted record of the same call is continued.
    layers, heads : int or sequence of int, optional
        Which to record. Default: all.
    snapshots : int or sequence of int, optional
        Tokens after which the whole state is kept; negative ones count from the end.
    probes : int, sequence of int or Probes, optional
        Tokens at which the state, and what their query reads of it, is attributed to the tokens that made it.
        Where that goes back over more than one segment, the text is read once more, ahead of the trace.
    window : int
        Tokens per entry of ``/steps``; see :mod:`statescope.kernels.windows`. Default 1.
    segment : int, optional
        Tokens of one forward pass (at least 2, rounded up to whole windows); bounds the memory. The
        result does not depend on it. Default 2048 on a CPU, 16384 on a GPU, 65536 on one of 64 GiB and more:
        long enough that launching the work costs less than the work.
    backend : str
        ``"auto"``: the model's own scan computes its outputs, ours only measures; with ``edit``, ours
        computes both. ``"model"``: never ours. A kernel's name (``"fused"``, ``"chunked"``, ``"reference"``):
        it computes outputs and measurements, which is faster on a CPU; outputs then agree to rounding.
    device, dtype : optional
        Where and in which floating dtype to load a model that is given by name.
    train_length : int, optional
        Tokens the model was trained at; recorded for the analyses. Default: the checkpoint's own word.
    edit : callable, optional
        ``edit(layer, recurrence)`` returns the :class:`~statescope.recurrence.Recurrence` to run instead.
    overwrite : bool
        Replace a record that is already there.
    progress : bool, optional
        Show a progress bar. Default: on a terminal, for work that takes longer than a second.

    Returns
    -------
    xarray.DataTree
        The record, opened lazily; see :func:`statescope.open`.

    Raises
    ------
    ValueError, TypeError
        For what does not fit; names the argument.
    FileExistsError, OSError
        For a ``store`` that is taken or cannot be written.

    Warns
    -----
    RuntimeWarning
        If the record holds a value that is not finite; says where the first one is. Our kernels let it reach
        no earlier token; the scan of transformers in torch spreads it back to the start of its segment.

    Notes
    -----
    Source: *Stuffed Mamba* (arXiv 2410.07145), sections 2 and 4.
    """
    model, model_id = resolve(model, device, dtype)
    mixers(model)  # a model without any is refused before its text is looked at
    ids = to_token_ids(text, tokenizer, model)
    plan = prepare(
        model,
        model_id,
        ids,
        layers=layers,
        heads=heads,
        snapshots=snapshots,
        probes=probes,
        window=window,
        segment=segment,
        backend=backend,
        train_length=train_length,
        edit=edit,
    )
    if store is None:
        memory = MemoryRecord(plan.layout, plan.attributes(), ids.numpy())
        _warn_of_nonfinite(run(plan, lambda: memory, progress))
        return memory.tree()
    place = as_place(store)
    fingerprint = plan.fingerprint()
    root = claim(place, fingerprint, overwrite)
    resumed = None if root is None else RecordWriter.resume(place, root, plan.layout)
    groups: dict[str, xr.Dataset] = {}

    def open_writer() -> RecordWriter:
        attributes = {**plan.attributes(), "fingerprint": fingerprint()}
        return resumed or RecordWriter.create(place, plan.layout, attributes, ids.numpy())

    def while_writing() -> None:
        groups.update(record.open_groups(place))

    kept = None if resumed is None else resumed.read_carry()
    attributes = run(plan, open_writer, progress, while_writing, on_disk=True, kept=kept)
    _warn_of_nonfinite(attributes)
    return record.assemble(groups, attributes)


def prepare(
    model: nn.Module,
    model_id: str,
    ids: torch.Tensor,
    *,
    layers: Iterable[int] | int | None = None,
    heads: Iterable[int] | int | None = None,
    snapshots: Iterable[int] | int | None = None,
    probes: Iterable[int] | int | Probes | None = None,
    window: int = 1,
    segment: int | None = None,
    backend: str = "auto",
    train_length: int | None = None,
    edit: Edit | None = None,
) -> Plan:
    """Settle what a trace of token ids comes to; arguments and errors are those of :func:`trace`."""
    _check_numbers(segment=segment, train_length=train_length)
    device = next(model.parameters()).device
    anatomy = survey(model, ids.to(device), _kernel_choice(backend, edit))
    watch = Watch.resolve(
        tokens=ids.shape[1],
        model_layers=anatomy.layers,
        model_heads=anatomy.heads,
        layers=layers,
        heads=heads,
        snapshots=snapshots,
        probes=probes,
        window=window,
    )
    own_outputs = backend == "model" or (backend == "auto" and edit is None)
    asked = max(segment or min(usual_segment(device), caches.longest_pass(model)), 2)
    length = -(-min(asked, ids.shape[1]) // window) * window
    plan = Plan(model, model_id, ids, watch, anatomy, own_outputs, edit, length, train_length)
    if plan.stop_after(0) < ids.shape[1]:
        caches.refuse_segments(model)
    return plan


def run(
    plan: Plan,
    open_writer: Callable[[], Writer],
    progress: bool | None,
    while_writing: Callable[[], None] = lambda: None,
    on_disk: bool = False,
    kept: bytes | None = None,
) -> dict[str, Any]:
    """Read, measure and record; return the record's attributes."""
    reader = Reader(
        plan.model,
        plan.ids,
        plan.watch,
        plan.anatomy.backend,
        plan.own_outputs,
        plan.edit,
        plan.layout.erases,
        plan.lengths,
    )
    tokens = plan.ids.shape[1]
    carry = Carry.fresh(plan.model) if kept is None else Carry.from_bytes(kept, plan.model, reader.device)
    ahead = plan.tokens_to_read_ahead() if kept is None else 0
    disable = None if progress is None else not progress
    total = (tokens + ahead) * len(plan.ids)
    with (
        tqdm(total=total, unit="tok", unit_scale=True, disable=disable, delay=1.0, leave=False) as bar,
        reader.attached(),
    ):
        bar.update(carry.position * len(plan.ids))
        if ahead:
            carry = _read_ahead(plan, reader, ahead, bar)
        with Recorder(open_writer, on_disk, plan.layout, plan.watch, reader.device) as recorder:
            while (start := carry.position) < tokens:
                end = plan.commit_after(start)
                recorder.begin(start, end)
                while (start := carry.position) < end:
                    reader.read(carry, plan.stop_after(start), recorder)
                    bar.update((carry.position - start) * len(plan.ids))
                recorder.commit(None if end == tokens else carry.freeze() if on_disk else bytes)
            while_writing()
        return recorder.writer.attributes


def _read_ahead(plan: Plan, reader: Reader, tokens: int, bar: Any) -> Carry:
    ahead = Carry.fresh(plan.model)
    while ahead.position < tokens:
        start, stop = ahead.position, plan.stop_after(ahead.position)
        reader.read_ahead(ahead, stop)
        bar.update((min(stop, tokens) - start) * len(plan.ids))
    carry = Carry.fresh(plan.model)
    for name in AHEAD:
        setattr(carry, name, getattr(ahead, name))
    return carry


def usual_segment(device: torch.device) -> int:
    """Tokens of one forward pass on a device."""
    if device.type != "cuda":
        return SEGMENT["cpu"]
    large = torch.cuda.get_device_properties(device).total_memory >= LARGE_GPU
    return SEGMENT["large gpu" if large else "gpu"]


def _kernel_choice(backend: str, edit: Edit | None) -> str:
    if backend == "model" and edit is not None:
        raise ValueError(
            "backend='model' leaves the scan to the model, which an edit cannot reach; use 'auto'"
        )
    if backend not in ("auto", "model", *BACKENDS):
        raise ValueError(f"backend={backend!r} is unknown; choose one of: auto, model, {', '.join(BACKENDS)}")
    if edit is not None and not callable(edit):
        raise TypeError(f"edit is a {type(edit).__name__}; expected a function of (layer, recurrence)")
    return backend


def _check_numbers(**given: Any) -> None:
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r}; expected a number of tokens, 1 or more")


def _warn_of_nonfinite(attributes: Mapping[str, Any]) -> None:
    first = attributes.get("first_nonfinite")
    if first:
        place = ", ".join(f"{k} {v}" for k, v in first.items() if k != "variable")
        warnings.warn(
            f"the record holds non-finite values; the first is in {first['variable']} at {place}",
            RuntimeWarning,
            stacklevel=3,
        )
