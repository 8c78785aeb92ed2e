# SPDX-License-Identifier: Apache-2.0
"""GGUF blocks: codes and scales to bytes and back, byte for byte as the table `gguf_types` lays them out.

Everything is [rows, blocks, bytes of a block] in uint8. Codes are unsigned whatever the type does with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from discquant.formats.gguf_types import BlockType, Plane

Parts = dict[str, Tensor]


def pack_blocks(kind: BlockType, q: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """Codes and scales to the bytes of a tensor.

    Args:
        kind: Block type.
        q: Codes below 2^num_bits, uint8, [rows, columns], columns a multiple of the block.
        parts: Scales by the names of `unpack_blocks`, in its dtypes and shapes.

    Returns:
        uint8, [rows, bytes of a row].

    Raises:
        ValueError: A code does not fit, or columns do not fill blocks.
    """
    if q.shape[1] % kind.columns:
        raise ValueError(
            f"pack_blocks: columns must be a multiple of {kind.columns} for {kind.name}, got {q.shape[1]}"
        )
    _check_width("pack_blocks", kind, q)
    rows, blocks = q.shape[0], q.shape[1] // kind.columns
    out = torch.zeros((rows, blocks, kind.size), dtype=torch.uint8)
    for name, at in kind.halves:
        out[..., at : at + 2] = _half_bytes(parts[name], (rows, blocks))
    if kind.scale_bits:
        _put(out, kind.scale_planes, _joined(kind, parts))
    _put(out, kind.planes, q.cpu().reshape(rows, blocks, kind.columns))
    return out.reshape(rows, blocks * kind.size)


def replace_codes(kind: BlockType, raw: Tensor, q: Tensor) -> Tensor:
    """A copy of a tensor's bytes with other codes; every other byte stays.

    Args:
        kind: Block type.
        raw: Bytes, uint8, [rows, bytes of a row].
        q: Codes below 2^num_bits, uint8, [rows, columns].

    Returns:
        uint8, the shape of raw.

    Raises:
        ValueError: A code does not fit, or the shapes disagree.
    """
    rows, blocks = raw.shape[0], raw.shape[1] // kind.size
    if q.shape != (rows, blocks * kind.columns):
        raise ValueError(
            f"replace_codes: q must have shape = {[rows, blocks * kind.columns]}, got {list(q.shape)}"
        )
    _check_width("replace_codes", kind, q)
    out = raw.reshape(rows, blocks, kind.size).clone()
    for first, last in kind.codes:
        out[..., first:last] = 0
    _put(out, kind.planes, q.cpu().reshape(rows, blocks, kind.columns))
    return out.reshape(raw.shape)


def unpack_blocks(kind: BlockType, raw: Tensor) -> tuple[Tensor, Parts]:
    """The bytes of a tensor to codes and scales.

    Args:
        kind: Block type.
        raw: uint8, [rows, bytes of a row].

    Returns:
        Codes, uint8, [rows, columns]; and the scales: `d` (and `m`, or `dmin`) float16 [rows, blocks]; where scales are
        integers, `sc` uint8 [rows, blocks, groups], `scale_zero` above its value, and `mn` likewise.
    """
    rows, blocks = raw.shape[0], raw.shape[1] // kind.size
    block = raw.reshape(rows, blocks, kind.size)
    parts = {name: _half_values(block[..., at : at + 2]) for name, at in kind.halves}
    if kind.scale_bits:
        parts |= _parted(kind, _taken(block, kind.scale_planes))
    return _taken(block, kind.planes).reshape(rows, blocks * kind.columns), parts


def _check_width(function: str, kind: BlockType, q: Tensor) -> None:
    if q.numel() and int(q.max()) >> kind.num_bits:
        raise ValueError(f"{function}: q must be below 2^{kind.num_bits} for {kind.name}, got {int(q.max())}")


def _fields(plane: Plane, block: Tensor, values: Tensor) -> Iterable[tuple[Tensor, Tensor, int]]:
    """Views of bytes and of the integers that have a field in them, [rows, blocks, stretches, width]; its first bit."""
    octets = block[..., plane.start : plane.start + plane.size].unflatten(-1, (-1, plane.width))
    whole = values[..., plane.first : plane.first + plane.count]
    runs = whole.unflatten(-1, (-1, plane.fields, plane.width))
    for field in range(plane.fields):
        yield octets, runs[..., field, :], plane.shift + field * plane.bits


def _put(out: Tensor, planes: Iterable[Plane], values: Tensor) -> None:
    """Write integers, [rows, blocks, count], where bytes are zero."""
    for plane in planes:
        mask, flip = (1 << plane.bits) - 1, _flip(plane)
        for octets, run, at in _fields(plane, out, values):
            octets |= ((run >> plane.place & mask) ^ flip) << at


def _taken(block: Tensor, planes: tuple[Plane, ...]) -> Tensor:
    """Read integers, uint8, [rows, blocks, count]."""
    count = max(plane.first + plane.count for plane in planes)
    values = torch.zeros((*block.shape[:2], count), dtype=torch.uint8)
    for plane in planes:
        mask, flip = (1 << plane.bits) - 1, _flip(plane)
        for octets, run, at in _fields(plane, block, values):
            run |= ((octets >> at & mask) ^ flip) << plane.place
    return values


def _flip(plane: Plane) -> int:
    """Two's complement differs from a count above the least value in its top bit alone."""
    return 1 << (plane.bits - 1) if plane.signed else 0


def _joined(kind: BlockType, parts: Mapping[str, Tensor]) -> Tensor:
    """Integer scales and minima in the order of the planes."""
    if kind.symmetric:
        return parts["sc"]
    both = torch.stack([parts[name].unflatten(-1, (-1, kind.scale_run)) for name in ("sc", "mn")], dim=-2)
    return both.flatten(-3)


def _parted(kind: BlockType, values: Tensor) -> Parts:
    """Undo `_joined`."""
    if kind.symmetric:
        return {"sc": values}
    sc, mn = values.unflatten(-1, (-1, 2, kind.scale_run)).unbind(dim=-2)
    return {"sc": sc.flatten(-2), "mn": mn.flatten(-2)}


def _half_bytes(values: Tensor, shape: tuple[int, int]) -> Tensor:
    if values.dtype != torch.float16 or tuple(values.shape) != shape:
        raise ValueError(
            f"pack_blocks: scales must be float16 of shape = {list(shape)}, got {values.dtype} {list(values.shape)}"
        )
    return _flat(values).view(torch.uint8).reshape(*shape, 2)


def _half_values(octets: Tensor) -> Tensor:
    return _flat(octets).view(torch.float16).reshape(octets.shape[:-1])


def _flat(values: Tensor) -> Tensor:
    """Fresh and one-dimensional: `view` refuses the odd strides that axes of length 1 may keep."""
    return torch.empty(values.numel(), dtype=values.dtype).copy_(values.reshape(-1))
