# SPDX-License-Identifier: Apache-2.0
"""Which grid the scales of a GGUF tensor make, and which GGUF type holds a grid exactly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from discquant.errors import UnrepresentableError, either
from discquant.formats.gguf_blocks import Parts
from discquant.formats.gguf_types import TYPES, BlockType
from discquant.formats.scheme import Scheme
from discquant.grids import AffineGrid, Grid, TableGrid, UniformGrid
from discquant.grids.gguf import gguf_kind
from discquant.grids.table import SIGNED_KINDS

WIDEST_AFFINE = 5


def grid_of(kind: BlockType, parts: Mapping[str, Tensor]) -> Grid:
    """The grid that a tensor's scales make; its float32 weights are those of `gguf.dequantize`, bit for bit.

    Raises:
        ValueError: A scale is NaN or infinite.
    """
    if not kind.scale_bits:
        if kind.looked_up:
            return TableGrid.iq4(parts["d"], kind.name.lower())
        if kind.symmetric:
            return UniformGrid(kind.num_bits, kind.group_size, True, parts["d"])
        return AffineGrid(kind.num_bits, kind.group_size, parts["d"], parts["m"])
    # An 11-bit mantissa times an integer of 8 bits: both products are exact in float32.
    scale = parts["d"].float().unsqueeze(-1) * (parts["sc"].float() - kind.scale_zero)
    if kind.looked_up:
        return TableGrid.iq4(scale.flatten(1), kind.name.lower())
    if kind.symmetric:
        return UniformGrid(kind.num_bits, kind.group_size, True, scale.flatten(1))
    depth = parts["dmin"].float().unsqueeze(-1) * parts["mn"].float()
    return AffineGrid(kind.num_bits, kind.group_size, scale.flatten(1), -depth.flatten(1))


def fit_grid(grid: Grid, columns: int, name: str = "layer") -> tuple[BlockType, Parts, int]:
    """The block type that holds a grid exactly, its scales, and what to add to the codes.

    Symmetric grids of up to 4 bits fit Q4_0 (codes widened), of 5 Q5_0, of more Q8_0; with two-level scales those of 3
    bits Q3_K, of 6 Q6_K. Affine grids fit whichever reproduces scale and minimum: of up to 4 bits Q4_K or Q4_1, of 5
    Q5_K or Q5_1, of 2 also Q2_K. Grids of the IQ4 table are of the type that they were laid for.

    Args:
        grid: Grid of the layer.
        columns: in_features.
        name: Module path, for the message.

    Raises:
        UnrepresentableError: No type holds this grid; the message says which one was closest and why.
    """
    if isinstance(grid, UniformGrid) and grid.symmetric and grid.g_idx is None:
        return _fit_symmetric(grid, columns, name)
    if isinstance(grid, TableGrid) and grid.kind in SIGNED_KINDS:
        return _fit_table(grid, columns, name)
    return _fit_affine(grid, columns, name)


def planned_type(scheme: Scheme, columns: int) -> BlockType:
    """The block type that `fit_grid` will choose for a scheme, or where the values decide between two, the larger."""
    if scheme.kind.upper() in TYPES:
        return TYPES[gguf_kind(scheme.kind, columns).upper()]
    symmetric = scheme.kind == "int" and scheme.symmetric
    own = _two_level(scheme.num_bits, scheme.group_size, symmetric, columns)
    return own if own is not None and own.group_size < 32 else plain_type(scheme.num_bits, symmetric)


def plain_type(num_bits: int, symmetric: bool) -> BlockType:
    """The narrowest type with a float16 scale (and minimum) per 32 columns that holds such codes, else the widest."""
    kinds = [
        kind
        for kind in TYPES.values()
        if kind.symmetric == symmetric and not (kind.scale_bits or kind.looked_up)
    ]
    return next((kind for kind in kinds if kind.num_bits >= num_bits), kinds[-1])


def _two_level(num_bits: int, group_size: int, symmetric: bool, columns: int) -> BlockType | None:
    """The type of integer scales that is of these bits and groups."""
    wanted = (num_bits, group_size, symmetric)
    for kind in TYPES.values():
        found = (kind.num_bits, kind.group_size, kind.symmetric)
        if kind.scale_bits and not kind.looked_up and found == wanted and columns % kind.columns == 0:
            return kind
    return None


def _fit_symmetric(grid: UniformGrid, columns: int, name: str) -> tuple[BlockType, Parts, int]:
    if columns % 32:
        raise UnrepresentableError(
            f"{name}: GGUF needs rows of whole 32-column blocks, got {columns} columns"
        )
    size = columns if grid.group_size == -1 else grid.group_size
    own = _two_level(grid.num_bits, size, True, columns)
    if own is not None:
        return own, _multiples(own, grid.scale, name), 0
    if size % 32 and size != columns:
        raise UnrepresentableError(f"{name}: GGUF has a scale per 32 columns, got group_size {size}")
    d = _exact_half(grid.scale)
    if d is None:
        raise UnrepresentableError(
            f"{name}: GGUF scales are float16, and a scale of this grid is none exactly"
        )
    kind = plain_type(grid.num_bits, True)
    d = d.repeat_interleave(size // 32, dim=1)[:, : columns // 32]
    return kind, {"d": d}, 2 ** (kind.num_bits - 1) - 2 ** (grid.num_bits - 1)


def _fit_table(grid: TableGrid, columns: int, name: str) -> tuple[BlockType, Parts, int]:
    kind = TYPES[grid.kind.upper()]
    if columns % kind.columns:
        raise UnrepresentableError(
            f"{name}: {kind.name} needs rows of whole {kind.columns}-column blocks, got {columns} columns"
        )
    if kind.scale_bits:
        return kind, _multiples(kind, grid.scale, name), 0
    d = _exact_half(grid.scale)
    if d is None:
        raise UnrepresentableError(
            f"{name}: GGUF scales are float16, and a scale of this grid is none exactly"
        )
    return kind, {"d": d}, 0


def _multiples(kind: BlockType, scale: Tensor, name: str) -> Parts:
    """Scales with a sign as integers times d."""
    found = _factor(scale.float().unflatten(1, (-1, kind.groups)), *kind.scale_range)
    if found is None:
        raise UnrepresentableError(
            f"{name}: its scales are no small multiples of one float16 per 256 columns, as {kind.name} needs; "
            f"lay the grid with kind {kind.name.lower()}"
        )
    return {"d": found[0], "sc": (found[1] + kind.scale_zero).to(torch.uint8)}


def _fit_affine(grid: Grid, columns: int, name: str) -> tuple[BlockType, Parts, int]:
    affine = _as_affine(grid)
    size = columns if grid.group_size == -1 else grid.group_size
    # A wider type has no other scales than that of 4 bits, so no other grid would fit it.
    widths = (grid.num_bits, max(grid.num_bits, 4))
    kinds = [
        kind
        for kind in TYPES.values()
        if not kind.symmetric
        and kind.num_bits in widths
        and size % kind.group_size == 0
        and columns % kind.columns == 0
    ]
    if affine is None or not kinds:
        raise UnrepresentableError(
            f"{name}: no GGUF type holds a {grid.num_bits}-bit {_words(grid)} with groups of {grid.group_size}"
        )
    # The smallest that fits; but a grid with float16 scales was laid for a type that has them.
    half = affine[0].dtype == torch.float16
    for kind in sorted(
        kinds, key=lambda kind: (half and kind.scale_bits > 0, kind.row_bytes(kind.columns) / kind.columns)
    ):
        repeat = size // kind.group_size
        scale, minimum = (
            part.repeat_interleave(repeat, dim=1)[:, : columns // kind.group_size] for part in affine
        )
        parts = _affine_parts(kind, scale, minimum)
        if parts is not None:
            return kind, parts, 0
    told = either(f"{kind.name} ({_scales(kind)})" for kind in kinds)
    raise UnrepresentableError(
        f"{name}: this grid is not exactly one of {told}; lay it with kind "
        f"{either(kind.name.lower() for kind in kinds)}"
    )


def _words(grid: Grid) -> str:
    """A grid in users' words."""
    if isinstance(grid, TableGrid):
        return f"{grid.kind} grid"
    return "grid with a minimum per group" if isinstance(grid, AffineGrid) else "uniform grid"


def _scales(kind: BlockType) -> str:
    """What scales of a type may be, in words."""
    return f"{kind.scale_bits}-bit multiples of a float16" if kind.scale_bits else "float16 scale and minimum"


def _affine_parts(kind: BlockType, scale: Tensor, minimum: Tensor) -> Parts | None:
    """Scales of a type that are this scale and minimum per group exactly, if there are such."""
    if not kind.scale_bits:
        d, m = _exact_half(scale), _exact_half(minimum)
        return None if d is None or m is None else {"d": d, "m": m}
    steps = _factor(scale.float().unflatten(1, (-1, kind.groups)), *kind.scale_range)
    depths = (
        None
        if steps is None
        else _factor(-minimum.float().unflatten(1, (-1, kind.groups)), *kind.scale_range)
    )
    if steps is None or depths is None:
        return None
    parts = {"d": steps[0], "dmin": depths[0]}
    return parts | {"sc": steps[1].to(torch.uint8), "mn": depths[1].to(torch.uint8)}


def _as_affine(grid: Grid) -> tuple[Tensor, Tensor] | None:
    """Scale and minimum per group, if the grid has them: minimum = -scale * zero_point on uniform grids."""
    if isinstance(grid, AffineGrid) and grid.compute == torch.float32:
        return grid.scale, grid.minimum
    # s q + m equals s (q - z) in float32 only where s q is exact, so where s is short.
    short = isinstance(grid, UniformGrid) and grid.scale.dtype in (torch.float16, torch.bfloat16)
    if short and grid.zero_point is not None and getattr(grid, "g_idx", None) is None:
        return grid.scale.float(), grid.scale.float() * -grid.zero_point.float()
    return None


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
