"""What a worker's process holds of the memory, kept flat over thousands of texts.

Texts of all lengths leave the C library's heap in pieces that it keeps: a worker that uses 500 MB may hold
three times that after some hundred texts. To hand every piece back at once, as Dask has its workers do, takes
as long as the reading; to ask for it now and then takes a tenth of a second.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

SLACK = 1.3
"""Memory, over the least so far, from which on what lies idle is handed back."""


class Held:
    """Follows the memory of this process.

    Parameters
    ----------
    resident : callable
        Says how much it holds, in bytes.
    hand_back : callable
        Has the C library hand back what lies idle.
    """

    def __init__(self, resident: Callable[[], int], hand_back: Callable[[], object]) -> None:
        self._resident, self._hand_back, self._least = resident, hand_back, 0

    def now(self) -> int:
        """Return the bytes that are held, after handing back what lies idle if they have become many."""
        found = self._resident()
        if found > SLACK * self._least:
            self._hand_back()
            found = self._resident()
            self._least = found  # what is used may have grown
        self._least = min(self._least, found)
        return found


@cache
def of_this_process() -> Held:
    """Return the one that follows this process."""
    import psutil

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    resident = psutil.Process().memory_info
    return Held(lambda: int(resident().rss), (lambda: trim(0)) if trim is not None else lambda: None)
