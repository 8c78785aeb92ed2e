# SPDX-License-Identifier: Apache-2.0
"""MatMulNBits of ONNX Runtime: codes and scales to its tensors and back.

It has 2, 4 and 8 bits and blocks that are powers of two from 16 on; other widths are widened, other groups cut into
blocks that repeat their scale, both exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from discquant.errors import CheckpointError, UnrepresentableError
from discquant.formats.bitstream import pack, unpack
from discquant.grids import Grid, UniformGrid

MIN_BLOCK, MAX_BLOCK = 16, 256
# First minor release of ONNX Runtime whose CPU kernels take a width (1.22.1, 1.23.0 and 1.24.1 run, without an
# accuracy level); CUDA's take 4 and 8 bits only.
RUNTIMES = {2: (1, 24), 4: (1, 22), 8: (1, 23)}
WIDTHS = tuple(RUNTIMES)


@dataclass(frozen=True)
class NBits:
    """Attributes and tensors of one node.

    Attributes:
        bits: 2, 4 or 8.
        block: Columns per scale.
        offset: What was added to the codes when they were widened.
        packed: uint8 [out_features, blocks, block * bits / 8].
        scales: float32 [out_features, blocks].
        zero_points: uint8 [out_features, ceil(blocks * bits / 8)], or None for 2^(bits-1).
    """

    bits: int
    block: int
    offset: int
    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None


def block_size(group_size: int, name: str = "layer") -> int:
    """The largest block that every group of this size (-1: the row) is cut into evenly.

    Raises:
        UnrepresentableError: The group is no multiple of 16.
    """
    if group_size == -1:
        return 128
    if group_size % MIN_BLOCK:
        raise UnrepresentableError(
            f"{name}: MatMulNBits has blocks of powers of two from {MIN_BLOCK} on, which do not fill groups of "
            f"{group_size} columns; take a multiple of {MIN_BLOCK}"
        )
    return min(group_size & -group_size, MAX_BLOCK)


def encode(grid: Grid, q: Tensor, name: str = "layer") -> NBits:
    """Tensors of a layer.

    Args:
        grid: Uniform, of 2 to 8 bits.
        q: Codes, uint8, [out_features, in_features].
        name: Module path, for the message.

    Raises:
        UnrepresentableError: The grid is not uniform, or its groups have no block.
    """
    width, block = check(grid, name)
    assert isinstance(grid, UniformGrid)
    rows, columns = q.shape
    blocks = -(-columns // block)
    offset = 2 ** (width - 1) - 2 ** (grid.num_bits - 1) if grid.symmetric else 0
    scales = _per_block(grid.scale.float(), grid.group_size, block, blocks)
    zeros = None
    if grid.zero_point is not None:
        zeros = _octets(_per_block(grid.zero_point, grid.group_size, block, blocks), width)
    padded = torch.zeros((rows, blocks * block), dtype=torch.uint8)
    padded[:, :columns] = q.cpu() + offset
    packed = _octets(padded, width).reshape(rows, blocks, block * width // 8)
    return NBits(width, block, offset, packed, scales, zeros)


def check(grid: Grid, name: str = "layer") -> tuple[int, int]:
    """Width and block that a grid gets.

    Raises:
        UnrepresentableError: As `encode`.
    """
    if not isinstance(grid, UniformGrid) or grid.g_idx is not None:
        raise UnrepresentableError(
            f"{name}: MatMulNBits holds uniform grids of contiguous groups, got {type(grid).__name__}"
        )
    return next(width for width in WIDTHS if width >= grid.num_bits), block_size(grid.group_size, name)


def decode(
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    *,
    bits: int,
    block: int,
    columns: int,
    name: str,
) -> tuple[Tensor, UniformGrid]:
    """Codes and grid of a node's tensors; one block per row is a group of -1.

    Raises:
        CheckpointError: Shapes disagree, or scales are NaN or infinite.
    """
    blocks = -(-columns // block)
    rows = packed.shape[0]
    wanted = {
        "B": (list(packed.shape), [rows, blocks, block * bits // 8]),
        "scales": (scales.numel(), rows * blocks),
        "zero_points": (
            None if zero_points is None else zero_points.numel(),
            None if zero_points is None else rows * (-(-blocks * bits // 8)),
        ),
    }
    for label, (actual, expected) in wanted.items():
        if actual != expected:
            raise CheckpointError(f"{name}: {label} must have {expected}, got {actual}")
    q = _codes(packed.reshape(rows, -1), bits, blocks * block)[:, :columns].contiguous()
    zero = None if zero_points is None else _codes(zero_points.reshape(rows, -1), bits, blocks)
    try:
        return q, UniformGrid(
            bits, -1 if blocks == 1 else block, zero is None, scales.reshape(rows, blocks), zero
        )
    except ValueError as cause:
        raise CheckpointError(f"{name}: {cause}") from cause


def _per_block(values: Tensor, group_size: int, block: int, blocks: int) -> Tensor:
    """[rows, groups] -> [rows, blocks] by repetition."""
    repeat = blocks if group_size == -1 else group_size // block
    return values.cpu().repeat_interleave(repeat, dim=1)[:, :blocks].contiguous()


def _octets(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes to rows of bytes, the last one padded with zeros: the stream D_b without its words."""
    words = pack(codes, bits)
    octets = words.contiguous().view(torch.uint8).reshape(len(words), -1)
    return octets[:, : -(-codes.shape[1] * bits // 8)].contiguous()


def _codes(octets: Tensor, bits: int, count: int) -> Tensor:
    words = -(-octets.shape[1] // 4)
    padded = torch.zeros((len(octets), words * 4), dtype=torch.uint8)
    padded[:, : octets.shape[1]] = octets
    return unpack(padded.view(torch.int32)[:, : -(-count * bits // 32)], bits, count)
