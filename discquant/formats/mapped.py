# SPDX-License-Identifier: Apache-2.0
"""Files mapped for reading. What was read stays in this process's resident memory until it is forgotten."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

Bytes = np.memmap[Any, np.dtype[np.uint8]]


def map_file(path: Path) -> Bytes:
    """Return the bytes of a file, uint8, [size], read when they are looked at."""
    return np.memmap(path, dtype=np.uint8, mode="r")


def forget_pages(*views: np.ndarray[Any, Any]) -> None:
    """Give back the memory of what was read of mapped files; a later look reads it again. Nothing on other systems.

    Args:
        views: From `map_file`, or a `np.memmap` that a library made.
    """
    advice = getattr(mmap, "MADV_DONTNEED", None)  # not on every system
    for view in views:
        area = getattr(view, "_mmap", None)
        if advice is not None and area is not None:
            area.madvise(advice)
