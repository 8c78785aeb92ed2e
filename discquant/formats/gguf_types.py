# SPDX-License-Identifier: Apache-2.0
"""The GGUF types whose codes are read and written: where the bits of each block lie (formats.md section 7).

A type is data alone: `gguf_blocks` packs what this table says, `gguf_fit` finds the type of a grid in it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plane:
    """Bits of a run of small integers, codes or scales, in the bytes of a block.

    The bytes come in stretches of `width`. One integer after the other takes the lowest field of each byte of a
    stretch, then the next field of each, and then the next stretch goes on.

    Attributes:
        start: First byte in the block.
        size: Bytes.
        width: Bytes of a stretch.
        bits: Of a field.
        place: Where the field's lowest bit belongs in its integer.
        first: The first integer.
        shift: Where the lowest field begins in its byte; what lies below is another plane's.
        signed: The integer is stored in two's complement, and counted from its least value here.
    """

    start: int
    size: int
    width: int
    bits: int
    place: int = 0
    first: int = 0
    shift: int = 0
    signed: bool = False

    @property
    def fields(self) -> int:
        """Fields of a byte."""
        return (8 - self.shift) // self.bits

    @property
    def count(self) -> int:
        """Integers that have bits here."""
        return self.size * self.fields


@dataclass(frozen=True)
class BlockType:
    """One GGUF type.

    Attributes:
        name: As GGUF spells it.
        number: Its id in the file.
        file_type: llama.cpp's number of a file that is mostly of it.
        columns: Weights of a block, along a row.
        size: Bytes of a block.
        num_bits: Width of a code.
        group_size: Columns that share a scale.
        symmetric: Whether weight zero is one fixed code; else there is a minimum per scale.
        halves: Float16 numbers and their first bytes: d and m, or d and dmin of types whose scales are integers.
        planes: Bits of the codes.
        scale_bits: Width of an integer scale (and minimum), which multiplies d (and dmin); 0 where d is the scale.
        scale_planes: Their bits.
        looked_up: A code stands for a level of the IQ4 table, not for a multiple of the scale.
        scale_run: So many scales, then as many minima, and so on, in `scale_planes`.
    """

    name: str
    number: int
    file_type: int
    columns: int
    size: int
    num_bits: int
    group_size: int
    symmetric: bool
    halves: tuple[tuple[str, int], ...]
    planes: tuple[Plane, ...]
    scale_bits: int = 0
    scale_planes: tuple[Plane, ...] = ()
    scale_run: int = 0
    looked_up: bool = False

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of that many weights."""
        return columns // self.columns * self.size

    @property
    def groups(self) -> int:
        """Scales of a block."""
        return self.columns // self.group_size

    @property
    def scale_zero(self) -> int:
        """What stands for an integer scale of zero: half of the range where scales have a sign."""
        return 1 << (self.scale_bits - 1) if self.symmetric and self.scale_bits else 0

    @property
    def scale_range(self) -> tuple[int, int]:
        """Least and largest integer scale."""
        return -self.scale_zero, (1 << self.scale_bits) - 1 - self.scale_zero

    @property
    def codes(self) -> tuple[tuple[int, int], ...]:
        """Byte ranges of a block that hold codes and nothing else."""
        return tuple(sorted((plane.start, plane.start + plane.size) for plane in self.planes))


_D, _D_M, _D_DMIN = (("d", 0),), (("d", 0), ("m", 2)), (("d", 0), ("dmin", 2))
# Four scales and four minima are whole in eight bytes, whose two upper bits are those of the four and four that follow.
_SIXES = (Plane(4, 8, 8, 6), Plane(12, 4, 4, 4, first=8), Plane(4, 8, 8, 2, place=4, first=8, shift=6))
TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 2, 2, 32, 18, 4, 32, True, _D, (Plane(2, 16, 16, 4),)),
        BlockType("Q4_1", 3, 3, 32, 20, 4, 32, False, _D_M, (Plane(4, 16, 16, 4),)),
        BlockType("Q5_0", 6, 8, 32, 22, 5, 32, True, _D, (Plane(6, 16, 16, 4), Plane(2, 4, 1, 1, place=4))),
        BlockType("Q5_1", 7, 9, 32, 24, 5, 32, False, _D_M, (Plane(8, 16, 16, 4), Plane(4, 4, 1, 1, place=4))),
        BlockType("Q8_0", 8, 7, 32, 34, 8, 32, True, _D, (Plane(2, 32, 32, 8, signed=True),)),
        BlockType("Q2_K", 10, 10, 256, 84, 2, 16, False, (("d", 80), ("dmin", 82)), (Plane(16, 64, 32, 2),),
                  4, (Plane(0, 16, 16, 4),), 16),
        BlockType("Q3_K", 11, 11, 256, 110, 3, 16, True, (("d", 108),),
                  (Plane(32, 64, 32, 2), Plane(0, 32, 32, 1, place=2)),
                  6, (Plane(96, 8, 8, 4), Plane(104, 4, 4, 2, place=4))),
        BlockType("Q4_K", 12, 14, 256, 144, 4, 32, False, _D_DMIN, (Plane(16, 128, 32, 4),), 6, _SIXES, 4),
        BlockType("Q5_K", 13, 16, 256, 176, 5, 32, False, _D_DMIN,
                  (Plane(48, 128, 32, 4), Plane(16, 32, 32, 1, place=4)), 6, _SIXES, 4),
        BlockType("Q6_K", 14, 18, 256, 210, 6, 16, True, (("d", 208),),
                  (Plane(0, 128, 64, 4), Plane(128, 64, 32, 2, place=4)),
                  8, (Plane(192, 16, 16, 8, signed=True),)),
        BlockType("IQ4_NL", 20, 25, 32, 18, 4, 32, True, _D, (Plane(2, 16, 16, 4),), looked_up=True),
        BlockType("IQ4_XS", 23, 30, 256, 136, 4, 32, True, _D, (Plane(8, 128, 16, 4),),
                  6, (Plane(4, 4, 1, 4), Plane(2, 2, 1, 2, place=4)), looked_up=True),
    )
}  # fmt: skip
BY_NUMBER = {kind.number: kind for kind in TYPES.values()}
