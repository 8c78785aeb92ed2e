# SPDX-License-Identifier: Apache-2.0
"""What every grid offers: neighbours of a weight, and codes back to weights exactly as they are served."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from discquant.ops import decode_frac, decode_frac_ref, unpack_nibbles

ALL = slice(None)


class Neighbours(NamedTuple):
    """Lower code and position of a weight between its neighbours.

    Attributes:
        q_down: Lower code, uint8, 0 .. 2^b - 2, [out_features, in_features]. Where a scale is negative, code
            q_down + 1 stands for the smaller weight.
        frac_ref: Position that reproduces the weight, float32, unitless; outside [0, 1] where the grid
            clips; exactly 0 or 1 where the weight lies on the grid (such a coordinate has one neighbour
            only, itself, and never moves). A group whose levels are all equal counts as on the grid.
    """

    q_down: Tensor
    frac_ref: Tensor


class Grid(ABC):
    """A grid laid on one weight matrix [out_features, in_features].

    Attributes:
        num_bits: Code width.
        group_size: Columns that share a scale, -1 for the row.
        symmetric: Whether weight zero is the same code everywhere by definition.
        scale: Grid step in weight units (what multiplies the table on look-up grids), floating,
            [out_features, num_groups].
        zero_point: Code of weight zero on asymmetric uniform grids, uint8, same shape.
        table: Levels of a look-up grid, ascending, [2 ** num_bits].
    """

    num_bits: int
    group_size: int
    symmetric: bool
    scale: Tensor
    zero_point: Tensor | None = None
    table: Tensor | None = None

    @abstractmethod
    def dequantize(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the served weight of codes `q`: computed as the format's engine does, rounded once to `dtype`."""

    @abstractmethod
    def neighbours(self, weight: Tensor) -> Neighbours:
        """Return the two-neighbour representation of `weight`."""

    @abstractmethod
    def columns(self, order: Tensor) -> Columns:
        """Return what rounds single columns, for GPTQ; column j there is column order[j] of the weight."""

    def to(self, device: torch.device) -> Grid:
        """Return this grid with its tensors on a device; itself where they are there already."""
        moved = {key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)}
        if all(value is getattr(self, key) for key, value in moved.items()):
            return self
        found = copy.copy(self)
        for key, value in moved.items():
            # Grids are frozen and check their values when they are made; these values are those of one.
            object.__setattr__(found, key, value)
        return found

    def share_(self, other: Grid) -> None:
        """Take the tensors of an equal grid in place of the own ones, so that they exist once."""
        for key, value in vars(other).items():
            if isinstance(value, Tensor):
                object.__setattr__(self, key, value)

    def copied(self) -> Grid:
        """Return this grid on memory of its own."""
        found = copy.copy(self)
        for key, value in vars(self).items():
            if isinstance(value, Tensor):
                object.__setattr__(found, key, value.clone())
        return found

    @property
    def max_code(self) -> int:
        """Highest code, 2^b - 1."""
        return int(2**self.num_bits - 1)

    def gap(self, q_down: Tensor) -> tuple[Tensor, int]:
        """Return Delta = d weight / d frac of each coordinate, and how many columns share an entry of it.

        Args:
            q_down: Lower codes, uint8, [out_features, in_features].

        Returns:
            Gap in weight units, floating, [out_features, num_groups] with its group size; grids whose gaps differ
            from code to code return [out_features, in_features] in float32 with group size 1.
        """
        return self.scale, self.group_size

    def soft_weight(
        self, q_down: Tensor, frac: Tensor, dtype: torch.dtype, *, is_reference: bool = False
    ) -> Tensor:
        """Return the weight `frac` of the way between its neighbours; at 0 and 1 it is what `dequantize` gives.

        Args:
            q_down: Lower codes, uint8, [out_features, in_features], or two per byte, low nibble first.
            frac: Position, floating or fixed point (see `ops.soft_weight`), [out_features, in_features].
            dtype: Result dtype.
            is_reference: `frac` is a `frac_ref`, whose uint8 codes are another scale.

        Returns:
            Weight, [out_features, in_features].
        """
        if q_down.shape[1] != frac.shape[1]:
            q_down = unpack_nibbles(q_down, frac.shape[1])
        compute = torch.float64 if frac.dtype == torch.float64 else torch.float32
        position = decode_frac_ref(frac, compute) if is_reference else decode_frac(frac, compute)
        lower = self.dequantize(q_down, torch.float32).to(compute)
        upper = self.dequantize(q_down + 1, torch.float32).to(compute)
        return torch.where(position == 1, upper, lower + position * (upper - lower)).to(dtype)

    def nearest(self, weight: Tensor) -> Tensor:
        """Round to nearest: uint8 codes; ties go down, as in the published method."""
        q_down, frac_ref = self.neighbours(weight)
        return q_down + (frac_ref > 0.5).to(torch.uint8)

    def on_grid_exactly(self, weight: Tensor, found: Neighbours) -> Neighbours:
        """Set `frac_ref` to exactly 0 or 1 where a neighbour is the weight, whatever rounding made of the quotient."""
        side = (found.frac_ref > 0.5).to(torch.uint8)
        equal = self.dequantize(found.q_down + side, torch.float32) == weight.float()
        return Neighbours(found.q_down, torch.where(equal, side.float(), found.frac_ref))


class Columns(ABC):
    """Rounds single columns of a weight to the nearest level, in float64; holds what groups share, never a matrix."""

    @abstractmethod
    def nearest(self, j: int, values: Tensor, rows: slice = ALL) -> tuple[Tensor, Tensor]:
        """Round column `j`.

        Args:
            j: Column, in the order given to `Grid.columns`.
            values: float64, [rows].
            rows: Which rows of the weight these are.

        Returns:
            Codes and the weights they stand for, float64, [rows].
        """


def column_groups(order: Tensor, group_size: int, num_groups: int) -> Tensor:
    """Return the group of each column in an order, int64, [in_features], on the CPU: read one at a time."""
    return (torch.zeros_like(order) if group_size == -1 or num_groups == 1 else order // group_size).cpu()


@dataclass(frozen=True)
class LinearColumns(Columns):
    """weight = step * (q - zero) + minimum; all float64, [out_features, num_groups]; `zero` is a number or per group.

    `groups` is the group of each column, int64, [in_features], on the CPU.
    """

    step: Tensor
    zero: Tensor | float
    minimum: Tensor | None
    max_code: int
    groups: Tensor

    def nearest(self, j: int, values: Tensor, rows: slice = ALL) -> tuple[Tensor, Tensor]:
        """See `Columns`."""
        group = int(self.groups[j])
        step = self.step[rows, group]
        zero = self.zero[rows, group] if isinstance(self.zero, Tensor) else self.zero
        minimum = None if self.minimum is None else self.minimum[rows, group]
        centred = values if minimum is None else values - minimum
        # A step of 0 gives every code the same weight; dividing by 1 keeps the code finite.
        q = torch.round(centred / torch.where(step == 0, 1.0, step) + zero).clamp_(0, self.max_code)
        weight = step * (q - zero)
        return q, weight if minimum is None else weight + minimum
