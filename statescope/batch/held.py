"""What a worker's process holds of the memory, kept flat over thousands of texts.

Texts of all lengths leave the C library's heap in pieces that it keeps: a worker that uses 500 MB may hold
three times that after some hundred texts. To hand every piece back at once, as Dask has its workers do, takes
as long as the reading; to ask for it after each piece of work takes some hundredths of a second.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


def resident() -> int:
    """Return the bytes that this process holds."""
    return int(_process().memory_info().rss)


def hand_back() -> None:
    """Have the C library hand back what lies idle, where it can."""
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _process() -> Any:
    import psutil

    return psutil.Process()


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
