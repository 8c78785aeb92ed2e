# SPDX-License-Identifier: Apache-2.0
"""Mapped files: what was read is given back, and reads the same again."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from discquant.formats.mapped import forget_pages, map_file

SIZE = 32 << 20


def _resident_file_pages() -> int:
    """Bytes of mapped files that are resident in this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_what_was_read_is_given_back(tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(bytes(range(256)) * (SIZE // 256))
    view = map_file(file)
    before = _resident_file_pages()
    total = int(view.sum(dtype=np.int64))
    assert _resident_file_pages() - before > SIZE // 2
    forget_pages(view)
    assert _resident_file_pages() - before < SIZE // 8
    assert int(view.sum(dtype=np.int64)) == total == 255 * SIZE // 2


def test_nothing_to_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain array, and a system without the call."""
    forget_pages(np.zeros(4, dtype=np.uint8))
    monkeypatch.delattr(mmap, "MADV_DONTNEED", raising=False)
    forget_pages(np.zeros(4, dtype=np.uint8))
