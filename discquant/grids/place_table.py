# SPDX-License-Identifier: Apache-2.0
"""Block scales of look-up grids (NF4, MXFP4, NVFP4), exactly as their files store them, before anything is rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from discquant.errors import UnrepresentableError
from discquant.grids.table import E2M1_LEVELS, E8M0_BIAS, NF4_LEVELS, TableGrid, power_of_two

E2M1_TOP, E4M3_TOP = 6.0, 448.0
E4M3_LEAST = 2.0**-9  # the smallest float8_e4m3fn above zero: no block scale of ours is zero
_RATIOS = torch.linspace(0.6, 1.1, 26, device="cpu").tolist()  # importable under torch.device("meta")
_CHUNK = 1 << 22  # weights at a time; the scratch of a candidate is a few times this


def place_table(weight: Tensor, kind: str, *, search: bool = True, largest: float | None = None) -> TableGrid:
    """Lay the grid of a look-up table on a weight matrix.

    Args:
        weight: Floating, finite, [out_features, in_features]; in_features a multiple of the block (NF4 64,
            MXFP4 32, NVFP4 16).
        kind: nf4, mxfp4 or nvfp4.
        search: Take the block scale of least squared error; else the smallest that covers the largest weight.
        largest: NVFP4: the largest magnitude that the global scale is chosen for; None is the matrix's own. Matrices
            that an engine fuses need one in common, at least that of each.

    Returns:
        The grid.

    Raises:
        UnrepresentableError: in_features is no multiple of the block.
        ValueError: The weight is not a finite matrix.
    """
    if weight.dim() != 2:
        raise ValueError(f"place_table: weight must have 2 dimensions, got shape {list(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("place_table: weight must be finite, got NaN or Inf")
    block = {"nf4": 64, "mxfp4": 32, "nvfp4": 16}[kind]
    if weight.shape[1] % block:
        raise UnrepresentableError(
            f"{kind.upper()} packs rows in blocks of {block}, and {weight.shape[1]} columns are no multiple of it; "
            "leave the module unquantized with ignore"
        )
    with torch.no_grad():
        if kind == "nf4":
            return TableGrid.nf4(_rows(weight, block, lambda values: _nf4(values, search)), block)
        if kind == "mxfp4":
            return TableGrid.mxfp4(_rows(weight, block, lambda values: _mxfp4(values, search)))
        # The block of the largest weight gets a scale near the top of e4m3; searched scales may exceed it a little.
        if largest is None:
            largest = float(weight.detach().abs().max()) if weight.numel() else 0.0
        divisor = torch.tensor([E2M1_TOP * E4M3_TOP / (max(_RATIOS) * max(largest, 1e-20))])
        divisor = divisor.to(weight.device)
        return TableGrid.nvfp4(
            _rows(weight, block, lambda values: _nvfp4(values, divisor, search)).to(torch.float8_e4m3fn),
            divisor,
        )


def _rows(weight: Tensor, block: int, fit: object) -> Tensor:
    """`fit` on [rows, blocks, block] in float32, a few rows at a time -> [rows, blocks]."""
    assert callable(fit)
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    parts = [fit(part.detach().float().unflatten(1, (-1, block))) for part in weight.split(step)]
    return torch.cat(parts)


def _error(values: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """Squared error per block of rounding to the nearest level."""
    step = scale.unsqueeze(-1)
    middle = (levels[1:] + levels[:-1]) / 2
    return (levels[torch.searchsorted(middle, values / step)] * step - values).square_().sum(dim=-1)


def _least(values: Tensor, candidates: list[Tensor], levels: Tensor) -> Tensor:
    """The candidate scale of least error, block by block; the first of equals."""
    best = candidates[0]
    least = _error(values, best, levels)
    for scale in candidates[1:]:
        error = _error(values, scale, levels)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _nf4(values: Tensor, search: bool) -> Tensor:
    """Float32 scales; a block of zeros keeps scale 1, so that every code keeps its meaning."""
    largest = values.abs().amax(dim=-1)
    full = torch.where(largest == 0, 1.0, largest)
    if not search:
        return full
    levels = torch.tensor(NF4_LEVELS, device=values.device)
    return _least(values, [full, *(full * ratio for ratio in _RATIOS)], levels)


def _mxfp4(values: Tensor, search: bool) -> Tensor:
    """Exponents e8m0, uint8: the smallest power of two whose 6-fold covers the block, or the best of its neighbours."""
    largest = values.abs().amax(dim=-1)
    wanted = torch.where(largest == 0, 1.0, largest / E2M1_TOP)
    mantissa, exponent = torch.frexp(wanted)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-126, 127)
    if search:
        options = [(exponent + move).clamp(-126, 127) for move in (0, -1, 1)]
        scales = [power_of_two(option + E8M0_BIAS) for option in options]
        best = _least(values, scales, torch.tensor(E2M1_LEVELS, device=values.device))
        exponent = torch.frexp(best)[1] - 1
    return (exponent + E8M0_BIAS).to(torch.uint8)


def _nvfp4(values: Tensor, divisor: Tensor, search: bool) -> Tensor:
    """Block scales in float32, each a positive float8_e4m3fn number."""
    full = values.abs().amax(dim=-1) / E2M1_TOP * divisor

    def stored(scale: Tensor) -> Tensor:
        return scale.clamp(E4M3_LEAST, E4M3_TOP).to(torch.float8_e4m3fn).float()

    # Rounded up, so that the largest weight stays covered.
    rounded = stored(full)
    covering = torch.where(rounded < full, stored(rounded * 1.125), rounded)
    if not search:
        return covering
    candidates = [covering, *(stored(full * ratio) for ratio in _RATIOS)]
    levels = torch.tensor(E2M1_LEVELS, device=values.device)
    real = [candidate / divisor for candidate in candidates]
    least = _error(values, real[0], levels)
    best = candidates[0]
    for candidate, scale in zip(candidates[1:], real[1:], strict=True):
        error = _error(values, scale, levels)
        best = torch.where(error < least, candidate, best)
        least = torch.minimum(error, least)
    return best
