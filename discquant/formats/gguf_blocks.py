# SPDX-License-Identifier: Apache-2.0
"""GGUF blocks: codes and scales to bytes and back, byte for byte as formats.md section 7 lays them out.

Everything is [rows, blocks, bytes of a block] in uint8. Codes are unsigned whatever the type does with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from discquant.errors import UnrepresentableError
from discquant.formats.scheme import Scheme
from discquant.grids import AffineGrid, Grid, UniformGrid
from discquant.grids.gguf import SUPER, SUPER_KINDS, gguf_kind

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class BlockType:
    """One GGUF type whose codes are read and written.

    Attributes:
        name: As GGUF spells it.
        number: Its id in the file.
        columns: Weights of a block, along a row.
        size: Bytes of a block.
        num_bits: Width of a code.
        group_size: Columns that share a scale.
        symmetric: Whether weight zero is one fixed code.
        codes: Byte ranges of a block that hold codes and nothing else.
    """

    name: str
    number: int
    columns: int
    size: int
    num_bits: int
    group_size: int
    symmetric: bool
    codes: tuple[tuple[int, int], ...]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of that many weights."""
        return columns // self.columns * self.size


TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 2, 32, 18, 4, 32, True, ((2, 18),)),
        BlockType("Q4_1", 3, 32, 20, 4, 32, False, ((4, 20),)),
        BlockType("Q8_0", 8, 32, 34, 8, 32, True, ((2, 34),)),
        BlockType("Q3_K", 11, 256, 110, 3, 16, True, ((0, 96),)),
        BlockType("Q4_K", 12, 256, 144, 4, 32, False, ((16, 144),)),
    )
}
BY_NUMBER = {kind.number: kind for kind in TYPES.values()}


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
    if q.numel() and int(q.max()) >> kind.num_bits:
        raise ValueError(
            f"pack_blocks: q must be below 2^{kind.num_bits} for {kind.name}, got {int(q.max())}"
        )
    rows, blocks = q.shape[0], q.shape[1] // kind.columns
    out = torch.zeros((rows, blocks, kind.size), dtype=torch.uint8)
    _put_scales(kind, out, parts)
    _put_codes(kind, out, q.cpu())
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
    if q.numel() and int(q.max()) >> kind.num_bits:
        raise ValueError(
            f"replace_codes: q must be below 2^{kind.num_bits} for {kind.name}, got {int(q.max())}"
        )
    out = raw.reshape(rows, blocks, kind.size).clone()
    _put_codes(kind, out, q.cpu())
    return out.reshape(raw.shape)


def unpack_blocks(kind: BlockType, raw: Tensor) -> tuple[Tensor, Parts]:
    """The bytes of a tensor to codes and scales.

    Args:
        kind: Block type.
        raw: uint8, [rows, bytes of a row].

    Returns:
        Codes, uint8, [rows, columns]; and the scales: `d` (and `m` of Q4_1, `dmin` of Q4_K) float16 [rows, blocks];
        `sc` uint8 [rows, blocks, sub-blocks] 0 .. 63 (of Q3_K 32 above its value), `mn` of Q4_K likewise.
    """
    rows, blocks = raw.shape[0], raw.shape[1] // kind.size
    block = raw.reshape(rows, blocks, kind.size)
    parts = _scales(kind, block)
    if kind.name in ("Q4_0", "Q4_1"):
        packed = block[..., kind.size - 16 :]
        q = torch.cat((packed & 15, packed >> 4), dim=-1)
    elif kind.name == "Q8_0":
        q = block[..., 2:] ^ 0x80  # int8 to the code 128 above it
    elif kind.name == "Q4_K":
        packed = block[..., 16:].reshape(rows, blocks, 4, 32)
        q = torch.stack((packed & 15, packed >> 4), dim=-2)
    else:
        places = torch.arange(8, dtype=torch.uint8)
        high = block[..., None, :32] >> places[:, None] & 1
        low = block[..., 32:96].reshape(rows, blocks, 2, 1, 32) >> (2 * places[:4, None]) & 3
        q = low.reshape(rows, blocks, 256) | high.reshape(rows, blocks, 256) << 2
    return q.reshape(rows, blocks * kind.columns), parts


def grid_of(kind: BlockType, parts: Mapping[str, Tensor]) -> Grid:
    """The grid that a tensor's scales make; its float32 weights are those of `gguf.dequantize`, bit for bit.

    Raises:
        ValueError: A scale is NaN or infinite.
    """
    d = parts["d"]
    if kind.name in ("Q4_0", "Q8_0"):
        return UniformGrid(kind.num_bits, 32, True, d)
    if kind.name == "Q4_1":
        return AffineGrid(4, 32, d, parts["m"])
    # An 11-bit mantissa times a 6-bit integer: both products are exact in float32.
    wide = d.float().unsqueeze(-1)
    if kind.name == "Q3_K":
        return UniformGrid(3, 16, True, (wide * (parts["sc"].float() - 32)).flatten(1))
    depth = parts["dmin"].float().unsqueeze(-1) * parts["mn"].float()
    return AffineGrid(4, 32, (wide * parts["sc"].float()).flatten(1), -depth.flatten(1))


def fit_grid(grid: Grid, columns: int, name: str = "layer") -> tuple[BlockType, Parts, int]:
    """The block type that holds a grid exactly, its scales, and what to add to the codes.

    Symmetric grids of up to 4 bits fit Q4_0 (codes widened), of more Q8_0, 3 bits with two-level scales Q3_K; affine
    4-bit grids fit Q4_K or Q4_1, whichever reproduces scale and minimum.

    Args:
        grid: Grid of the layer.
        columns: in_features.
        name: Module path, for the message.

    Raises:
        UnrepresentableError: No type holds this grid; the message says which one was closest and why.
    """
    if isinstance(grid, UniformGrid) and grid.symmetric and grid.g_idx is None:
        if columns % 32:
            raise UnrepresentableError(
                f"{name}: GGUF needs rows of whole 32-column blocks, got {columns} columns"
            )
        size = columns if grid.group_size == -1 else grid.group_size
        if grid.num_bits == 3 and size == 16 and columns % 256 == 0:
            found = _factor(grid.scale.float().reshape(len(grid.scale), -1, 16), -32, 31)
            if found is None:
                raise UnrepresentableError(
                    f"{name}: its scales are no small multiples of one float16 per 256 columns, as Q3_K needs; "
                    "lay the grid with kind q3_k"
                )
            return TYPES["Q3_K"], {"d": found[0], "sc": (found[1] + 32).to(torch.uint8)}, 0
        if size % 32 and size != columns:
            raise UnrepresentableError(f"{name}: GGUF has a scale per 32 columns, got group_size {size}")
        d = _exact_half(grid.scale)
        if d is None:
            raise UnrepresentableError(
                f"{name}: GGUF scales are float16, and a scale of this grid is none exactly"
            )
        kind = TYPES["Q4_0" if grid.num_bits <= 4 else "Q8_0"]
        d = d.repeat_interleave(size // 32, dim=1)[:, : columns // 32]
        return kind, {"d": d}, 2 ** (kind.num_bits - 1) - 2 ** (grid.num_bits - 1)
    affine = _as_affine(grid, columns)
    if affine is None or grid.num_bits > 4 or columns % 32:
        raise UnrepresentableError(
            f"{name}: no GGUF type holds a {grid.num_bits}-bit {type(grid).__name__} with groups of {grid.group_size}"
        )
    scale, minimum = affine
    d, m = _exact_half(scale), _exact_half(minimum)
    if d is not None and m is not None and (scale.dtype == torch.float16 or columns % 256):
        return TYPES["Q4_1"], {"d": d, "m": m}, 0
    if columns % 256 == 0:
        steps = _factor(scale.float().reshape(len(scale), -1, 8), 0, 63)
        depths = _factor(-minimum.float().reshape(len(scale), -1, 8), 0, 63)
        if steps is not None and depths is not None:
            parts = {"d": steps[0], "dmin": depths[0]}
            return TYPES["Q4_K"], parts | {"sc": steps[1].to(torch.uint8), "mn": depths[1].to(torch.uint8)}, 0
    if d is not None and m is not None:
        return TYPES["Q4_1"], {"d": d, "m": m}, 0
    raise UnrepresentableError(
        f"{name}: neither Q4_1 (float16 scale and minimum) nor Q4_K (6-bit multiples of a float16) holds this grid "
        "exactly; lay it with kind q4_1 or q4_k"
    )


def planned_type(scheme: Scheme, columns: int) -> BlockType:
    """The block type that `fit_grid` will choose for a scheme, or where the values decide between two, the larger."""
    if scheme.kind in SUPER_KINDS:
        return TYPES[gguf_kind(scheme.kind, columns).upper()]
    if scheme.kind != "int" or not scheme.symmetric:
        return TYPES["Q4_1"]
    if scheme.num_bits == 3 and scheme.group_size == 16 and columns % SUPER == 0:
        return TYPES["Q3_K"]
    return TYPES["Q4_0" if scheme.num_bits <= 4 else "Q8_0"]


def _as_affine(grid: Grid, columns: int) -> tuple[Tensor, Tensor] | None:
    """Scale and minimum per 32 columns, if the grid is that: minimum = -scale * zero_point on uniform grids."""
    if isinstance(grid, AffineGrid) and grid.compute == torch.float32:
        scale, minimum = grid.scale, grid.minimum
    elif isinstance(grid, UniformGrid) and grid.zero_point is not None and grid.g_idx is None:
        scale, minimum = grid.scale, grid.scale.float() * -grid.zero_point.float()
        # s q + m equals s (q - z) in float32 only where s q is exact, so where s is short.
        if scale.dtype not in (torch.float16, torch.bfloat16):
            return None
        scale = scale.float()
    else:
        return None
    size = columns if grid.group_size == -1 else grid.group_size
    if size % 32:
        return None
    repeat = size // 32
    return (
        scale.repeat_interleave(repeat, dim=1)[:, : columns // 32],
        minimum.repeat_interleave(repeat, dim=1)[:, : columns // 32],
    )


def _exact_half(values: Tensor) -> Tensor | None:
    """The values in float16, or None if one changes."""
    half = values.half()
    same = bool((half.float() == values.float()).all()) and bool(torch.isfinite(half).all())
    return half.cpu() if same else None


def _factor(values: Tensor, low: int, high: int) -> tuple[Tensor, Tensor] | None:
    """Write values[..., j] = d * k[..., j] exactly, d float16, k integer in low..high.

    d is tried as the largest value divided by each integer, largest first, so it need not be the d that a file once
    had; the products, which are the grid, are the same.

    Returns:
        d, float16, [rows, blocks], and k, int16, the shape of values; None if some block has no such form.
    """
    values = values.cpu()
    flat = values.reshape(-1, values.shape[-1])
    peak = flat.gather(1, flat.abs().argmax(dim=1, keepdim=True))
    d = torch.zeros(len(flat), 1)
    left = torch.nonzero(peak[:, 0] != 0)[:, 0]
    factors = sorted(
        (number for number in range(low, high + 1) if number), key=lambda number: (-abs(number), number)
    )
    for factor in factors:
        if not len(left):
            break
        trial = (peak[left] / factor).half().float()
        usable = trial != 0
        steps = torch.round(flat[left] / torch.where(usable, trial, 1.0)).clamp_(low, high)
        exact = usable[:, 0] & (steps * trial == flat[left]).all(dim=1) & torch.isfinite(trial[:, 0])
        d[left[exact]] = trial[exact]
        left = left[~exact]
    if len(left):
        return None
    steps = torch.round(flat / torch.where(d == 0, 1.0, d)).to(torch.int16)
    return d.half().reshape(values.shape[:-1]), steps.reshape(values.shape)


def _put_codes(kind: BlockType, out: Tensor, q: Tensor) -> None:
    rows, blocks = out.shape[:2]
    codes = q.reshape(rows, blocks, kind.columns)
    if kind.name in ("Q4_0", "Q4_1"):
        out[..., kind.size - 16 :] = codes[..., :16] | codes[..., 16:] << 4
    elif kind.name == "Q8_0":
        out[..., 2:] = codes ^ 0x80
    elif kind.name == "Q4_K":
        pairs = codes.reshape(rows, blocks, 4, 2, 32)
        out[..., 16:] = (pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(rows, blocks, 128)
    else:
        high = codes.reshape(rows, blocks, 8, 32) >> 2
        low = (codes & 3).reshape(rows, blocks, 2, 4, 32)
        out[..., :96] = 0
        for place in range(8):
            out[..., :32] |= high[..., place, :] << place
        for place in range(4):
            out[..., 32:96] |= (low[..., place, :] << (2 * place)).reshape(rows, blocks, 64)


def _put_scales(kind: BlockType, out: Tensor, parts: Mapping[str, Tensor]) -> None:
    rows, blocks = out.shape[:2]
    at = {"Q3_K": 108}.get(kind.name, 0)
    out[..., at : at + 2] = _half_bytes(parts["d"], (rows, blocks))
    if kind.name == "Q4_1":
        out[..., 2:4] = _half_bytes(parts["m"], (rows, blocks))
    elif kind.name == "Q4_K":
        out[..., 2:4] = _half_bytes(parts["dmin"], (rows, blocks))
        sc, mn = parts["sc"], parts["mn"]
        out[..., 4:8] = sc[..., :4] & 63 | sc[..., 4:] >> 4 << 6
        out[..., 8:12] = mn[..., :4] & 63 | mn[..., 4:] >> 4 << 6
        out[..., 12:16] = sc[..., 4:] & 15 | mn[..., 4:] << 4
    elif kind.name == "Q3_K":
        sc = parts["sc"]
        out[..., 96:104] = sc[..., :8] & 15 | sc[..., 8:] << 4
        for place in range(4):
            out[..., 104:108] |= sc[..., 4 * place : 4 * place + 4] >> 4 << (2 * place)


def _scales(kind: BlockType, block: Tensor) -> Parts:
    if kind.name == "Q3_K":
        low = torch.cat((block[..., 96:104] & 15, block[..., 96:104] >> 4), dim=-1)
        high = torch.cat([block[..., 104:108] >> (2 * place) & 3 for place in range(4)], dim=-1)
        return {"d": _half_values(block[..., 108:110]), "sc": low | high << 4}
    parts = {"d": _half_values(block[..., :2])}
    if kind.name == "Q4_1":
        parts["m"] = _half_values(block[..., 2:4])
    elif kind.name == "Q4_K":
        parts["dmin"] = _half_values(block[..., 2:4])
        first, second, last = block[..., 4:8], block[..., 8:12], block[..., 12:16]
        parts["sc"] = torch.cat((first & 63, last & 15 | first >> 6 << 4), dim=-1)
        parts["mn"] = torch.cat((second & 63, last >> 4 | second >> 6 << 4), dim=-1)
    return parts


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
