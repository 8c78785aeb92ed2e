# SPDX-License-Identifier: Apache-2.0
"""Look-up-table grids: weight = scale * table[q] (NF4, MXFP4, NVFP4, IQ4_NL, IQ4_XS); codes ascend with the levels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from discquant.grids.base import ALL, Columns, Grid, Neighbours, column_groups
from discquant.ops import expand_groups

# Quantiles of a normal distribution, scaled to [-1, 1], as bitsandbytes stores them.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# e2m1 in ascending order; zero occurs twice (-0 and +0), and the pair is no neighbourhood.
E2M1_LEVELS = (
    -6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0,
)  # fmt: skip
# The levels of GGUF's IQ4 types, an int8 number each: finer around zero, which is none of them, and not symmetric, so
# that a scale may want either sign.
IQ4_LEVELS = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip
SIGNED_KINDS = ("iq4_nl", "iq4_xs")
E8M0_BIAS = 127


def e2m1_codes(nibbles: Tensor) -> Tensor:
    """Turn e2m1 nibbles (sign, two exponent bits, one mantissa bit) into codes in ascending order; uint8."""
    return torch.where(nibbles < 8, nibbles + 8, 15 - nibbles)


def e2m1_nibbles(codes: Tensor) -> Tensor:
    """Undo `e2m1_codes`."""
    return torch.where(codes < 8, 15 - codes, codes - 8)


def power_of_two(exponents: Tensor) -> Tensor:
    """Return 2^(e - 127) in float32, exactly, for e8m0 exponents 0 .. 254 of any integer dtype."""
    biased = exponents.int()
    # The exponent field of float32 has the same bias; its 0 means a subnormal number.
    return torch.where(biased == 0, 1 << 22, biased << 23).int().view(torch.float32)


@dataclass(frozen=True, eq=False)
class TableGrid(Grid):
    """Look-up grid of one weight matrix; made by `nf4`, `mxfp4`, `nvfp4` or `iq4`.

    Attributes:
        num_bits: Code width b.
        group_size: Columns per scale, -1 for the row; the last group may be short.
        table: Levels, ascending, float32, [2 ** b].
        scale: What multiplies the table, in weight units, float32, [out_features, num_groups]; of either sign where
            the table is not symmetric (`SIGNED_KINDS`).
        block_scale: Block scales as the file stores them (e8m0 exponents uint8, or float8_e4m3fn), or None.
        tensor_scale: Divisor of the block scales (NVFP4's global scale), float32, one element, or None.
        kind: Name of the table: nf4, mxfp4, nvfp4, iq4_nl, iq4_xs.
    """

    num_bits: int
    group_size: int
    table: Tensor = field()  # without a default: the base class's None must not become one
    scale: Tensor = field()
    block_scale: Tensor | None = None
    tensor_scale: Tensor | None = None
    kind: str = "table"
    symmetric: bool = True

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: The scale is not finite, or negative with a symmetric table, or the table is not ascending.
        """
        if not bool(torch.isfinite(self.scale).all()):
            raise ValueError("TableGrid: scale must be finite, got NaN or Inf")
        if self.kind not in SIGNED_KINDS and bool((self.scale < 0).any()):
            raise ValueError(f"TableGrid: scale of {self.kind} must be at least 0, got a negative one")
        if self.table.shape != (2**self.num_bits,) or bool((self.table.diff() < 0).any()):
            raise ValueError(f"TableGrid: table must hold {2**self.num_bits} ascending levels")

    @classmethod
    def nf4(cls, absmax: Tensor, group_size: int = 64) -> TableGrid:
        """weight = NF4 level * absmax of the block; absmax floating, [out_features, num_groups]."""
        table = torch.tensor(NF4_LEVELS, device=absmax.device)
        return cls(4, group_size, table, absmax.float(), kind="nf4")

    @classmethod
    def mxfp4(cls, exponents: Tensor) -> TableGrid:
        """weight = e2m1 level * 2^(exponent - 127), per 32 columns; exponents e8m0, uint8, [out_features, num_groups].

        Raises:
            ValueError: An exponent is 255, e8m0's NaN, or not a scale that float32 holds without loss.
        """
        if exponents.dtype != torch.uint8 or bool((exponents == 255).any()):
            raise ValueError("TableGrid.mxfp4: exponents must be uint8 below 255 (255 is NaN)")
        return cls(4, 32, _e2m1(exponents), power_of_two(exponents), block_scale=exponents, kind="mxfp4")

    @classmethod
    def nvfp4(cls, block_scale: Tensor, tensor_scale: Tensor) -> TableGrid:
        """weight = e2m1 level * (block_scale / tensor_scale), per 16 columns, in float32.

        Args:
            block_scale: float8_e4m3fn, [out_features, num_groups].
            tensor_scale: Global scale as compressed-tensors stores it (a divisor), float32, one element.

        Raises:
            ValueError: The tensor scale is not a finite positive number.
        """
        divisor = tensor_scale.float().reshape(())
        if not (bool(torch.isfinite(divisor)) and float(divisor) > 0):
            raise ValueError(
                f"TableGrid.nvfp4: tensor_scale must be finite and above 0, got {float(divisor)}"
            )
        scale = block_scale.float() / divisor
        return cls(4, 16, _e2m1(block_scale), scale, block_scale, divisor.reshape(1), kind="nvfp4")

    @classmethod
    def iq4(cls, scale: Tensor, kind: str) -> TableGrid:
        """weight = IQ4 level * scale, per 32 columns.

        Args:
            scale: d, or of iq4_xs d times its integer, of either sign, floating, [out_features, num_groups].
            kind: iq4_nl or iq4_xs.
        """
        table = torch.tensor(IQ4_LEVELS, device=scale.device)
        return cls(4, 32, table, scale.float(), kind=kind)

    def dequantize(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """Return scale * table[q]: a float32 product, rounded once to `dtype`."""
        step = expand_groups(self.scale, self.group_size, q.shape[1])
        return (self.table[q.long()] * step).to(dtype)

    def neighbours(self, weight: Tensor) -> Neighbours:
        """Return lower codes and positions; a weight beyond the ends lies between the two outermost levels."""
        level = expand_groups(self.scale == 0, self.group_size, weight.shape[1])
        step = expand_groups(torch.where(self.scale == 0, 1.0, self.scale), self.group_size, weight.shape[1])
        target = weight.float() / step
        # The last level not above the weight; of two equal levels the upper one, which has a gap above it.
        q_down = (torch.searchsorted(self.table, target.contiguous(), right=True) - 1).clamp_(
            0, self.max_code - 1
        )
        lower, upper = self.table[q_down], self.table[q_down + 1]
        found = self.on_grid_exactly(
            weight, Neighbours(q_down.to(torch.uint8), (target - lower) / (upper - lower))
        )
        return Neighbours(found.q_down, torch.where(level, 0.0, found.frac_ref))

    def gap(self, q_down: Tensor) -> tuple[Tensor, int]:
        """See `Grid.gap`: (table[q + 1] - table[q]) * scale, one entry per coordinate."""
        step = expand_groups(self.scale, self.group_size, q_down.shape[1])
        return self.table.diff()[q_down.long()] * step, 1

    def columns(self, order: Tensor) -> Columns:
        """See `Grid.columns`."""
        groups = column_groups(order, self.group_size, self.scale.shape[1])
        return _TableColumns(self.table.double(), self.scale.double(), groups)


@dataclass(frozen=True)
class _TableColumns(Columns):
    """weight = step * table[q]; float64, step [out_features, num_groups], groups as in `LinearColumns`."""

    table: Tensor
    step: Tensor
    groups: Tensor

    def nearest(self, j: int, values: Tensor, rows: slice = ALL) -> tuple[Tensor, Tensor]:
        """See `Columns`."""
        step = self.step[rows, int(self.groups[j])]
        target = (values / torch.where(step == 0, 1.0, step)).contiguous()
        # Boundaries half-way between levels; ties go down.
        middle = (self.table[1:] + self.table[:-1]) / 2
        q = torch.searchsorted(middle, target)
        return q.double(), self.table[q] * step


def _e2m1(like: Tensor) -> Tensor:
    return torch.tensor(E2M1_LEVELS, device=like.device)
