# SPDX-License-Identifier: Apache-2.0
"""Undo of a step that fails half-way: blocks are stepped before the gradients of those below them are known.

A step cannot be inverted (it clamps), and keeping all gradients until the last is known would undo the point of the
block-by-block order. So the bytes a step replaces are kept until it ends: 2 B per weight in the 8-bit layout.
"""

from __future__ import annotations

from torch import Tensor

from discquant.solver.placement import Placement


class Journal:
    """Bytes from before the step, up to a limit.

    Beyond the limit nothing is kept (a 70 B model would need 137 GB), and a step that fails after its first block
    closes the solver: the state is that of no step, and nothing may read it. A run then continues from its last
    checkpoint, which replays to exactly the state before the failed step.
    """

    def __init__(self, limit: int) -> None:
        """Start empty.

        Args:
            limit: Bytes kept at most.
        """
        self.limit = limit
        self.closed = False
        self._held = 0
        self._overflow = False
        self._kept: list[tuple[int, Tensor]] = []

    @property
    def outcome(self) -> str:
        """What becomes of the state if the step fails now, for the message of the error."""
        if self._overflow:
            return "the step cannot be taken back in memory: continue from the last checkpoint"
        return "the state is as it was before the step"

    def begin(self) -> None:
        """Start a step.

        Raises:
            RuntimeError: A failed step could not be taken back.
        """
        self.check()
        self.forget()

    def check(self) -> None:
        """Refuse to go on with a state that is that of no step.

        Raises:
            RuntimeError: A failed step could not be taken back.
        """
        if self.closed:
            raise RuntimeError("solver: a step failed half-way; continue from the last checkpoint")

    def keep(self, index: int, changing: Tensor) -> None:
        """Copy the part of block `index` that is about to be changed."""
        self._held += changing.numel()
        if self._held > self.limit:
            self._overflow = True
            self._kept.clear()
        if not self._overflow:
            self._kept.append((index, changing.clone()))

    def restore(self, placement: Placement) -> bool:
        """Put everything back at home, or close the solver where that cannot be; return whether blocks changed."""
        self.closed = self.closed or self._overflow
        kept = self._kept
        for index, before in kept:
            placement.home(index).changed().copy_(before)
        changed = bool(kept)
        self.forget()
        return changed

    def forget(self) -> None:
        """Drop what is kept: the step is complete, or taken back."""
        self._kept = []
        self._held, self._overflow = 0, False
