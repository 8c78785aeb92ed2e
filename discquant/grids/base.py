# SPDX-License-Identifier: Apache-2.0
"""What every grid offers: neighbours of a weight, and codes back to weights exactly as they are served."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor


class Neighbours(NamedTuple):
    """Lower code and position of a weight between its neighbours.

    Attributes:
        q_down: Lower code, uint8, 0 .. 2^b - 2, [out_features, in_features].
        frac_ref: Position that reproduces the weight, float32, unitless; outside [0, 1] where the grid
            clips; exactly 0 or 1 where the weight lies on the grid (such a coordinate has one neighbour
            only, itself, and never moves).
    """

    q_down: Tensor
    frac_ref: Tensor


class Grid(ABC):
    """A grid laid on one weight matrix [out_features, in_features]."""

    num_bits: int
    group_size: int
    symmetric: bool
    scale: Tensor
    zero_point: Tensor | None
    table: Tensor | None = None

    @abstractmethod
    def dequantize(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the served weight of codes `q`, rounded once to `dtype`."""

    @abstractmethod
    def neighbours(self, weight: Tensor) -> Neighbours:
        """Return the two-neighbour representation of `weight`."""

    def gap(self, q_down: Tensor) -> tuple[Tensor, int]:
        """Return Delta = d weight / d frac of each coordinate, and how many columns share an entry of it.

        Args:
            q_down: Lower codes, uint8, [out_features, in_features].

        Returns:
            Gap in weight units, floating, [out_features, num_groups] with its group size; grids whose gaps differ
            from code to code return [out_features, in_features] in float32 with group size 1.
        """
        return self.scale, self.group_size

    def soft_weight(self, q_down: Tensor, frac: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight `frac` of the way between its neighbours; see `ops.soft_weight`."""
        from discquant.ops import soft_weight

        return soft_weight(
            q_down,
            frac,
            self.scale,
            self.zero_point,
            num_bits=self.num_bits,
            group_size=self.group_size,
            table=self.table,
            dtype=dtype,
        )

    def nearest(self, weight: Tensor) -> Tensor:
        """Round to nearest: uint8 codes; ties go down, as in the published method."""
        q_down, frac_ref = self.neighbours(weight)
        return q_down + (frac_ref > 0.5).to(torch.uint8)
