"""From what a user calls a text to token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

BYTES = "bytes"
"""Name of :class:`ByteTokenizer`, as a tokenizer argument and in a checkpoint's configuration."""


class ByteTokenizer:
    """Token id = value of the UTF-8 byte; no special tokens."""

    vocab_size = 256

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Encode a text."""
        return {"input_ids": list(text.encode("utf-8"))}

    def decode(self, ids: Any) -> str:
        """Decode token ids; bytes that are no UTF-8 become the replacement character."""
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")


def to_token_ids(text: Any, tokenizer: Any, model: nn.Module) -> Tensor:
    """Turn a text or token ids into a batch of token ids.

    Parameters
    ----------
    text : str, list, array or Tensor
        A text, or integer token ids, (time,) or (batch, time).
    tokenizer : object, str or None
        See :func:`find_tokenizer`; used for a string only.
    model : nn.Module
        Its vocabulary bounds the ids.

    Returns
    -------
    Tensor, (batch, time), int64, on the CPU

    Raises
    ------
    ValueError, TypeError
        Names ``text`` or ``tokenizer``, what was given and what to do.
    """
    if isinstance(text, str):
        if not text:
            raise ValueError("text is empty; expected at least one token")
        text = find_tokenizer(tokenizer, model)(text)["input_ids"]
    ids = _as_array(text)
    if ids.ndim == 0:
        raise TypeError(f"text is a {type(text).__name__}; expected a string or a sequence of token ids")
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2:
        raise ValueError(f"text has {ids.ndim} dimensions; expected token ids (time,) or (batch, time)")
    if ids.size == 0:
        raise ValueError(f"text is empty (shape {ids.shape}); expected at least one token")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"text has dtype {ids.dtype}; expected integer token ids")
    vocabulary = vocabulary_size(model)
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocabulary:
        bad = lowest if lowest < 0 else highest
        where = tuple(int(i) for i in np.argwhere(ids == bad)[0])
        raise ValueError(
            f"text has token id {bad} at (sequence, token) {where}; this model's vocabulary has ids 0 to"
            f" {vocabulary - 1}; was it encoded with another model's tokenizer?"
        )
    return torch.from_numpy(ids.astype(np.int64))


def find_tokenizer(tokenizer: Any, model: nn.Module) -> Any:
    """Find the tokenizer of a model.

    Parameters
    ----------
    tokenizer : object, str or None
        A transformers tokenizer; ``"bytes"``; a hub id, folder or ``tokenizer.json`` file; or None for
        the one that belongs to the model: bundled checkpoints name theirs, others are looked for where
        the model was loaded from.
    model : nn.Module
        The model.

    Raises
    ------
    ValueError
        If none is found; names ``tokenizer``.
    """
    config = getattr(model, "config", None)
    if tokenizer is None:
        tokenizer = getattr(config, "statescope_tokenizer", None) or getattr(config, "_name_or_path", None)
        if not tokenizer:
            raise ValueError(_NONE_FOUND)
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    if str(tokenizer) == BYTES:
        return ByteTokenizer()
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if Path(tokenizer).is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    try:
        return AutoTokenizer.from_pretrained(str(tokenizer))
    except (OSError, ValueError) as error:
        raise ValueError(f"{_NONE_FOUND} (looked in {str(tokenizer)!r})") from error


_NONE_FOUND = (
    "tokenizer is not known for this model, so a string cannot be read; pass tokenizer= (a transformers"
    " tokenizer, a hub id, a folder, a tokenizer.json or 'bytes') or token ids as text"
)


def _as_array(text: Any) -> NDArray[Any]:
    if isinstance(text, Tensor):
        if text.is_floating_point():  # bfloat16 has no numpy counterpart
            raise TypeError(f"text has dtype {text.dtype}; expected integer token ids")
        return text.detach().cpu().numpy()
    if isinstance(text, np.ndarray):
        return text
    if isinstance(text, list | tuple) and any(isinstance(t, str) for t in text):
        raise TypeError("text is a list of strings; trace them one by one, or pass token ids of one length")
    try:
        return np.asarray(text)
    except ValueError as error:
        raise ValueError("text holds sequences of different lengths; trace them one by one") from error


def vocabulary_size(model: nn.Module) -> int:
    """Number of token ids that a model can read."""
    if hasattr(model, "get_input_embeddings"):
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    else:  # mamba_ssm has no such method
        embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
        if embedding is None:
            raise ValueError(f"model is a {type(model).__name__} without an embedding of token ids")
    return int(embedding.weight.shape[0])
