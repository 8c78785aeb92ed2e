# SPDX-License-Identifier: Apache-2.0
"""Choose scales and zero points for a weight, representable in the served dtype before anything is rounded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from discquant.config import GridConfig
from discquant.grids.base import Grid
from discquant.grids.gguf import place_gguf
from discquant.grids.place_table import place_table
from discquant.grids.uniform import UniformGrid

# A bfloat16 number of at least 2^-17 is also exact in float16, so every format sees the same grid.
MIN_SCALE = 2.0**-17
MAX_SCALE = 65280.0  # the largest bfloat16 that float16 holds
SEARCH_STEPS = 40
SEARCH_LOW, SEARCH_HIGH = 0.45, 1.10


def ceil_bfloat16(value: Tensor) -> Tensor:
    """Round positive float32 up to the next bfloat16, so that a range covered before stays covered."""
    bits = value.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _clean(scale: Tensor) -> Tensor:
    return scale.clamp(MIN_SCALE, MAX_SCALE)


class _Grouped(NamedTuple):
    values: Tensor  # [rows, groups, group_size], float32
    valid: Tensor  # [groups, group_size], False in the padding of a short last group


def _group(weight: Tensor, group_size: int) -> _Grouped:
    rows, columns = weight.shape
    size = columns if group_size == -1 else min(group_size, columns)
    groups = -(-columns // size)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * size - columns))
    valid = torch.arange(groups * size, device=weight.device).view(groups, size) < columns
    return _Grouped(padded.view(rows, groups, size), valid)


def _error(grouped: _Grouped, scale: Tensor, zero: Tensor | float, max_code: int) -> Tensor:
    """Squared error of rounding to nearest per group; zero padding is on the grid and adds nothing."""
    step = scale.unsqueeze(-1)
    offset = zero.unsqueeze(-1) if isinstance(zero, Tensor) else zero
    q = torch.round(grouped.values / step + offset).clamp_(0, max_code)
    error = (q - offset).mul_(step).sub_(grouped.values).square_()
    return (error * grouped.valid).sum(dim=-1)


def _symmetric(grouped: _Grouped, bits: int, search: bool) -> Tensor:
    """Scale 2 A / (2^b - 1) with A the largest magnitude, or the multiple of it with the least error."""
    largest = grouped.values.abs().amax(dim=-1)
    full = largest * (2.0 / (2**bits - 1))
    best = _clean(ceil_bfloat16(full))
    if not search:
        return best
    zero, max_code = 2.0 ** (bits - 1), 2**bits - 1
    least = _error(grouped, best, zero, max_code)
    for ratio in torch.linspace(SEARCH_LOW, SEARCH_HIGH, SEARCH_STEPS).tolist():
        scale = _clean((full * ratio).bfloat16().float())
        error = _error(grouped, scale, zero, max_code)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _asymmetric(grouped: _Grouped, bits: int, search: bool) -> tuple[Tensor, Tensor]:
    """Scale (hi - lo) / (2^b - 1), zero = round(-lo / scale), with lo <= 0 <= hi; or shrunk for least error."""
    max_code = 2**bits - 1
    low = grouped.values.amin(dim=-1).clamp(max=0)
    high = grouped.values.amax(dim=-1).clamp(min=0)

    def candidate(low: Tensor, high: Tensor, round_up: bool) -> tuple[Tensor, Tensor]:
        exact = (high - low) / max_code
        scale = _clean(ceil_bfloat16(exact) if round_up else exact.bfloat16().float())
        return scale, torch.round(-low / scale).clamp(0, max_code)

    best, best_zero = candidate(low, high, True)
    if not search:
        return best, best_zero
    least = _error(grouped, best, best_zero, max_code)
    ratios = torch.linspace(SEARCH_LOW, SEARCH_HIGH, SEARCH_STEPS // 2).tolist()
    for ratio in ratios:
        for shift in (-1.0, -0.5, 0.0, 0.5, 1.0):
            scale, _ = candidate(low * ratio, high * ratio, False)
            zero = torch.round(-low * ratio / scale + shift).clamp(0, max_code)
            error = _error(grouped, scale, zero, max_code)
            better = error < least
            best = torch.where(better, scale, best)
            best_zero = torch.where(better, zero, best_zero)
            least = torch.where(better, error, least)
    return best, best_zero


def place_grid(weight: Tensor, config: GridConfig, *, largest: float | None = None) -> Grid:
    """Lay a grid of the configured kind on a weight matrix.

    Args:
        weight: Floating, [out_features, in_features].
        config: Kind, bits, group size, symmetry, scale rule.
        largest: Of nvfp4, see `place_table`; other kinds have no scale of the whole matrix.

    Returns:
        The grid, its scales exactly those that a file will hold.

    Raises:
        ValueError: The weight is not a finite matrix, or too large for the scales.
        UnrepresentableError: The rows do not fill the blocks of the kind.
    """
    search = config.grid == "search"
    if config.kind == "uniform":
        return place_uniform(weight, config)
    if config.kind in ("nf4", "mxfp4", "nvfp4"):
        return place_table(weight, config.kind, search=search, largest=largest)
    return place_gguf(weight, config.kind, search=search)


def place_uniform(weight: Tensor, config: GridConfig) -> UniformGrid:
    """Lay a uniform grid on a weight matrix.

    absmax, symmetric: scale = 2 max|w| / (2^b - 1), levels -2^(b-1) .. 2^(b-1) - 1 times the scale. The
    largest weight lies half a step outside when positive; it may choose between the two top levels.
    A group of zeros gets the smallest scale and lies on the grid.

    Args:
        weight: Floating, [out_features, in_features].
        config: Bits, group size, symmetry, scale rule.

    Returns:
        Grid with bfloat16 scales >= 2^-17, exact in bfloat16 and float16.

    Raises:
        ValueError: The weight is not a finite matrix, or too large for float16 scales.
    """
    if weight.dim() != 2:
        raise ValueError(f"place_grid: weight must have 2 dimensions, got shape {list(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("place_grid: weight must be finite, got NaN or Inf")
    with torch.no_grad():
        grouped = _group(weight.detach(), config.group_size)
        if float(grouped.values.abs().max()) > MAX_SCALE:
            raise ValueError(f"place_grid: weight must be at most {MAX_SCALE} in magnitude")
        # One group per row anyway: say so, because formats call it another strategy.
        group_size = -1 if config.group_size > weight.shape[1] else config.group_size
        search = config.grid == "search"
        if config.sym:
            scale = _symmetric(grouped, config.bits, search)
            return UniformGrid(config.bits, group_size, True, scale.bfloat16())
        scale, zero = _asymmetric(grouped, config.bits, search)
        return UniformGrid(config.bits, group_size, False, scale.bfloat16(), zero.to(torch.uint8))
