# SPDX-License-Identifier: Apache-2.0
"""Activations at block boundaries between forward and backward pass: kept on the device, in host memory, or on disk."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discquant.solver.memory import HostArena, MappedFile
from discquant.solver.placement import Lane, Where, now


class Boundaries:
    """A stack of lists of tensors, one list per block; what is taken out is what was put in, bit for bit.

    Homes are made in the first step and used again in the others.

    Attributes:
        bytes_moved: Out and in again so far.
        notes: What the user should know, one line each.
    """

    def __init__(
        self, where: Where = "resident", device: torch.device | str = "cpu", folder: Path | None = None
    ) -> None:
        """Choose where; `folder` is for the files of `disk`."""
        self.where, self.device, self.folder = where, torch.device(device), folder
        self.bytes_moved = 0
        self.notes: list[str] = []
        self._kept: list[list[Tensor]] = []
        self._homes: list[HostArena | MappedFile] = []
        self._views: list[list[Tensor]] = []
        self._sent: list[Future[Any] | None] = []
        self._coming: dict[int, tuple[list[Tensor], Future[Any]]] = {}
        self._lanes: tuple[Lane, Lane] | None = None

    def _engines(self) -> tuple[Lane, Lane]:
        if self._lanes is None:
            self._lanes = (Lane(self.device), Lane(self.device))
        return self._lanes

    def push(self, tensors: list[Tensor]) -> None:
        """Keep the inputs of the next block."""
        self._kept.append(tensors)
        if self.where == "resident":
            return
        index = len(self._kept) - 1
        views = self._room(index, tensors)

        def copy() -> None:
            for view, tensor in zip(views, tensors, strict=True):
                view.copy_(tensor, non_blocking=True)
            home = self._homes[index]
            if isinstance(home, MappedFile):
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()
                home.written()

        self._sent[index] = self._engines()[1].submit(copy, [now(self.device)])
        # The block before this one has left by now; its tensors must live until then.
        self._let_go(index - 1)

    def _let_go(self, index: int) -> None:
        sent = self._sent[index] if index >= 0 else None
        if sent is None:
            return
        event = sent.result()
        if event is not None:
            event.synchronize()
        self._kept[index] = []

    def _room(self, index: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        padded = [-(-size // 64) * 64 for size in sizes]
        needed = sum(padded)
        if index == len(self._homes):
            self._homes.append(self._home(index, needed))
            self._views.append([])
            self._sent.append(None)
        elif self._homes[index].tensor.numel() < needed:  # a longer step than the first
            self._homes[index].close()
            self._homes[index] = self._home(index, needed)
        views, offset = [], 0
        for tensor, size, room in zip(tensors, sizes, padded, strict=True):
            flat = self._homes[index].tensor[offset : offset + size]
            views.append(flat.view(tensor.dtype).view(tensor.shape))
            offset += room
        self._views[index] = views
        self.bytes_moved += 2 * sum(sizes)
        return views

    def _home(self, index: int, num_bytes: int) -> HostArena | MappedFile:
        if self.where == "disk":
            assert self.folder is not None
            return MappedFile(self.folder / f"boundary-{index:04d}.act", num_bytes)
        home = HostArena(num_bytes, pin=self.device.type == "cuda")
        if home.note is not None and not self.notes:
            self.notes.append(f"{home.note} (activations)")
        return home

    def pop(self) -> list[Tensor]:
        """Return the inputs of the last block that is kept, on the device, and begin to bring those before it."""
        index = len(self._kept) - 1
        if self.where == "resident":
            return self._kept.pop()
        self._let_go(index)
        if index not in self._coming:
            self._bring(index)
        tensors, arrived = self._coming.pop(index)
        event = arrived.result()
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        self._kept.pop()
        self._sent[index] = None
        if index > 0:
            self._bring(index - 1)  # it has left since the block after it was pushed
        return tensors

    def _bring(self, index: int) -> None:
        views = self._views[index]
        tensors = [torch.empty_like(view, device=self.device) for view in views]

        def copy() -> None:
            for tensor, view in zip(tensors, views, strict=True):
                tensor.copy_(view, non_blocking=True)
            self._homes[index].release()

        self._coming[index] = (tensors, self._engines()[0].submit(copy, [now(self.device)]))

    def clear(self) -> None:
        """Drop what is kept (a step that failed half-way leaves some), once no copy reads or writes it."""
        for lane in self._lanes or ():
            lane.wait()
        self._kept.clear()
        self._coming.clear()
        self._sent = [None] * len(self._homes)

    def close(self) -> None:
        """Stop the threads and remove the files."""
        self.clear()
        if self._lanes is not None:
            for lane in self._lanes:
                lane.close()
            self._lanes = None
        for home in self._homes:
            home.close()
        self._homes.clear()
        self._views.clear()
        self._sent.clear()
