# SPDX-License-Identifier: Apache-2.0
"""Uniform grids: weight = scale * (q - zero_point), one scale per group of columns."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from discquant.grids.base import Columns, Grid, LinearColumns, Neighbours, column_groups
from discquant.ops import expand_groups, soft_weight

# Times a code difference below 2^8 these are exact in float32, so quotients of grid points are exact too.
_SHORT = (torch.bfloat16, torch.float16)
# Least and largest scale by the dtype of a file. A bfloat16 number of at least 2^-17 is also exact in float16, so every
# format sees the same grid; 65280 is the largest that float16 holds.
SCALE_RANGE = {torch.bfloat16: (2.0**-17, 65280.0), torch.float16: (2.0**-24, 65504.0)}
MOST_RESCALED = 0.5  # a scale keeps its sign and stays of the same order


def held_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the nearest scales of the same sign that a file holds, in `dtype`.

    Args:
        scale: Wanted, floating, any shape; not 0.
        dtype: Of the file.
    """
    least, most = SCALE_RANGE.get(dtype, (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max))
    held = scale.to(dtype)
    return held.abs().clamp(least, most).copysign(held)


@dataclass(frozen=True, eq=False)
class UniformGrid(Grid):
    """Uniform grid of one weight matrix: ours, or the one inside a GPTQ, AWQ, compressed-tensors or GGUF file.

    Attributes:
        num_bits: Code width b, 2 to 8.
        group_size: Columns per scale, -1 for the row; the last group may be short.
        symmetric: True means the zero point is 2^(b-1) and `zero_point` is None.
        scale: Grid step in weight units, [out_features, num_groups], in the dtype the file stores; may be negative
            (searched, or of a GGUF type), and zero where a group has one level only.
        zero_point: Code of weight zero, uint8, [out_features, num_groups], or None.
        g_idx: Group of each column, integer, [in_features], where groups are not contiguous (act-order); or None.
    """

    num_bits: int
    group_size: int
    symmetric: bool
    scale: Tensor
    zero_point: Tensor | None = None
    table: Tensor | None = None
    g_idx: Tensor | None = None

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: Scales are not finite, the zero point disagrees with `symmetric`, or g_idx names a group
                that is not there.
        """
        if not bool(torch.isfinite(self.scale).all()):
            raise ValueError("UniformGrid: scale must be finite, got NaN or Inf")
        if self.symmetric != (self.zero_point is None):
            raise ValueError("UniformGrid: zero_point must be None exactly when the grid is symmetric")
        if self.table is not None:
            raise ValueError("UniformGrid: table must be None; a look-up grid is a TableGrid")
        if self.g_idx is not None:
            groups = self.scale.shape[1]
            if self.g_idx.dim() != 1 or not bool(((self.g_idx >= 0) & (self.g_idx < groups)).all()):
                raise ValueError(f"UniformGrid: g_idx must be a vector of groups = 0 .. {groups - 1}")

    def _spread(self, per_group: Tensor, in_features: int) -> Tensor:
        """One value per column, [out_features, in_features]."""
        return expand_groups(per_group, self.group_size, in_features, self.g_idx)

    def _zero(self, in_features: int) -> Tensor | float:
        if self.zero_point is None:
            return 2.0 ** (self.num_bits - 1)
        return self._spread(self.zero_point.float(), in_features)

    def position(self, weight: Tensor) -> Tensor:
        """Return the real-valued code of each weight, weight / scale + zero_point, float32.

        Computed in float32 whatever the weight's dtype: in bfloat16 one weight in thirty lands on the grid
        by rounding alone (method.md section 4). Where the scale is 0 it is the zero point.
        """
        scale = self.scale.float()
        step = self._spread(torch.where(scale == 0, torch.inf, scale), weight.shape[1])
        return weight.float() / step + self._zero(weight.shape[1])

    def neighbours(self, weight: Tensor) -> Neighbours:
        """Return lower codes and positions; a weight beyond the ends lies between the two outermost levels."""
        position = self.position(weight)
        q_down = position.floor().clamp(0, self.max_code - 1)
        found = Neighbours(q_down.to(torch.uint8), position - q_down)
        if self.scale.dtype not in _SHORT:
            found = self.on_grid_exactly(weight, found)
        if bool((self.scale == 0).any()):
            level = self._spread(self.scale, weight.shape[1]) == 0
            found = Neighbours(found.q_down, torch.where(level, 0.0, found.frac_ref))
        return found

    def dequantize(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """Return scale * (q - zero_point): a float32 product, rounded once to `dtype`."""
        (rows, columns), groups = q.shape, self.scale.shape[1]
        weight, scale = q.to(torch.float32, copy=True), self.scale.float()
        whole = groups == 1 if self.group_size == -1 else groups * self.group_size == columns
        if self.g_idx is not None or not whole:
            return (self._spread(scale, columns) * weight.sub_(self._zero(columns))).to(dtype)
        # Broadcast over whole groups, in place: otherwise most of the time goes into fresh memory.
        weight = weight.contiguous()
        grouped = weight.view(rows, groups, columns // groups)
        grouped -= (
            2.0 ** (self.num_bits - 1) if self.zero_point is None else self.zero_point.float()[:, :, None]
        )
        grouped *= scale[:, :, None]
        return weight.to(dtype)

    def rescaled(self, change: Tensor) -> UniformGrid:
        """Return this grid with every scale times 1 + its change, as a file holds it; a scale of 0 stays.

        Args:
            change: Relative change, float32, [out_features, num_groups]; cut to [-1/2, 1/2].
        """
        own = self.scale.float()
        moved = held_scale(own * (1 + change.clamp(-MOST_RESCALED, MOST_RESCALED)), self.scale.dtype)
        found = copy.copy(self)
        # A change of 0 gives the scale itself, also one that a file of another tool holds below the range.
        kept = (change == 0) | (own == 0)
        # Not made anew: to check the values would wait for the device.
        object.__setattr__(found, "scale", torch.where(kept, self.scale, moved))
        return found

    def gap(self, q_down: Tensor) -> tuple[Tensor, int]:
        """See `Grid.gap`; with g_idx, one entry per column."""
        if self.g_idx is None:
            return self.scale, self.group_size
        return self._spread(self.scale.float(), q_down.shape[1]).contiguous(), 1

    def soft_weight(
        self, q_down: Tensor, frac: Tensor, dtype: torch.dtype, *, is_reference: bool = False
    ) -> Tensor:
        """See `Grid.soft_weight`; through the op `soft_weight` wherever that gives the served bits at the ends."""
        scale = self.scale
        if frac.dtype == torch.float64 and scale.dtype not in _SHORT:
            return super().soft_weight(q_down, frac, dtype, is_reference=is_reference)
        if scale.dtype == torch.float16:
            scale = scale.float()  # exact, and a dtype that every kernel covers
        return soft_weight(
            q_down, frac, scale, self.zero_point, num_bits=self.num_bits, group_size=self.group_size, dtype=dtype,
            is_reference=is_reference, g_idx=self.g_idx,
        )  # fmt: skip

    def columns(self, order: Tensor) -> Columns:
        """See `Grid.columns`."""
        groups = column_groups(order, self.group_size, self.scale.shape[1])
        if self.g_idx is not None:
            groups = self.g_idx.long()[order].cpu()
        zero = 2.0 ** (self.num_bits - 1) if self.zero_point is None else self.zero_point.double()
        return LinearColumns(self.scale.double(), zero, None, self.max_code, groups)
