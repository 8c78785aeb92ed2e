# SPDX-License-Identifier: Apache-2.0
"""One process at a time in a run directory; the system drops the lock with the process, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from discquant.errors import OutputExistsError

if sys.platform != "win32":
    import fcntl


@contextlib.contextmanager
def locked(folder: Path, *, file: Path | None = None) -> Iterator[None]:
    """Make a folder where there is none, and keep every other process out of it while this is open.

    Args:
        folder: Of the work.
        file: What the work is known by, where that is a file that it will write.

    Raises:
        OutputExistsError: Another process is at work in it.

    Note:
        Nobody is kept out on Windows, nor on a file system without locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                instead = "another folder" if file is None else "another OUT"
                raise OutputExistsError(
                    f"{file or folder}: another process is at work on this run; wait for it, or give {instead}"
                ) from None
        yield
    finally:
        os.close(handle)
