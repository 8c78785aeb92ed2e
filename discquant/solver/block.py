# SPDX-License-Identifier: Apache-2.0
"""The state of a block as one contiguous blob, so that a block moves in one copy.

`[grid | code | teacher | anchor | curvature | frac | m | v | scales]`, each part for all weights of the block: a
write-back is the rest from frac on. The tensors of the weights are views into the blob.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from discquant.solver.state import SCALES, WeightState

ALIGNMENT = 64  # bytes; what torch's own allocations have on a CPU
# Parts in the order of the blob; whatever belongs to the grid comes first.
_ORDER = (
    "q_down", "weight", "frac_ref", "outlier_low", "outlier_count", "outlier_value", "side", "_anchor",
    "curvature_in", "curvature_out", "frac", "momentum", "second_moment", *SCALES,
)  # fmt: skip

Allocate = Callable[[int], Tensor]


class _Place(NamedTuple):
    """Where one tensor of one weight lies in the blob."""

    weight: int
    key: str
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def _rank(key: str) -> int:
    return -1 if key.startswith("grid.") else _ORDER.index(key)


def _layout(states: Sequence[WeightState]) -> tuple[list[_Place], int, int]:
    """Return the places, the offset of the first frac, and the length of the blob, in bytes."""
    found = [
        (_rank(key), position, key, tensor)
        for position, state in enumerate(states)
        for key, tensor in state.held()
    ]
    places, offset, changing = [], 0, None
    for rank, position, key, tensor in sorted(found, key=lambda entry: (entry[0], entry[1], entry[2])):
        offset = -(-offset // ALIGNMENT) * ALIGNMENT
        if changing is None and rank >= _ORDER.index("frac"):
            changing = offset
        size = tensor.numel() * tensor.element_size()
        places.append(_Place(position, key, offset, size, tensor.dtype, tuple(tensor.shape)))
        offset += size
    return places, offset if changing is None else changing, offset


class BlockState:
    """The weights of one block on one blob.

    Attributes:
        blob: uint8, [bytes].
        states: The weights' states, views into the blob, in the order of the chain's weights.
        changing: Offset from which a step changes the blob (frac, moments, what moves the scales).
    """

    def __init__(self, blob: Tensor, states: list[WeightState], places: list[_Place], changing: int) -> None:
        """Bind; use `pack` to make one."""
        self.blob, self.states, self.changing = blob, states, changing
        self._places = places

    @classmethod
    def pack(cls, states: Sequence[WeightState], allocate: Allocate | None = None) -> BlockState:
        """Copy states onto a blob.

        Args:
            states: States of a block; they keep their own memory.
            allocate: Returns uint8 of a given number of bytes; None is a tensor on the device of the states.
        """
        places, changing, size = _layout(states)
        device = states[0].frac.device if states else torch.device("cpu")
        blob = torch.empty(size, dtype=torch.uint8, device=device) if allocate is None else allocate(size)
        packed = cls(blob, list(states), places, changing)
        bound = packed.bind(blob)
        source = [dict(state.held()) for state in states]
        target = [dict(state.held()) for state in bound.states]
        for place in places:
            target[place.weight][place.key].copy_(source[place.weight][place.key])
        return bound

    def bind(self, blob: Tensor) -> BlockState:
        """Return the same states as views into another blob of this layout; nothing is copied."""
        bound = [copy.copy(state) for state in self.states]
        for state in bound:
            state.grid = copy.copy(state.grid)
        for place in self._places:
            flat = blob[place.offset : place.offset + place.num_bytes]
            view = (
                flat.view(place.dtype).view(place.shape)
                if math.prod(place.shape)
                else flat.new_empty(place.shape, dtype=place.dtype)
            )
            state = bound[place.weight]
            if place.key.startswith("grid."):
                # Grids are frozen and check their values when they are made; these values are those of one.
                object.__setattr__(state.grid, place.key[5:], view)
            else:
                setattr(state, place.key, view)
        return BlockState(blob, bound, self._places, self.changing)

    @property
    def nbytes(self) -> int:
        """Length of the blob."""
        return int(self.blob.numel())

    def changed(self) -> Tensor:
        """Return the part that a step changes, a view, uint8."""
        return self.blob[self.changing :]
