# SPDX-License-Identifier: Apache-2.0
"""What a format needs to know of a layer's grid to lay out its tensors: kind, bits, group, symmetry."""

from __future__ import annotations

from dataclasses import dataclass

from discquant.config import GridConfig
from discquant.formats.coded import LayerFacts
from discquant.formats.codes import QuantizedLinear
from discquant.grids import Grid, UniformGrid
from discquant.grids.affine import AffineGrid

# GGUF's Q4_0 and Q5_0 are plain uniform grids; Q4_1 and Q5_1 are uniform but for their floating minimum.
KINDS = {"uniform": "int", "q4_0": "int", "q5_0": "int", "q4_1": "affine", "q5_1": "affine"}


@dataclass(frozen=True)
class Scheme:
    """Layout of one layer; group_size -1 is one scale per row.

    `kind` is `int`, `affine` (a floating minimum instead of an integer zero point), a table (nf4, mxfp4, nvfp4) or a
    block type of GGUF.
    """

    num_bits: int
    group_size: int
    symmetric: bool
    kind: str = "int"

    @classmethod
    def of(cls, layer: QuantizedLinear) -> Scheme:
        """The scheme of a layer on a uniform grid."""
        return cls(layer.num_bits, layer.group_size, layer.symmetric)

    @classmethod
    def of_grid(cls, grid: Grid) -> Scheme:
        """The scheme of a grid."""
        if isinstance(grid, AffineGrid):
            kind = "affine"
        else:
            kind = "int" if isinstance(grid, UniformGrid) else str(getattr(grid, "kind", type(grid).__name__))
        return cls(grid.num_bits, grid.group_size, grid.symmetric, kind)

    @classmethod
    def of_facts(cls, row: LayerFacts) -> Scheme:
        """The scheme behind a row's `kind`, which carries its width (`int3`)."""
        kind = next((name for name in ("int", "affine") if row.kind == f"{name}{row.num_bits}"), row.kind)
        return cls(row.num_bits, row.group_size, row.symmetric, kind)

    @classmethod
    def planned(cls, shape: tuple[int, int], grid: GridConfig) -> Scheme:
        """The scheme that a weight of this shape will have."""
        # place_grid calls a group wider than the row the row, because formats call that another strategy.
        size = -1 if grid.group_size > shape[1] else grid.group_size
        return cls(grid.bits, size, grid.sym, KINDS.get(grid.kind, grid.kind))

    def groups(self, columns: int) -> int:
        """Scales per row."""
        return 1 if self.group_size == -1 else -(-columns // self.group_size)

    @property
    def label(self) -> str:
        """Kind with the width where the kind leaves it open: `int3`, `nvfp4`."""
        return f"{self.kind}{self.num_bits}" if self.kind in ("int", "affine") else self.kind

    @property
    def words(self) -> str:
        """Kind in users' words."""
        return "grid with a minimum per group (as Q4_1, Q4_K)" if self.kind == "affine" else self.kind

    def __str__(self) -> str:
        """For messages: `int3 group 64 symmetric`."""
        if self.kind == "affine":
            return f"a {self.num_bits}-bit {self.words}"
        size = "per row" if self.group_size == -1 else f"group {self.group_size}"
        return f"{self.label} {size} {'symmetric' if self.symmetric else 'asymmetric'}"
