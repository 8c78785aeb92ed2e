# SPDX-License-Identifier: Apache-2.0
"""Memory that block states live in outside the compute device: an arena that a GPU can copy from, and mapped files.

Not `pin_memory()`: it rounds up to powers of two (memory.md section 4). Here one anonymous map per block is
registered with CUDA as it is, in one call: a copy over the seam of two registrations is refused as an invalid argument.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from discquant.errors import DiskSpaceError
from discquant.formats.output import FULL

PAGE = mmap.PAGESIZE


@functools.lru_cache
def _trimmer() -> Callable[[int], int] | None:
    """Return the C library's malloc_trim, None where there is none."""
    try:
        found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):
        found = None
    return found


def return_freed() -> None:
    """Give memory that was freed back to the system, which glibc keeps where anything younger lives above it.

    Tensors below 32 MB come from one heap; without this the peak of an earlier stage stays with the process.
    """
    trim = _trimmer()
    if trim is not None:
        trim(0)


def _advise(area: mmap.mmap, advice: str) -> None:
    option = getattr(mmap, advice, None)  # not on every system
    if option is not None:
        area.madvise(option)


def _anonymous(length: int) -> mmap.mmap:
    """Map memory of this process alone: shared memory, the module's own choice, seldom gets huge pages."""
    flags = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    return mmap.mmap(-1, length, flags=flags) if flags else mmap.mmap(-1, length)  # flags: not on Windows


def _launch() -> None:
    """Have the current GPU run a kernel."""
    torch.ones(1, device="cuda").neg_()


def _forget_error() -> None:
    """Discard the error of a call to CUDA that was allowed to fail.

    The runtime keeps it as the thread's last one, and torch, which reads (and so clears) that after every launch, would
    raise it from whatever operator comes next. What is wrong with the device itself stays when it is read: waiting for
    the device raises it here.
    """
    with contextlib.suppress(RuntimeError):
        _launch()
    torch.cuda.synchronize()


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


class HostArena:
    """Anonymous memory of one block, registered with CUDA where `pin` asks for it."""

    def __init__(self, num_bytes: int, pin: bool) -> None:
        """Map `num_bytes`; `problem` says why it could not be pinned, None where it is or need not be."""
        self._map = _anonymous(max(PAGE, -(-num_bytes // PAGE) * PAGE))
        _advise(self._map, "MADV_HUGEPAGE")
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:num_bytes]
        self._unregister: weakref.finalize[[int], HostArena] | None = None
        self.problem = self._register(num_bytes) if pin and num_bytes else None

    def _register(self, num_bytes: int) -> str | None:
        base = self.tensor.data_ptr()
        code = int(torch.cuda.cudart().cudaHostRegister(base, num_bytes, 0))
        if code != 0:
            _forget_error()
            return f"cudaHostRegister of {num_bytes} bytes failed with error {code}"
        # A forked child that shared these pages would have this process write to copies that the device does not know.
        _advise(self._map, "MADV_DONTFORK")
        # Also where nobody closes: CUDA refuses an address that it still knows from a map that is gone.
        self._unregister = weakref.finalize(self, _unregister, base)
        if not self.tensor.is_pinned():
            return "torch does not see registered memory as pinned"
        return None

    @property
    def note(self) -> str | None:
        """One line for the user where the memory is not pinned as it should be."""
        return self.problem and f"host memory is not pinned, copies will be slower: {self.problem}"

    def written(self) -> None:
        """Nothing to do: memory keeps what is copied into it."""

    def release(self) -> None:
        """Nothing to do: there is no file behind this memory."""

    def close(self) -> None:
        """Unregister; the memory itself goes with the last tensor on it."""
        if self._unregister is not None:
            self._unregister()


class MappedFile:
    """Memory of one block on a file, reserved in full so that a full disk is noticed before the solve."""

    note: str | None = None

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Make the file.

        Raises:
            DiskSpaceError: The file system has not that much room.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        length = max(PAGE, num_bytes)
        try:
            os.posix_fallocate(handle, 0, length)
            self._map = mmap.mmap(handle, length)
        except OSError as error:
            path.unlink(missing_ok=True)
            if error.errno not in FULL:
                raise
            raise DiskSpaceError(f"placement: {path.parent} has no room for {length} bytes more") from error
        finally:
            os.close(handle)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:num_bytes]

    def written(self) -> None:
        """Write changed pages to the file before the next block's are: dirty pages never pile up."""
        self._map.flush()
        self.release()

    def release(self) -> None:
        """Give the pages back; the next read takes them from the file (usually the system's cache of it)."""
        _advise(self._map, "MADV_DONTNEED")

    def close(self) -> None:
        """Remove the file; its pages go with the last tensor on it."""
        self.path.unlink(missing_ok=True)
