# SPDX-License-Identifier: Apache-2.0
"""Tensors of a GPU to the host beside what it computes: on a stream of its own, through a small pinned buffer.

`Tensor.cpu()` would wait in the compute stream, and with it all that is given to the GPU after it: into memory that is
not pinned a copy goes in pieces of the driver's, one after another, several times slower than the link.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from discquant.solver.placement import now

PIECE = 1 << 24  # bytes of the pinned buffer, a power of two as torch allocates them


def _begin(target: Tensor, source: Tensor) -> None:
    """Give a copy to the current stream."""
    target.copy_(source, non_blocking=True)


class Readback:
    """Reads tensors as they are at a mark, which another thread may set.

    Whoever would change a tensor after the mark waits until it was read: the host's thread, not the device.
    """

    def __init__(self) -> None:
        """Take nothing yet; the first tensor of a GPU does."""
        self._mark: Any = None
        self._stream: Any = None
        self._buffer: Tensor | None = None

    def mark(self, device: torch.device) -> None:
        """Have later reads see what the current stream was given so far, all of it."""
        self._mark = now(device)

    def read(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the host; one that is there already as it is.

        Args:
            tensor: Contiguous, any dtype.
        """
        if not tensor.is_cuda:
            return tensor.cpu()
        # The writer's thread begins on the first device, whichever the run is on.
        with torch.cuda.device(tensor.device):
            return self._read(tensor)

    def _read(self, tensor: Tensor) -> Tensor:
        if self._stream is None or self._buffer is None:
            self._stream = torch.cuda.Stream(tensor.device)
            self._buffer = torch.empty(PIECE, dtype=torch.uint8, device="cpu", pin_memory=True)
        found = torch.empty_like(tensor, device="cpu")
        source, target = (t.view(-1).view(torch.uint8) for t in (tensor, found))
        with torch.cuda.stream(self._stream):
            if self._mark is not None:
                self._stream.wait_event(self._mark)
            for begin in range(0, source.numel(), self._buffer.numel()):
                part = source[begin : begin + self._buffer.numel()]
                staged = self._buffer[: part.numel()]
                _begin(staged, part)
                self._stream.synchronize()
                target[begin : begin + part.numel()].copy_(staged)
        return found
