# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a solve, written while it goes on: one file per block that changed, then the manifest that counts.

The writer goes through the blocks from the last, the order in which the next step changes them, and that step waits
only where it catches up: no second copy of the state is needed. The last two checkpoints are kept. How often one is
written follows from what it costs, unless the user says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from discquant.errors import DiskSpaceError
from discquant.formats.safetensors_file import tensor_bytes
from discquant.run.directory import write_atomic
from discquant.run.readback import Readback
from discquant.run.stored import save_tensors_atomic
from discquant.solver.block import BlockState
from discquant.solver.schedule import GainControl
from discquant.solver.solve import Solve

logger = logging.getLogger(__name__)
KEPT = 2
MANIFESTS = "step-*.json"
# Of the manifest and the digests in it; raised whenever either changes.
VERSION = 2
# Steps between two checkpoints, where they cost next to nothing.
SPACING = 16
# Of a run's time for paced checkpoints. The target is 3 %; the last one, which comes whenever the run ends, is on top.
SHARE = 0.025
# Bytes that a thread hashes at a time, and threads: hashing alone would take longer than a fast disk.
PIECE, HASHERS = 1 << 24, min(8, os.cpu_count() or 1)
# Pruning removes it where a killed run left it.
PROBE = ".probe.tmp"


def has_checkpoint(folder: Path) -> bool:
    """Return whether a checkpoint was completed in `folder`."""
    return any(folder.glob(MANIFESTS))


def _tensors(block: BlockState) -> dict[str, Tensor]:
    return {f"{state.name}.{key}": tensor for state in block.states for key, tensor in state.tensors()}


def _digest(tensors: dict[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes: SHA-256 of the pieces' SHA-256, which threads compute side by side."""
    names = sorted(tensors)
    facts = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps(facts).encode())
    contents = (tensor_bytes(tensors[name]) for name in names)
    pieces = (whole[begin : begin + PIECE] for whole in contents for begin in range(0, len(whole), PIECE))
    with ThreadPoolExecutor(HASHERS) as pool:
        for found in pool.map(_sha256, pieces):
            digest.update(found)
    return digest.hexdigest()


def _sha256(piece: memoryview) -> bytes:
    return hashlib.sha256(piece).digest()


def _facts(run: Solve) -> dict[str, Any]:
    solver = run.solver
    return {
        "version": VERSION,
        "step": solver.step_number,
        # Exact: the resumed gain must be the same float64.
        "gain": solver.gain.gain.hex(),
        "initial": solver.gain.initial.hex(),
        "target": solver.gain.target,
    }


class Checkpointer:
    """Writes checkpoints of one solve in the background, as often as a fixed or a paced schedule has them due.

    Paced, one is due `SPACING` steps after the last, but not before the pause after that one is so long that writing
    takes no more than `SHARE` of the time.

    Attributes:
        count, bytes_written: Checkpoints begun, and bytes of the block files written for them.
        stalled: Seconds that the solve waited for the writer.
        busy: Seconds that the writer took, beside the solve.
        cost: Seconds that the last checkpoint took; before the first, what it is expected to take.
    """

    def __init__(
        self,
        folder: Path,
        run: Solve,
        every: int | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Bind; steps of `run` wait for blocks that are still to be written.

        Args:
            folder: Where files go.
            run: The solve.
            every: Steps between checkpoints, whatever they cost; None paces them.
            clock: Gives seconds.
        """
        self.folder, self.run, self.every = folder, run, every
        self.count = self.bytes_written = 0
        self.stalled = self.busy = self.cost = 0.0
        self._clock = clock
        # Step of the last checkpoint and when it was complete, or where this part of the run began.
        self._step, self._ended = run.solver.step_number, clock()
        self._known: dict[int, tuple[str, str]] = {}  # newest file and digest of each block
        self._left: set[int] = set()
        self._moved = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._readback = Readback()
        run.solver.before_change = self._await_block

    def begin(self, *, fresh: bool) -> None:
        """Prepare for the first step of this process.

        On a fixed schedule a fresh solve is written at once. A paced one is not, for what would be lost is quickly made
        again: one block is written and removed, and tells what a checkpoint will cost.

        Raises:
            DiskSpaceError: There is no room for a block.
        """
        if self.every is not None:
            if fresh:
                self.save()
            return
        if self.run.done:
            return
        placement = self.run.solver.placement
        begin = self._clock()
        last = len(placement) - 1
        probed = self._probe(last)
        seconds = self._clock() - begin
        total = sum(
            tensor.nbytes for index in range(last + 1) for tensor in _tensors(placement.home(index)).values()
        )
        self.stalled += seconds
        self.cost = seconds * total / max(1, probed)
        self._ended = self._clock()

    def due(self, step: int) -> bool:
        """Whether the schedule has a checkpoint after this step."""
        if self.every is not None:
            return step % self.every == 0
        if step - self._step < SPACING or (self._thread is not None and self._thread.is_alive()):
            return False
        return self._clock() - self._ended >= self.cost * (1 / SHARE - 1)

    def save(self) -> None:
        """Begin to write the state after the current step.

        Raises:
            DiskSpaceError: The one before could not be written; the last complete one is untouched.
        """
        self.wait()
        self.run.solver.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._left = set(range(len(self.run.solver.placement)))
        self.count += 1
        self._step = self.run.solver.step_number
        self._readback.mark(self.run.solver.placement.device)
        self._thread = threading.Thread(
            target=self._write, args=(_facts(self.run),), name="discquant-checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint is complete.

        Raises:
            DiskSpaceError: It could not be written; the last complete one is untouched.
        """
        if self._thread is not None:
            begin = self._clock()
            self._thread.join()
            self._thread = None
            self.stalled += self._clock() - begin
        self.check()

    def close(self) -> None:
        """Let the writer end, if there is one; what went wrong in it no longer matters."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raise what went wrong in the background.

        Raises:
            DiskSpaceError: The disk is full.
        """
        error, self._error = self._error, None
        if isinstance(error, DiskSpaceError) and has_checkpoint(self.folder):
            raise DiskSpaceError(f"{error} from the last checkpoint") from error
        if error is not None:
            raise error

    def summary(self, run_seconds: float) -> dict[str, Any]:
        """Return the cost, as plain data; `share` is the part of the run that waited for checkpoints."""
        return {
            "every": self.every,
            "count": self.count,
            "bytes": self.bytes_written,
            "stalled_seconds": round(self.stalled, 3),
            "background_seconds": round(self.busy, 3),
            "share": round(self.stalled / max(run_seconds, 1e-9), 5),
        }

    def _await_block(self, index: int) -> None:
        """Hold a step back until block `index` is written."""
        with self._moved:
            if index not in self._left:
                return
            begin = self._clock()
            while index in self._left:
                self._moved.wait()
            self.stalled += self._clock() - begin

    def _write(self, facts: dict[str, Any]) -> None:
        begin = self._clock()
        try:
            blocks = {}
            for index in reversed(range(len(self.run.solver.placement))):
                blocks[index] = self._write_block(index, facts["step"])
                self._done({index})
            entries = [dict(zip(("file", "digest"), blocks[index], strict=True)) for index in sorted(blocks)]
            text = json.dumps({**facts, "blocks": entries}) + "\n"
            write_atomic(self.folder / f"step-{facts['step']:07d}.json", text)
            self._known = blocks
        except BaseException as error:  # handed to the solve's thread, which raises it
            self._error = error
        finally:
            self._done(set(self._left))
            with contextlib.suppress(OSError):
                prune(self.folder)
            self._ended = self._clock()
            self.cost = self._ended - begin
            self.busy += self.cost

    def _done(self, indices: set[int]) -> None:
        with self._moved:
            self._left -= indices
            self._moved.notify_all()

    @contextlib.contextmanager
    def _read(self, index: int) -> Iterator[dict[str, Tensor]]:
        """Give a block's tensors on the host; on disk the memory that reading them took goes back at the end."""
        placement = self.run.solver.placement
        try:
            yield {
                name: self._readback.read(tensor) for name, tensor in _tensors(placement.home(index)).items()
            }
        finally:
            placement.release(index)

    def _probe(self, index: int) -> int:
        """Hash and write a block as for a checkpoint, and remove it; return its bytes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._readback.mark(self.run.solver.placement.device)
        with self._read(index) as tensors:
            _digest(tensors)
            try:
                save_tensors_atomic(self.folder / PROBE, tensors, {})
            finally:
                (self.folder / PROBE).unlink(missing_ok=True)
            return sum(tensor.nbytes for tensor in tensors.values())

    def _write_block(self, index: int, step: int) -> tuple[str, str]:
        with self._read(index) as tensors:
            digest = _digest(tensors)
            known = self._known.get(index)
            if known is not None and known[1] == digest:
                return known
            name = f"block-{index:04d}-{step:07d}.safetensors"
            save_tensors_atomic(self.folder / name, tensors, {})
        self.bytes_written += (self.folder / name).stat().st_size
        return name, digest


def prune(folder: Path) -> None:
    """Keep the last two checkpoints; remove what no kept one names, parts of a killed write included."""
    manifests = sorted(folder.glob(MANIFESTS))
    needed: set[str] = set()
    for path in manifests[-KEPT:]:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            needed |= {entry["file"] for entry in json.loads(path.read_text(encoding="utf-8"))["blocks"]}
    for path in manifests[:-KEPT]:
        path.unlink()
    for path in (*folder.glob("block-*.safetensors"), *folder.glob(".*.tmp")):
        if path.name not in needed:
            path.unlink(missing_ok=True)


def load_checkpoint(folder: Path, run: Solve, at_most: float = math.inf) -> int | None:
    """Restore the newest readable checkpoint into `run`; return its step, None if none can be read.

    A checkpoint that cannot be read (a damaged disk: writing is atomic) is passed over with a warning. Those of steps
    after `at_most` do not count.
    """
    for path in sorted(folder.glob(MANIFESTS), reverse=True):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts.get("version", 1) != VERSION:
                raise ValueError(
                    f"it is of version {facts.get('version', 1)}, this discquant reads {VERSION}"
                )
            gain = GainControl(float.fromhex(facts["gain"]), facts["target"])
            gain.initial = float.fromhex(facts["initial"])
            step, entries = int(facts["step"]), facts["blocks"]
            if step > at_most:
                continue
            if len(entries) != len(run.solver.placement):
                raise ValueError(f"{len(entries)} blocks instead of {len(run.solver.placement)}")
            for index, entry in enumerate(entries):
                _restore(folder / Path(entry["file"]).name, entry["digest"], run, index)
                run.solver.placement.written(index)
        except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            logger.warning("checkpoint %s cannot be read (%s); using the one before", path.name, error)
            continue
        run.solver.placement.changed_at_home()
        run.solver.step_number, run.solver.gain = step, gain
        run.skip_rows(step)
        return step
    return None


def _restore(path: Path, digest: str, run: Solve, index: int) -> None:
    """Copy a block's file into the state.

    Raises:
        ValueError: It holds other bytes than were written.
    """
    target = _tensors(run.solver.placement.home(index))
    with safe_open(path, framework="pt") as handle:
        loaded = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
    if _digest(loaded) != digest or loaded.keys() != target.keys():
        raise ValueError(f"{path.name} is damaged")
    for name, tensor in target.items():
        tensor.copy_(loaded[name])
