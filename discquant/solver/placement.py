# SPDX-License-Identifier: Apache-2.0
"""Where block states live between their visits, and how they reach the compute device while neighbours compute.

One engine for every placement: `fetch` gives a block on the compute device and begins to load the one that comes
next; `write_back` sends home what a step changed. Which placement is used changes no bit of any result.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from discquant.errors import either
from discquant.solver.block import BlockState
from discquant.solver.memory import HostArena, MappedFile, return_freed
from discquant.solver.state import WeightState

Where = Literal["resident", "host", "disk"]
Choice = Literal["resident", "host", "disk", "auto"]
PLACES: tuple[str, ...] = get_args(Where)
CHOICES: tuple[str, ...] = get_args(Choice)
SLOTS = 3  # one computes, one fills, one drains


class Lane:
    """Copies in one direction, in order: a thread that issues them and, on a GPU, a stream that carries them out."""

    def __init__(self, device: torch.device) -> None:
        """Make the lane; the thread starts with the first copy."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="discquant-copy")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, task: Callable[[], None], after: Sequence[Any] = ()) -> Future[Any]:
        """Run `task` after the given events and futures of events.

        Returns:
            Future of an event at the end of the task; of None on a CPU, where the task has then ended.
        """

        def run() -> Any:
            events = [item.result() if isinstance(item, Future) else item for item in after]
            if self._stream is None:
                with torch.no_grad():
                    task()
                return None
            with torch.no_grad(), torch.cuda.stream(self._stream):
                for event in events:
                    if event is not None:
                        self._stream.wait_event(event)
                task()
                done = torch.cuda.Event()
                done.record(self._stream)
                return done

        return self._pool.submit(run)

    def wait(self) -> None:
        """Wait until no copy is under way; whatever failed was raised where its result was awaited."""
        with contextlib.suppress(Exception):
            self._pool.submit(lambda: None).result()  # tasks run in order
            if self._stream is not None:  # a task ends when its copies are given to the stream
                self._stream.synchronize()

    def close(self) -> None:
        """Wait for what is under way, and stop the thread."""
        self.wait()
        self._pool.shutdown(wait=True)


def now(device: torch.device) -> Any:
    """Return an event at the end of what has been given to the device so far, None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


@dataclass(eq=False)
class _Slot:
    """Room for one block on the compute device."""

    blob: Tensor
    index: int | None = None
    bound: BlockState | None = None
    ready: Future[Any] | None = None
    draining: Future[Any] | None = None
    used: int = 0
    views: dict[int, BlockState] = field(default_factory=dict)


class Placement:
    """Block states of one solve.

    Attributes:
        where: resident (on the compute device), host (memory of the machine) or disk (mapped files).
        device: Compute device.
        bytes_in, bytes_out: Moved to and from the compute device so far.
        waited: Seconds that the compute thread stood waiting for a block.
        notes: What the user should know, one line each.
    """

    def __init__(
        self, where: Where = "resident", device: torch.device | str = "cpu", folder: Path | None = None
    ) -> None:
        """Choose; nothing is allocated yet.

        Args:
            where: Placement.
            device: Compute device.
            folder: Where the files of `disk` go.

        Raises:
            ValueError: An unknown placement, or `disk` without a folder.
        """
        if where not in PLACES:
            raise ValueError(f"Placement: where must be one of {either(PLACES)}, got {where!r}")
        if where == "disk" and folder is None:
            raise ValueError("Placement: folder must be given for disk, got None")
        self.where, self.device, self.folder = where, torch.device(device), folder
        self.bytes_in = self.bytes_out = 0
        self.waited = 0.0
        self.notes: list[str] = []
        self._blocks: list[BlockState] = []
        self._homes: list[HostArena | MappedFile] = []
        self._slots: list[_Slot] = []
        self._sent: dict[int, Future[Any]] = {}  # write-backs under way, by block
        self._last = -1
        self._clock = 0
        self._lanes: tuple[Lane, Lane] | None = None

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._blocks)

    def add(self, states: Sequence[WeightState]) -> None:
        """Take the states of the next block; the caller may drop them.

        Raises:
            DiskSpaceError: The file system of `disk` is too small.
        """
        resident = self.where == "resident"
        self._blocks.append(BlockState.pack(states, self._on_device if resident else self._at_home))
        if not resident:
            self._homes[-1].written()
        return_freed()  # the wide intermediates of the block

    def _on_device(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def _at_home(self, num_bytes: int) -> Tensor:
        home: HostArena | MappedFile
        if self.where == "disk":
            assert self.folder is not None
            home = MappedFile(self.folder / f"block-{len(self._blocks):04d}.state", num_bytes)
        else:
            home = HostArena(num_bytes, pin=self.device.type == "cuda")
        if home.note is not None and not self.notes:
            self.notes.append(home.note)
        self._homes.append(home)
        return home.tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(block.nbytes for block in self._blocks)

    @property
    def slot_bytes(self) -> int:
        """Bytes of the slots on the compute device; none are needed where the states are resident."""
        if self.where == "resident":
            return 0
        return min(SLOTS, len(self._blocks)) * max(block.nbytes for block in self._blocks)

    def fetch(self, index: int, *, change: bool = False) -> BlockState:
        """Return a block on the compute device, and begin to load the next one in the direction of travel.

        Args:
            index: Of the block.
            change: It is about to be changed: what an earlier `write_back` still reads of it must have left. That of
                the step before may be under way where the block has kept its slot ever since.
        """
        if self.where == "resident":
            return self._blocks[index]
        slot = self._slot(index) or self._load(index)
        assert slot.ready is not None and slot.bound is not None
        self._await(slot.ready)
        if change and slot.draining is not None:
            self._await(slot.draining)
        self._touch(slot)
        if index != self._last:
            forward = index > self._last
            self._last = index
            upcoming = index + 1 if forward else index - 1
            # At either end the walk turns round.
            upcoming = upcoming if 0 <= upcoming < len(self) else index - 1 if forward else index + 1
            if 0 <= upcoming < len(self) and self._slot(upcoming) is None:
                self._load(upcoming)
        return slot.bound

    def _await(self, copy: Future[Any]) -> None:
        """Hold what is computed from here on back until a copy has ended."""
        begin = time.perf_counter()
        event = copy.result()
        self.waited += time.perf_counter() - begin
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def _slot(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.index == index), None)

    def _touch(self, slot: _Slot) -> None:
        self._clock += 1
        slot.used = self._clock

    def _engines(self) -> tuple[Lane, Lane]:
        if self._lanes is None:
            self._lanes = (Lane(self.device), Lane(self.device))
        return self._lanes

    def _free_slot(self) -> _Slot:
        if not self._slots:
            size = max(block.nbytes for block in self._blocks)
            self._slots = [_Slot(self._on_device(size)) for _ in range(min(SLOTS, len(self)))]
        return min(self._slots, key=lambda slot: slot.used)

    def _load(self, index: int) -> _Slot:
        """Begin to copy a block into the slot that was not used for longest."""
        slot, home = self._free_slot(), self._homes[index]
        block = self._blocks[index]
        # What still computes on the slot; its last block must have left, and this block must have come home.
        after = [now(self.device), slot.draining, self._sent.get(index)]

        def copy() -> None:
            slot.blob[: block.nbytes].copy_(block.blob, non_blocking=True)
            if isinstance(home, MappedFile):
                home.release()

        inward, _ = self._engines()
        slot.index = index
        if index not in slot.views:
            slot.views[index] = block.bind(slot.blob[: block.nbytes])
        slot.bound, slot.draining = slot.views[index], None
        slot.ready = inward.submit(copy, after)
        self._touch(slot)
        self.bytes_in += block.nbytes
        return slot

    def write_back(self, index: int) -> None:
        """Send home what a step changed of a block that is on the compute device."""
        if self.where == "resident":
            return
        slot = self._slot(index)
        assert slot is not None and slot.bound is not None, "only a fetched block can have changed"
        source, block, home = slot.bound.changed(), self._blocks[index], self._homes[index]
        after = [now(self.device)]

        def copy() -> None:
            block.changed().copy_(source, non_blocking=True)
            if isinstance(home, MappedFile):
                if source.is_cuda:
                    torch.cuda.current_stream(source.device).synchronize()
                home.written()

        _, outward = self._engines()
        self._sent[index] = slot.draining = outward.submit(copy, after)
        self.bytes_out += int(source.numel())

    def home(self, index: int) -> BlockState:
        """Return a block where it lives, after its write-back; to be read, or changed followed by `changed_at_home`."""
        sent = self._sent.get(index)  # kept: another thread may be about to load this block
        if sent is not None:
            event = sent.result()
            if event is not None:
                event.synchronize()
        return self._blocks[index]

    def homes(self) -> Iterator[BlockState]:
        """Yield every block where it lives."""
        for index in range(len(self)):
            yield self.home(index)
            self.release(index)

    def release(self, index: int) -> None:
        """Give back the memory of a block that was read at home on disk; the next look takes it from the file."""
        if self.where == "disk":
            self._homes[index].release()

    def written(self, index: int) -> None:
        """Write a block that was changed at home to its file, where it has one, and give back its memory."""
        if self._homes:
            self._homes[index].written()

    def changed_at_home(self) -> None:
        """Forget copies on the compute device: blocks were changed where they live."""
        for index in range(len(self)):
            self.home(index)
        for slot in self._slots:
            if slot.ready is not None:
                slot.ready.result()
            slot.index = slot.bound = slot.ready = None
        for index in range(len(self)):
            self.written(index)

    def close(self) -> None:
        """Wait for copies, stop the threads, remove the files; blocks at home stay readable."""
        with contextlib.suppress(Exception):  # whatever failed was raised where its result was awaited
            for index in range(len(self)):
                self.home(index)
        if self._lanes is not None:
            for lane in self._lanes:
                lane.close()
            self._lanes = None
        for home in self._homes:
            home.close()
        self._slots.clear()
