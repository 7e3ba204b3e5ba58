"""``trace``: one call from a model and a text to a record."""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from statescope import caches, record
from statescope.capture import mixers
from statescope.carry import AHEAD, Carry
from statescope.memory import MemoryRecord
from statescope.models import digest, resolve, settings_of
from statescope.reader import Anatomy, Edit, Reader, survey
from statescope.recorder import Recorder, Writer
from statescope.scan import BACKENDS
from statescope.schema import SCHEMA_VERSION
from statescope.store import Layout, RecordWriter, StoreLike, as_place, claim, shard_tokens
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
        ``MambaLMHeadModel`` with Mamba-2 layers, read as with ``use_mem_eff_path=False``.
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
        Tokens at which the state is attributed to the tokens that made it. Where that goes back over more
        than one segment, the text is read once more, ahead of the trace.
    window : int
        Tokens per entry of ``/steps``; see :func:`statescope.watch.thin`. Default 1.
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
    _check_numbers(segment=segment, train_length=train_length)
    model, model_id = resolve(model, device, dtype)
    mixers(model)  # a model without any is refused before its text is looked at
    ids = to_token_ids(text, tokenizer, model)
    anatomy = survey(model, ids.to(next(model.parameters()).device), _kernel_choice(backend, edit))
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
    asked = max(segment or _usual_segment(next(model.parameters()).device), 2)
    length = -(-min(asked, ids.shape[1]) // window) * window
    plan = _Plan(model, model_id, ids, watch, anatomy, own_outputs, edit, length, train_length)
    if plan.stop_after(0) < ids.shape[1]:
        caches.refuse_segments(model)
    if store is None:
        memory = MemoryRecord(plan.layout, plan.attributes(), ids.numpy())
        _warn_of_nonfinite(_run(plan, lambda: memory, progress))
        return memory.tree()
    place = as_place(store)
    fingerprint = plan.fingerprint()
    root = claim(place, fingerprint, overwrite)
    resumed = None if root is None else RecordWriter.resume(place, root, plan.layout)
    groups: dict[str, xr.Dataset] = {}

    def open_writer() -> RecordWriter:
        attributes = {**plan.attributes(), "fingerprint": fingerprint}
        writer = resumed or RecordWriter.create(place, plan.layout, attributes, ids.numpy())
        groups.update(record.open_groups(place))
        return writer

    kept = None if resumed is None else resumed.read_carry()
    attributes = _run(plan, open_writer, progress, on_disk=True, kept=kept)
    _warn_of_nonfinite(attributes)
    return record.assemble(groups, attributes)


@dataclass(frozen=True)
class _Plan:
    """A trace with nothing left open."""

    model: nn.Module
    model_id: str
    ids: Tensor
    watch: Watch
    anatomy: Anatomy
    own_outputs: bool
    edit: Edit | None
    segment: int
    train_length: int | None

    @property
    def layout(self) -> Layout:
        sequences, tokens = self.ids.shape
        row = 4 * sequences * len(self.watch.layers) * len(self.watch.heads)
        return Layout(
            sequences=sequences,
            tokens=tokens,
            layers=self.watch.layers,
            heads=self.watch.heads,
            key=self.anatomy.key,
            value=self.anatomy.value,
            window=self.watch.window,
            snapshots=self.watch.snapshots,
            probes=self.watch.probes,
            shard=shard_tokens(row, self.segment),
        )

    def stop_after(self, start: int) -> int:
        """End of the segment that begins at ``start``; never one token after others.

        transformers reads a single token with a function of its own, which leaves out the limits on the
        step size that some families have.
        """
        tokens = self.ids.shape[1]
        stop = min(start + self.segment, tokens)
        return tokens if stop == tokens - 1 else stop

    def commit_after(self, start: int) -> int:
        """End of the interval that begins at ``start`` and is committed as one."""
        stop = self.stop_after(start)
        while stop < self.ids.shape[1] and stop % self.layout.shard:
            stop = self.stop_after(stop)
        return stop

    def reader(self) -> Reader:
        return Reader(self.model, self.ids, self.watch, self.anatomy.backend, self.own_outputs, self.edit)

    def attributes(self) -> dict[str, Any]:
        config: Any = self.model.config
        train_length = self.train_length or getattr(config, "train_length", None)
        return {
            "schema_version": SCHEMA_VERSION,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "statescope_version": version("statescope-ssm"),
            "model_id": self.model_id,
            "model_type": str(getattr(config, "model_type", type(self.model).__module__.split(".")[0])),
            "train_length": train_length,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "device": str(next(self.model.parameters()).device),
            "backend": self.anatomy.backend,
            "outputs": "model" if self.own_outputs else "statescope",
            "edit": _name_of(self.edit),
            "segment": self.segment,
            "versions": versions(),
            "watch": self.watch.to_json(),
            "tokens": self.ids.shape[1],
            "state_shape": [self.anatomy.key, self.anatomy.value],
            "structure": self.anatomy.structure,
            "first_nonfinite": None,
        }

    def fingerprint(self) -> str:
        """Hash of all that decides the numbers of a record."""
        hashed = hashlib.sha256(self.ids.numpy().tobytes())
        hashed.update(digest(self.model).encode())
        settings = [
            asdict(self.watch), self.anatomy, self.own_outputs, _name_of(self.edit), self.segment,
            tuple(self.ids.shape), settings_of(self.model),
        ]  # fmt: skip
        hashed.update(json.dumps(settings, sort_keys=True, default=str).encode())
        return hashed.hexdigest()


def _run(
    plan: _Plan,
    open_writer: Callable[[], Writer],
    progress: bool | None,
    on_disk: bool = False,
    kept: bytes | None = None,
) -> dict[str, Any]:
    """Read, measure and record; return the record's attributes."""
    tokens, reader = plan.ids.shape[1], plan.reader()
    carry = Carry.fresh(plan.model) if kept is None else Carry.from_bytes(kept, plan.model, reader.device)
    ahead = _tokens_to_read_ahead(plan) if kept is None else 0
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
        return recorder.writer.attributes


def _tokens_to_read_ahead(plan: _Plan) -> int:
    """How far a probe's reach makes it necessary to know the states before the trace; 0 if it does not."""
    crossing = [p for p in plan.watch.probes if plan.watch.probe_start(p) < p // plan.segment * plan.segment]
    return (max(plan.watch.probes) + 1) if crossing else 0


def _read_ahead(plan: _Plan, reader: Reader, tokens: int, bar: Any) -> Carry:
    ahead = Carry.fresh(plan.model)
    while ahead.position < tokens:
        start, stop = ahead.position, plan.stop_after(ahead.position)
        reader.read_ahead(ahead, stop)
        bar.update((min(stop, tokens) - start) * len(plan.ids))
    carry = Carry.fresh(plan.model)
    for name in AHEAD:
        setattr(carry, name, getattr(ahead, name))
    return carry


def _usual_segment(device: torch.device) -> int:
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


def _name_of(function: Any) -> str | None:
    if function is None:
        return None
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "triton", "mamba-ssm", "numpy", "zarr", "xarray"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _warn_of_nonfinite(attributes: Mapping[str, Any]) -> None:
    first = attributes.get("first_nonfinite")
    if first:
        place = ", ".join(f"{k} {v}" for k, v in first.items() if k != "variable")
        warnings.warn(
            f"the record holds non-finite values; the first is in {first['variable']} at {place}",
            RuntimeWarning,
            stacklevel=3,
        )
