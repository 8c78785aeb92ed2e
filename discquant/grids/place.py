# SPDX-License-Identifier: Apache-2.0
"""Choose scales and zero points for a weight, representable in the served dtype before anything is rounded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from discquant.config import GridConfig
from discquant.grids.base import Grid
from discquant.grids.gguf import place_gguf
from discquant.grids.place_table import place_table
from discquant.grids.uniform import SCALE_RANGE, UniformGrid, held_scale

MAX_SCALE = SCALE_RANGE[torch.bfloat16][1]
# Multiples of the range that a search tries; the scale is then fitted to the codes that each gives.
# On the CPU, so that this can be imported under torch.device("meta").
_SYMMETRIC_RATIOS = [0.22, 0.28, 0.34, *torch.linspace(0.40, 1.05, 16, device="cpu").tolist()]
_ASYMMETRIC_RATIOS = [0.25, 0.35, *torch.linspace(0.45, 1.10, 10, device="cpu").tolist()]
_SHIFTS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # of the zero point
_REFITS = 2
# Multiples of the scale that was found, tried next; they count from 5 bits on.
_NEARBY = (0.97, 0.98, 0.985, 0.99, 0.995, 1.005, 1.01, 1.02)
# Weights that are taken at a time: on a CPU the scratch of a candidate then stays in the cache.
_CHUNK, _CHUNK_GPU = 1 << 17, 1 << 24


def ceil_bfloat16(value: Tensor) -> Tensor:
    """Round positive float32 up to the next bfloat16, so that a range covered before stays covered."""
    bits = value.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _clean(scale: Tensor) -> Tensor:
    """The nearest scale of the same sign that every format holds."""
    return held_scale(scale, torch.bfloat16).float()


def _group(weight: Tensor, group_size: int) -> Tensor:
    """[rows, groups, group_size] in float32; a short last group is filled with zeros, which every grid has."""
    rows, columns = weight.shape
    size = columns if group_size == -1 else min(group_size, columns)
    groups = -(-columns // size)
    return torch.nn.functional.pad(weight.float(), (0, groups * size - columns)).view(rows, groups, size)


class _Fit(NamedTuple):
    scale: Tensor  # float32, [rows, groups]
    zero: Tensor  # the same, or one for all


def _levels(values: Tensor, inverse: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Nearest codes minus the zero point; `inverse` is one over the scale."""
    below = zero.unsqueeze(-1)
    return torch.round(values * inverse.unsqueeze(-1)).clamp_(-below, max_code - below)


def _error(values: Tensor, fit: _Fit, max_code: int) -> Tensor:
    """Squared error per group of rounding to nearest."""
    levels = _levels(values, 1 / fit.scale, fit.zero, max_code)
    return levels.mul_(fit.scale.unsqueeze(-1)).sub_(values).square_().sum(dim=-1)


def _chosen(better: Tensor, one: _Fit, other: _Fit) -> _Fit:
    """`one` where it is better, else `other`."""
    return _Fit(torch.where(better, one.scale, other.scale), torch.where(better, one.zero, other.zero))


def _search(values: Tensor, covering: _Fit, candidates: Iterator[_Fit], max_code: int) -> _Fit:
    """Look for the grid of least squared error, beginning with the one that covers the range.

    A candidate gives levels L; the scale that fits v best at these levels is <v, L> / <L, L>, and takes <v, L>^2 /
    <L, L> off the squared error. Scales of a file around the best of them follow, and fits to the codes of the last.
    """
    found, gain = covering, torch.zeros_like(covering.scale)
    for candidate in candidates:
        # A group of zeros has no range, and no gain.
        inverse = torch.where(candidate.scale == 0, 0.0, 1 / candidate.scale)
        levels = _levels(values, inverse, candidate.zero, max_code)
        power, match = levels.square().sum(dim=-1), (values * levels).sum(dim=-1)
        fitted = torch.where(power == 0, 0.0, match / power)
        better = match * fitted > gain
        found = _chosen(better, _Fit(fitted, candidate.zero), found)
        gain = torch.where(better, match * fitted, gain)
    best, least = covering, _error(values, covering, max_code)

    def consider(fit: _Fit) -> None:
        nonlocal best, least
        error = _error(values, fit, max_code)
        best, least = _chosen(error < least, fit, best), torch.minimum(error, least)

    consider(found._replace(scale=_clean(found.scale)))
    coarse = best
    for factor in _NEARBY:
        consider(coarse._replace(scale=_clean(coarse.scale * factor)))
    for _ in range(_REFITS):
        levels = _levels(values, 1 / best.scale, best.zero, max_code)
        power = levels.square().sum(dim=-1)
        fitted = torch.where(power == 0, best.scale, (values * levels).sum(dim=-1) / power)
        consider(best._replace(scale=_clean(fitted)))
    return best


def _symmetric(values: Tensor, bits: int, search: bool) -> _Fit:
    """Scale 2 A / (2^b - 1) with A the largest magnitude; or that of least error, of either sign.

    There is one level more below zero than above: a negative scale gives it to the larger positive weights.
    """
    zero, max_code = torch.tensor(2.0 ** (bits - 1), device=values.device), 2**bits - 1
    full = values.abs().amax(dim=-1) * (2.0 / max_code)
    covering = _Fit(_clean(ceil_bfloat16(full)), zero)
    if not search:
        return covering
    candidates = (_Fit(full * (sign * ratio), zero) for ratio in _SYMMETRIC_RATIOS for sign in (1.0, -1.0))
    return _search(values, covering, candidates, max_code)


def _asymmetric(values: Tensor, bits: int, search: bool) -> _Fit:
    """Scale (hi - lo) / (2^b - 1), zero = round(-lo / scale), with lo <= 0 <= hi; or those of least error."""
    max_code = 2**bits - 1
    low = values.amin(dim=-1).clamp(max=0)
    full = (values.amax(dim=-1).clamp(min=0) - low) / max_code
    scale = _clean(ceil_bfloat16(full))
    covering = _Fit(scale, torch.round(-low / scale).clamp(0, max_code))
    if not search:
        return covering
    # Where the zero point lies in the range does not change with its width.
    place = torch.where(full == 0, 0.0, -low / full)
    zeros = [torch.round(place + shift).clamp(0, max_code) for shift in _SHIFTS]
    candidates = (_Fit(full * ratio, zero) for ratio in _ASYMMETRIC_RATIOS for zero in zeros)
    return _search(values, covering, candidates, max_code)


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
    search: least squared error of rounding to nearest; symmetric scales of either sign, for there is one level more
    below zero. A group of zeros gets the smallest scale and lies on the grid.

    Args:
        weight: Floating, [out_features, in_features].
        config: Bits, group size, symmetry, scale rule.

    Returns:
        Grid with bfloat16 scales of at least 2^-17 in magnitude, exact in bfloat16 and float16.

    Raises:
        ValueError: The weight is not a finite matrix, empty, or too large for float16 scales.
    """
    if weight.dim() != 2:
        raise ValueError(f"place_grid: weight must have 2 dimensions, got shape {list(weight.shape)}")
    if not weight.numel():
        raise ValueError(f"place_grid: weight must have elements, got shape {list(weight.shape)}")
    ends = [float(end) for end in torch.aminmax(weight.detach())]  # no other tensor of that size is made
    if not all(map(math.isfinite, ends)):
        raise ValueError("place_grid: weight must be finite, got NaN or Inf")
    if max(map(abs, ends)) > MAX_SCALE:
        raise ValueError(f"place_grid: weight must be at most {MAX_SCALE} in magnitude")
    rows, columns = weight.shape
    place = _symmetric if config.sym else _asymmetric
    step = max(1, (_CHUNK if weight.device.type == "cpu" else _CHUNK_GPU) // max(1, columns))
    with torch.no_grad():
        fits = [
            place(
                _group(weight[start : start + step].detach(), config.group_size),
                config.bits,
                config.grid == "search",
            )
            for start in range(0, rows, step)
        ]
        scale = torch.cat([fit.scale for fit in fits]).bfloat16()
    # One group per row anyway: say so, because formats call it another strategy.
    group_size = -1 if config.group_size > columns else config.group_size
    zero = None if config.sym else torch.cat([fit.zero for fit in fits]).to(torch.uint8)
    return UniformGrid(config.bits, group_size, config.sym, scale, zero)
