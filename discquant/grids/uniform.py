# SPDX-License-Identifier: Apache-2.0
"""Uniform grids: weight = scale * (q - zero_point), one scale per group of columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from discquant.grids.base import Grid, Neighbours
from discquant.ops import expand_groups


@dataclass(frozen=True)
class UniformGrid(Grid):
    """Uniform grid of one weight matrix.

    Attributes:
        num_bits: Code width b, 2 to 8.
        group_size: Columns per scale, -1 for the row; the last group may be short.
        symmetric: True means the zero point is 2^(b-1) and `zero_point` is None.
        scale: Grid step in weight units, [out_features, num_groups], in the dtype the file stores.
        zero_point: Code of weight zero, uint8, [out_features, num_groups], or None.
    """

    num_bits: int
    group_size: int
    symmetric: bool
    scale: Tensor
    zero_point: Tensor | None = None
    table: Tensor | None = None

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: Scales are not finite and positive, or the zero point disagrees with `symmetric`.
        """
        if not bool(torch.isfinite(self.scale).all()) or not bool((self.scale > 0).all()):
            raise ValueError("UniformGrid: scale must be finite and above 0")
        if self.symmetric != (self.zero_point is None):
            raise ValueError("UniformGrid: zero_point must be None exactly when the grid is symmetric")

    @property
    def max_code(self) -> int:
        """Highest code, 2^b - 1."""
        return int(2**self.num_bits - 1)

    def _zero(self, in_features: int) -> Tensor | float:
        if self.zero_point is None:
            return 2.0 ** (self.num_bits - 1)
        return expand_groups(self.zero_point.float(), self.group_size, in_features)

    def position(self, weight: Tensor) -> Tensor:
        """Return the real-valued code of each weight, weight / scale + zero_point, float32.

        Computed in float32 whatever the weight's dtype: in bfloat16 one weight in thirty lands on the grid
        by rounding alone (method.md section 4).
        """
        step = expand_groups(self.scale.float(), self.group_size, weight.shape[1])
        return weight.float() / step + self._zero(weight.shape[1])

    def neighbours(self, weight: Tensor) -> Neighbours:
        """Return lower codes and positions; a weight beyond the ends lies between the two outermost levels."""
        position = self.position(weight)
        q_down = position.floor().clamp(0, self.max_code - 1)
        return Neighbours(q_down.to(torch.uint8), position - q_down)

    def dequantize(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """Return scale * (q - zero_point): a float32 product, rounded once to `dtype`."""
        step = expand_groups(self.scale.float(), self.group_size, q.shape[1])
        return (step * (q.float() - self._zero(q.shape[1]))).to(dtype)
