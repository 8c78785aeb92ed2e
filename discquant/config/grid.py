# SPDX-License-Identifier: Apache-2.0
"""Which grid a weight is put on, for all layers and for some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from discquant.config.checks import check
from discquant.errors import either

GridSearch = Literal["absmax", "search"]
GridKind = Literal[
    "uniform", "nf4", "mxfp4", "nvfp4",
    "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
]  # fmt: skip

# (bits, group_size, sym) that each of the formats' own grids fixes.
GRID_KINDS: dict[str, tuple[int, int, bool]] = {
    "nf4": (4, 64, True),
    "mxfp4": (4, 32, True),
    "nvfp4": (4, 16, True),
    "q4_0": (4, 32, True),
    "q4_1": (4, 32, False),
    "q5_0": (5, 32, True),
    "q5_1": (5, 32, False),
    "q2_k": (2, 16, False),
    "q3_k": (3, 16, True),
    "q4_k": (4, 32, False),
    "q5_k": (5, 32, False),
    "q6_k": (6, 16, True),
    "iq4_nl": (4, 32, True),
    "iq4_xs": (4, 32, True),
}

# Kinds whose scales are numbers of their own, not multiples of others.
FREE_SCALES = ("uniform", "q4_0", "q5_0")

GROUP_SIZES_HINT = "-1 (whole row) or a positive multiple of 8, usually 32, 64 or 128"


@dataclass(frozen=True)
class GridConfig:
    """Which grid a weight is put on.

    Attributes:
        bits: Code width, 2 to 8.
        group_size: Columns that share a scale; -1 is the whole row.
        sym: Symmetric grid (zero point fixed at 2^(bits-1)).
        grid: `absmax` covers the largest weight of the group; `search` picks the scale of least squared error, of
            either sign where levels are symmetric.
        kind: `uniform`, or a format's own grid: look-up tables (nf4, mxfp4, nvfp4) and GGUF block types (q4_0, q4_1,
            q5_0, q5_1, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs); these fix bits, group size and symmetry.
    """

    bits: int = 4
    group_size: int = 64
    sym: bool = True
    grid: GridSearch = "search"
    kind: GridKind = "uniform"

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: A field is out of range.
        """
        check("bits", "an integer from 2 to 8", type(self.bits) is int and 2 <= self.bits <= 8, self.bits)
        ok = type(self.group_size) is int and (
            self.group_size == -1 or (self.group_size > 0 and self.group_size % 8 == 0)
        )
        check("group_size", GROUP_SIZES_HINT, ok, self.group_size)
        check("grid", f"one of {either(get_args(GridSearch))}", self.grid in get_args(GridSearch), self.grid)
        check("kind", f"one of {either(get_args(GridKind))}", self.kind in get_args(GridKind), self.kind)
        if self.kind != "uniform":
            fixed = GRID_KINDS[self.kind]
            given = (self.bits, self.group_size, self.sym)
            check(f"(bits, group_size, sym) of kind {self.kind}", f"{fixed}", given == fixed, given)

    @classmethod
    def of_kind(cls, kind: GridKind, bits: int = 4, group_size: int = 64, sym: bool = True) -> GridConfig:
        """Return the grid of a kind: `bits`, `group_size` and `sym` as given for uniform, else what the kind fixes."""
        fixed = GRID_KINDS.get(kind, (bits, group_size, sym))
        return cls(*fixed, kind=kind)
