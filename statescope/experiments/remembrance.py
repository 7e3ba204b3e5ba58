r"""Effective remembrance: how much of a prediction rests on what lies further back.

The same end of a text is read twice, with all that stands before it and with its last tokens only, from an
empty state. How far the two predictions lie apart is what the rest was good for, or what it spoilt.

Source: *Understanding and Improving Length Generalization in Recurrent Models* (arXiv 2507.02782),
which counts the tokens left out, :math:`T - t` here; the distance is total variation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from statescope import caches
from statescope.capture import capture
from statescope.carry import Carry
from statescope.experiments.passkey import PASS_TOKENS, our_scan, segments
from statescope.live import resolve
from statescope.tokens import to_token_ids

ROWS = 1024
"""Tokens, all sequences together, whose logits are held at once."""


def remembrance(
    model: nn.Module | str | Path,
    text: Any,
    lengths: Iterable[int],
    *,
    ends: Iterable[int] | int = -1,
    tokenizer: Any = None,
    train_length: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Compare what a model predicts from a whole text with what it predicts from its last tokens.

    .. math:: \tfrac{1}{2} \sum_x \big| p(x \mid x_{\le T}) - p(x \mid x_{T-t+1 \dots T}) \big|

    Parameters
    ----------
    model : transformers or mamba_ssm model, str or Path
        As for :func:`statescope.trace`.
    text : str, or integers (token,) or (sequence, token)
        As for :func:`statescope.trace`.
    lengths : iterable of int
        Numbers of last tokens :math:`t`, the one at the end included.
    ends : int or iterable of int
        Tokens :math:`T` after which the next one is predicted; negative ones count from the text's end.
        Default: the last. Several say how much it varies.
    tokenizer : optional
        As for :func:`statescope.trace`.
    train_length : int, optional
        In tokens; kept for the figure. Default: the checkpoint's own word.
    device, dtype : optional
        Where and in which floating dtype to load a model that is given by name.
    progress : bool, optional
        Show a progress bar. Default: on a terminal, for work that takes longer than a second.

    Returns
    -------
    Dataset, (sequence, end, length)
        ``remembrance``, between 0 (what lies further back changes nothing) and 1 (no token is likely in
        both). NaN where the text up to an end is shorter than a length.

    Raises
    ------
    ValueError, TypeError
        For what does not fit; names the argument.

    Notes
    -----
    Trouble: far above 0 for lengths as long as the training length: the prediction still rests on states that
    only a longer text reaches. Near 0 for all is no proof of health: the model may use only the last tokens.
    Our scan runs in the place of the model's. Windows of one length are read as a batch, the whole text once,
    segment by segment: memory does not grow with it.
    """
    model, model_id = resolve(model, device, dtype)
    ids = to_token_ids(text, tokenizer, model).to(next(model.parameters()).device)
    sizes, places = _check(lengths, ends, ids.shape[1])
    found = np.full((len(ids), len(places), len(sizes)), np.nan, np.float32)
    total = len(ids) * (max(places) + 1 + sum(n for n in sizes for p in places if n <= p + 1))
    disable = None if progress is None else not progress
    with (
        torch.no_grad(),
        capture(model, our_scan),
        tqdm(total=total, unit="tok", unit_scale=True, disable=disable, delay=1.0, leave=False) as bar,
    ):
        whole = _at_ends(model, ids, places, bar)
        for k, size in enumerate(sizes):
            for sequence, place in _together(ids, places, size):
                windows = [
                    ids[s, places[i] + 1 - size : places[i] + 1] for s, i in zip(sequence, place, strict=True)
                ]
                apart = (_at_last(model, torch.stack(windows), bar) - whole[sequence, place]).abs().sum(
                    -1
                ) / 2
                found[sequence, place, k] = apart.cpu().numpy()
    about = {"long_name": "effective remembrance (total variation)", "units": "1"}
    known = train_length or getattr(model.config, "train_length", None)
    coords = {
        "end": ("end", list(places), {"long_name": "last token read", "units": "1"}),
        "length": ("length", sizes, {"long_name": "last tokens read alone", "units": "token"}),
    }
    return xr.Dataset(
        {"remembrance": (("sequence", "end", "length"), found, about)},
        coords,
        {"model_id": model_id, "train_length": known, "tokens": ids.shape[1]},
    )


def _check(lengths: Iterable[int], ends: Iterable[int] | int, tokens: int) -> tuple[list[int], list[int]]:
    sizes, places = list(lengths), [ends] if isinstance(ends, int) else list(ends)
    for name, given in (("lengths", sizes), ("ends", places)):
        wrong = [n for n in given if isinstance(n, bool) or not isinstance(n, int | np.integer)]
        if wrong or not given:
            raise ValueError(f"{name} holds {wrong[0]!r}; expected integers" if wrong else f"{name} is empty")
    for end in places:
        if not -tokens <= end < tokens:
            raise ValueError(f"ends names token {end}; the text has tokens 0 to {tokens - 1}")
    places = sorted({int(n) % tokens for n in places})
    for size in sizes:
        if not 1 <= size <= places[-1] + 1:
            raise ValueError(
                f"lengths holds {size}; expected 1 to {places[-1] + 1} tokens, up to the last end"
            )
    return sorted({int(n) for n in sizes}), places


def _together(ids: Tensor, places: list[int], size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Sequences and ends whose windows are read as one batch."""
    some = max(1, _pass_tokens(ids) // size)
    pairs = [(s, i) for s in range(len(ids)) for i, p in enumerate(places) if size <= p + 1]
    for first in range(0, len(pairs), some):
        sequence, place = zip(*pairs[first : first + some], strict=True)
        yield list(sequence), list(place)


def _at_ends(model: Any, ids: Tensor, places: list[int], bar: Any) -> Tensor:
    """Predictions after every end, (sequence, end, vocabulary), of one reading of the text."""
    cache, position, found = Carry.fresh(model).cache, 0, []
    for part in segments(ids[:, : places[-1] + 1], max(64, ROWS // len(ids))):
        inside = [p - position for p in places if position <= p < position + part.shape[1]]
        inputs = caches.inputs(model, cache, position, part) | ({} if inside else caches.only_last(model))
        logits = model(part, **inputs).logits
        found += [logits[:, p].float().softmax(-1) for p in inside]
        position += part.shape[1]
        bar.update(part.numel())
    return torch.stack(found, 1)


def _at_last(model: Any, ids: Tensor, bar: Any) -> Tensor:
    """Predictions after the last token, (batch, vocabulary), read from an empty state."""
    cache, position = Carry.fresh(model).cache, 0
    for part in segments(ids, max(64, _pass_tokens(ids) // len(ids))):
        inputs = caches.inputs(model, cache, position, part) | caches.only_last(model)
        logits = model(part, **inputs).logits
        position += part.shape[1]
        bar.update(part.numel())
    return logits[:, -1].float().softmax(-1)


def _pass_tokens(ids: Tensor) -> int:
    return PASS_TOKENS.get(ids.device.type, PASS_TOKENS["cuda"])
