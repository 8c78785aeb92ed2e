# SPDX-License-Identifier: Apache-2.0
"""Affine grids: weight = scale * q + minimum with a floating minimum (Q4_1, Q4_K and the like of GGUF, MLX)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from discquant.grids.base import Columns, Grid, LinearColumns, Neighbours, column_groups
from discquant.ops import expand_groups, soft_weight


@dataclass(frozen=True, eq=False)
class AffineGrid(Grid):
    """Affine grid of one weight matrix.

    Q4_1, Q5_1: scale = d, minimum = m. Q2_K, Q4_K, Q5_K: scale = d sc, minimum = -(dmin mn), both exact in float32;
    then (d sc) q - (dmin mn) rounds once, as the format's own decoder does. MLX: scales and biases, in their own dtype.

    Attributes:
        num_bits: Code width b, 2 to 8.
        group_size: Columns per scale, -1 for the row; the last group may be short.
        scale: Grid step in weight units, floating, [out_features, num_groups]; zero where a group has one level only.
        minimum: Weight of code 0, floating, same shape.
        compute: Dtype in which the format's engine multiplies and adds, each rounded to it.
    """

    num_bits: int
    group_size: int
    scale: Tensor
    minimum: Tensor
    compute: torch.dtype = torch.float32
    symmetric: bool = False

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: Scale or minimum is not finite, or their shapes differ.
        """
        for name, tensor in (("scale", self.scale), ("minimum", self.minimum)):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"AffineGrid: {name} must be finite, got NaN or Inf")
        if self.minimum.shape != self.scale.shape:
            raise ValueError(
                f"AffineGrid: minimum must have the shape of scale = {list(self.scale.shape)}, "
                f"got {list(self.minimum.shape)}"
            )

    def in_compute(self) -> tuple[Tensor, Tensor]:
        """Return scale and minimum in `compute`, as `ops.soft_weight` takes them; [out_features, num_groups] each."""
        return self.scale.to(self.compute), self.minimum.to(self.compute)

    def dequantize(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """Return scale * q + minimum: product and sum in `compute`, then rounded once to `dtype`."""
        step, minimum = (expand_groups(t, self.group_size, q.shape[1]) for t in self.in_compute())
        return (step * q.to(self.compute) + minimum).to(dtype)

    def soft_weight(
        self, q_down: Tensor, frac: Tensor, dtype: torch.dtype, *, is_reference: bool = False
    ) -> Tensor:
        """See `Grid.soft_weight`; through the op `soft_weight`, whose levels are those of `dequantize`."""
        scale, minimum = self.in_compute()
        return soft_weight(
            q_down, frac, scale, num_bits=self.num_bits, group_size=self.group_size, dtype=dtype,
            is_reference=is_reference, minimum=minimum,
        )  # fmt: skip

    def neighbours(self, weight: Tensor) -> Neighbours:
        """Return lower codes and positions; a weight beyond the ends lies between the two outermost levels."""
        scale = self.scale.float()
        level = expand_groups(scale == 0, self.group_size, weight.shape[1])
        step = expand_groups(torch.where(scale == 0, 1.0, scale), self.group_size, weight.shape[1])
        minimum = expand_groups(self.minimum.float(), self.group_size, weight.shape[1])
        position = (weight.float() - minimum) / step
        q_down = position.floor().clamp(0, self.max_code - 1)
        found = self.on_grid_exactly(weight, Neighbours(q_down.to(torch.uint8), position - q_down))
        return Neighbours(found.q_down, torch.where(level, 0.0, found.frac_ref))

    def columns(self, order: Tensor) -> Columns:
        """See `Grid.columns`."""
        groups = column_groups(order, self.group_size, self.scale.shape[1])
        return LinearColumns(self.scale.double(), 0.0, self.minimum.double(), self.max_code, groups)
