# SPDX-License-Identifier: Apache-2.0
"""Packed layouts in eager PyTorch: the dense stream D_b and the runtime tiles, as reshapes and shifts.

docs/packed_layout.md is the specification; csrc/packed/layout.h says the same per code, for kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ROWS, TILE_K, BLOCK_ROWS = 16, 128, 64
# Rows whose scales lie side by side, by layout.
SCALE_ROWS = {"mma": 64, "cpu": 32}


def padded_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Out features padded to 64 and in features to 128."""
    return -(-out_features // BLOCK_ROWS) * BLOCK_ROWS, -(-in_features // TILE_K) * TILE_K


def word_count(out_features: int, in_features: int, num_bits: int) -> int:
    """32-bit words of a packed weight; exact for 3 and 4 bits because tiles are whole."""
    rows, columns = padded_shape(out_features, in_features)
    return rows * columns * num_bits // 32


def group_count(in_features: int, group_size: int) -> int:
    """Groups of a row; -1 is one group."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def pad_codes(q: Tensor, zero_point: Tensor | None, num_bits: int, group_size: int) -> Tensor:
    """Codes padded to whole tiles with the code of weight zero, uint8, [padded rows, padded columns]."""
    rows, columns = q.shape
    padded_rows, padded_columns = padded_shape(rows, columns)
    if zero_point is None:
        out = q.new_full((padded_rows, padded_columns), 1 << (num_bits - 1))
    else:
        size = padded_columns if group_size == -1 else group_size
        group = (torch.arange(padded_columns, device=q.device) // size).clamp(max=zero_point.shape[1] - 1)
        out = q.new_zeros((padded_rows, padded_columns))
        out[:rows] = zero_point[:, group]
    out[:rows, :columns] = q
    return out


def _to_nibbles(codes: Tensor, layout: str) -> Tensor:
    """[..., 16, 128] codes -> [..., units, virtual words, 8 nibbles]."""
    lead = codes.shape[:-2]
    at = len(lead)
    axes = tuple(range(at))
    if layout == "cpu":
        # k = 8 word + 4 h + b lies in nibble 2 b + h.
        split = codes.reshape(*lead, 16, 16, 2, 4)
        return split.permute(*axes, at, at + 1, at + 3, at + 2).reshape(*lead, 16, 16, 8)
    # row = 8 p + g and k = 16 word + 8 j + 2 t + e: lane 4 g + t, nibble 4 e + 2 j + p.
    split = codes.reshape(*lead, 2, 8, 8, 2, 4, 2)
    order = (at + 1, at + 4, at + 2, at + 5, at + 3, at)
    return split.permute(*axes, *order).reshape(*lead, 32, 8, 8)


def _from_nibbles(nibbles: Tensor, layout: str) -> Tensor:
    """Inverse of `_to_nibbles`."""
    lead = nibbles.shape[:-3]
    at = len(lead)
    axes = tuple(range(at))
    if layout == "cpu":
        split = nibbles.reshape(*lead, 16, 16, 4, 2)
        return split.permute(*axes, at, at + 1, at + 3, at + 2).reshape(*lead, 16, 128)
    split = nibbles.reshape(*lead, 8, 4, 8, 2, 2, 2)
    order = (at + 5, at, at + 2, at + 4, at + 1, at + 3)
    return split.permute(*axes, *order).reshape(*lead, 16, 128)


def _store(words: Tensor, layout: str) -> Tensor:
    """[row tiles, k tiles, units, stored words of a unit] -> the buffer."""
    if layout == "cpu":
        # Pairs of row tiles alternate quad by quad: [pairs, k tiles, quads, 2, words of a quad, 16 rows].
        split = words.unflatten(3, (4, -1)).unflatten(0, (-1, 2))
        out: Tensor = split.permute(0, 2, 4, 1, 5, 3).flatten()
        return out
    tiles = torch.cat([words[..., :4].flatten(-2), words[..., 4:].flatten(-2)], dim=-1)
    # Four row tiles of a k tile lie together.
    blocks: Tensor = tiles.unflatten(0, (-1, 4)).transpose(1, 2).flatten()
    return blocks


def _load(buffer: Tensor, layout: str, row_tiles: int, k_tiles: int) -> Tensor:
    """Inverse of `_store`."""
    if layout == "cpu":
        split = buffer.view(row_tiles // 2, k_tiles, 4, 2, -1, TILE_ROWS)
        return split.permute(0, 3, 1, 5, 2, 4).flatten(4).flatten(0, 1)
    tiles = buffer.view(row_tiles // 4, k_tiles, 4, -1).transpose(1, 2).flatten(0, 1)
    return torch.cat(
        [tiles[..., :128].unflatten(-1, (32, 4)), tiles[..., 128:].unflatten(-1, (32, -1))], dim=-1
    )


def pack(q: Tensor, zero_point: Tensor | None, *, num_bits: int, group_size: int, layout: str) -> Tensor:
    """Codes to the words of a runtime layout.

    Args:
        q: Codes below 2 ** num_bits, uint8, [out_features, in_features].
        zero_point: Codes of weight zero, uint8, [out_features, num_groups]; None is 2 ** (num_bits - 1).
        num_bits: 3 or 4.
        group_size: Columns that share a zero point; -1 is the row.
        layout: "mma" or "cpu".

    Returns:
        Words, int32, one dimension.
    """
    if q.shape[0] == 0:
        return q.new_empty(0, dtype=torch.int32)
    codes = pad_codes(q, zero_point, num_bits, group_size)
    rows, columns = codes.shape
    tiles = codes.view(rows // 16, 16, columns // 128, 128).transpose(1, 2)  # [row tiles, k tiles, 16, 128]
    shifts = 4 * torch.arange(8, device=q.device)
    virtual = (_to_nibbles(tiles, layout).long() << shifts).sum(-1)  # [..., units, virtual words]
    if num_bits == 3:
        quads = virtual.unflatten(-1, (-1, 4))
        stolen = [((quads[..., 3] >> c) & 0x11111111) << 3 for c in range(3)]
        virtual = (quads[..., :3] | torch.stack(stolen, dim=-1)).flatten(-2)
    words = _store(virtual, layout)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: Tensor, *, out_features: int, in_features: int, num_bits: int, layout: str) -> Tensor:
    """Words of a runtime layout to codes, uint8, [out_features, in_features]."""
    if out_features == 0:
        return words.new_empty((0, in_features), dtype=torch.uint8)
    rows, columns = padded_shape(out_features, in_features)
    virtual = _load(words.long() & 0xFFFFFFFF, layout, rows // TILE_ROWS, columns // TILE_K)
    if num_bits == 3:
        first, second, third = virtual.unflatten(-1, (-1, 3)).unbind(-1)
        fourth = (first >> 3 & 0x11111111) | (second >> 2 & 0x22222222) | (third >> 1 & 0x44444444)
        virtual = torch.stack([first, second, third, fourth], dim=-1).flatten(-2)
    shifts = 4 * torch.arange(8, device=words.device)
    nibbles = (virtual.unsqueeze(-1) >> shifts) & (2**num_bits - 1)
    codes = _from_nibbles(nibbles, layout).transpose(1, 2).reshape(rows, columns)
    return codes[:out_features, :in_features].to(torch.uint8)


def pack_dense(q: Tensor, num_bits: int) -> Tensor:
    """Each row as a dense stream D_b: code i at bits i*b .. i*b+b-1 of little-endian words, int32, [rows, words]."""
    rows, count = q.shape
    bits = (q.long().unsqueeze(-1) >> torch.arange(num_bits, device=q.device)) & 1  # [rows, count, b]
    width = -(-count * num_bits // 32)
    stream = torch.nn.functional.pad(bits.reshape(rows, count * num_bits), (0, width * 32 - count * num_bits))
    words = (stream.view(rows, width, 32) << torch.arange(32, device=q.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_dense(words: Tensor, *, count: int, num_bits: int) -> Tensor:
    """Inverse of `pack_dense`: codes, uint8, [rows, count]."""
    bits = (words.long().unsqueeze(-1) >> torch.arange(32, device=words.device)) & 1
    flat = bits.reshape(words.shape[0], words.shape[1] * 32)
    stream: Tensor = flat[:, : count * num_bits].reshape(words.shape[0], count, num_bits)
    codes: Tensor = (stream << torch.arange(num_bits, device=words.device)).sum(-1)
    return codes.to(torch.uint8)


def pack_groups(per_group: Tensor, layout: str) -> Tensor:
    """Scales or zero points in the kernels' order, padded rows zero.

    Args:
        per_group: [out_features, num_groups].
        layout: "mma" (64 rows side by side) or "cpu" (32).

    Returns:
        Same dtype, [padded rows / R, num_groups, R].
    """
    rows, groups = per_group.shape
    side = SCALE_ROWS[layout]
    out = per_group.new_zeros((padded_shape(rows, 1)[0], groups))
    out[:rows] = per_group
    return out.view(out.shape[0] // side, side, groups).transpose(1, 2).contiguous()


def unpack_groups(packed: Tensor, out_features: int) -> Tensor:
    """Inverse of `pack_groups`: [out_features, num_groups]."""
    return packed.transpose(1, 2).flatten(0, 1)[:out_features].contiguous()
