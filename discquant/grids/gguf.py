# SPDX-License-Identifier: Apache-2.0
"""Grids that GGUF block types dictate: scales are chosen, quantized as the file stores them, and only then rounded on.

A type has a signed scale and levels around zero (Q4_0, Q5_0, Q8_0, Q3_K, Q6_K; of a table: IQ4_NL, IQ4_XS), or a scale
and a minimum (Q4_1, Q5_1, Q2_K, Q4_K, Q5_K). Scales are float16 numbers, or, in the K types and IQ4_XS, small integers
times one float16 per 256 columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from discquant.config import GRID_KINDS
from discquant.errors import UnrepresentableError
from discquant.grids.affine import AffineGrid
from discquant.grids.base import Grid
from discquant.grids.table import IQ4_LEVELS, SIGNED_KINDS, TableGrid
from discquant.grids.uniform import UniformGrid

MIN_HALF = (
    2.0**-24
)  # the smallest float16 above zero: no scale of ours is zero, so every code keeps its meaning
MAX_HALF = 65504.0
SUPER = 256
# The types of integer scales (and minima), and the bits of those.
SUPER_KINDS = {"q2_k": 4, "q3_k": 6, "q4_k": 6, "q5_k": 6, "q6_k": 8, "iq4_xs": 6}
# What a row that is no multiple of 256 takes instead: a 32-column type of as many levels or more, of the same kind but
# for Q2_K, which needs no minimum among sixteen.
FALLBACK = {
    "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q4_1", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl",
}  # fmt: skip
_LEVELS = {**GRID_KINDS, "q8_0": (8, 32, True)}  # bits, group size, symmetric; Q8_0 is no kind to ask for
# Weights that are taken at a time: the scratch of a candidate then stays in the cache (twice as fast as 2^22).
_CHUNK = 1 << 17
_STRETCH = torch.linspace(-0.9, 0.9, 9, device="cpu").tolist()  # importable under torch.device("meta")
_REACHES = torch.linspace(0.75, 1.15, 9, device="cpu").tolist()
_RATIOS = torch.linspace(0.7, 1.05, 8, device="cpu").tolist()


def gguf_kind(kind: str, in_features: int, name: str = "layer") -> str:
    """The block type that a row of this length gets.

    Args:
        kind: Wanted type, a GGUF kind of `config.GRID_KINDS`.
        in_features: Length of a row.
        name: Module path, for the message.

    Returns:
        `kind`, or for a type of `SUPER_KINDS` whose rows are no multiple of 256 its `FALLBACK`.

    Raises:
        UnrepresentableError: The row is no multiple of 32 either.
    """
    if in_features % 32:
        raise UnrepresentableError(
            f"{name}: {kind.upper()} packs rows in blocks of 32, and {in_features} columns are no multiple of it; "
            "leave the module unquantized with ignore, or write a format without blocks"
        )
    return FALLBACK[kind] if kind in SUPER_KINDS and in_features % SUPER else kind


def place_gguf(weight: Tensor, kind: str, *, search: bool = True) -> Grid:
    """Lay the grid of a GGUF type, or of its fallback, on a weight matrix.

    Args:
        weight: Floating, finite, [out_features, in_features].
        kind: A GGUF kind of `config.GRID_KINDS`.
        search: Look for the scale of least squared error; else cover the largest weight.

    Returns:
        The grid, its scales exactly those that the file will hold.

    Raises:
        UnrepresentableError: See `gguf_kind`.
        ValueError: The weight is not a finite matrix, or too large for float16 scales.
    """
    if weight.dim() != 2:
        raise ValueError(f"place_gguf: weight must have 2 dimensions, got shape {list(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("place_gguf: weight must be finite, got NaN or Inf")
    if weight.numel() and float(weight.abs().max()) > MAX_HALF:
        raise ValueError(f"place_gguf: weight must be at most {MAX_HALF} in magnitude")
    found = gguf_kind(kind, weight.shape[1])
    bits, group, symmetric = _LEVELS[found]
    scale_bits = SUPER_KINDS.get(found, 0)
    with torch.no_grad():
        if not symmetric:
            return _place_affine(weight, bits, group, scale_bits, search)
        snap, ends = _signed_levels(found, bits, weight.device)
        scale = _place_signed(weight, group, scale_bits, snap, ends if search else ends[:1])
        return TableGrid.iq4(scale, found) if found in SIGNED_KINDS else UniformGrid(bits, group, True, scale)


def _signed_levels(kind: str, bits: int, device: torch.device) -> tuple[_Snap, list[float]]:
    """What rounds to the levels of a type, and where among them the largest weight of a group may lie.

    First it lies at the lowest level, the largest in magnitude; a search goes on to places about either end, and so
    tries both signs of the scale.
    """
    if kind in SIGNED_KINDS:
        ends = [end * reach for end in (IQ4_LEVELS[0], IQ4_LEVELS[-1]) for reach in _REACHES]
        return _Table(torch.tensor(IQ4_LEVELS, device=device)), [IQ4_LEVELS[0], *ends]
    low = -(1 << (bits - 1))
    ends = [sign * (low + stretch) for sign in (1.0, -1.0) for stretch in _STRETCH]
    return _Integers(low, -low - 1), [low, *ends]


def _place_signed(weight: Tensor, group: int, scale_bits: int, snap: _Snap, ends: list[float]) -> Tensor:
    """A signed scale per group: float16, or with `scale_bits` a signed integer times a float16 of 256 columns.

    Args:
        weight: [out_features, in_features].
        group: Columns per scale.
        scale_bits: Of the integer, 0 for none.
        snap: Rounds weights in units of their scale.
        ends: See `_signed_levels`; a single one is taken as it is, and nothing sought.

    Returns:
        [out_features, num_groups]: float16, or the products in float32.
    """
    if not scale_bits:
        return _by_rows(weight, group, lambda values: _fitted(values, snap, ends)).half()
    least, most = -(1 << (scale_bits - 1)), (1 << (scale_bits - 1)) - 1

    def fit(values: Tensor) -> Tensor:
        """[rows, blocks, groups, group] -> [rows, blocks, groups]: d sc."""
        steps = _fitted(values, snap, ends)
        d = _half(_peak(steps).unsqueeze(-1) / least)
        sc = torch.round(steps / d).clamp_(least, most)

        def build(move: int) -> Tensor:
            # sc = 0 would make all levels equal; what it stands for is near a level of any other sc too.
            moved = (sc + move).clamp_(least, most)
            return d * torch.where(moved == 0, sc.sign() + (sc == 0), moved)

        moves = (0, -1, 1, -2, 2) if len(ends) > 1 else (0,)
        zero = torch.zeros((), device=values.device)
        return _best(values, ((build(move), zero) for move in moves), snap).scale

    return _by_rows(weight, group, fit, SUPER)


def _place_affine(weight: Tensor, bits: int, group: int, scale_bits: int, search: bool) -> AffineGrid:
    """d q + m, both float16; with `scale_bits` d sc q - dmin mn, sc and mn integers, d and dmin of 256 columns."""
    top, most = (1 << bits) - 1, (1 << scale_bits) - 1

    def fit(values: Tensor) -> Tensor:
        """[.., groups, group] -> [.., groups, 2]: scale and minimum."""
        found = _affine(values, top, search, below_zero=scale_bits > 0)
        if not scale_bits:
            return torch.stack((found.scale, found.minimum), dim=-1)
        steps, depths = found.scale, -found.minimum
        d = _half(steps.amax(dim=-1, keepdim=True) / most)
        dmin = _half(depths.amax(dim=-1, keepdim=True) / most)
        sc = torch.round(steps / d).clamp_(1, most)
        mn = torch.round(depths / dmin).clamp_(0, most)

        def build(step: int, depth: int) -> tuple[Tensor, Tensor]:
            return d * (sc + step).clamp_(1, most), -(dmin * (mn + depth).clamp_(0, most))

        moves = [(step, depth) for step in (0, -1, 1) for depth in (0, -1, 1)] if search else [(0, 0)]
        best = _best(values, (build(*move) for move in moves), _Integers(0, top))
        return torch.stack((best.scale, best.minimum), dim=-1)

    both = _by_rows(weight, group, fit, SUPER if scale_bits else 0)
    if not scale_bits:
        both = both.half()
    return AffineGrid(bits, group, both[..., 0].contiguous(), both[..., 1].contiguous())


class _Integers(NamedTuple):
    """Rounds to whole levels within their range."""

    low: int
    high: int

    def __call__(self, values: Tensor) -> Tensor:
        """Nearest levels of weights in units of their scale."""
        return torch.round(values).clamp_(self.low, self.high)


class _Table(NamedTuple):
    """Rounds to levels of a table, ascending."""

    levels: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Nearest levels of weights in units of their scale."""
        middle = (self.levels[1:] + self.levels[:-1]) / 2
        return self.levels[torch.searchsorted(middle, values.contiguous())]


_Snap = _Integers | _Table


class _Fit(NamedTuple):
    """Parameters per group: value = scale * level + minimum."""

    scale: Tensor
    minimum: Tensor


def _by_rows(weight: Tensor, group: int, fit: Callable[[Tensor], Tensor], block: int = 0) -> Tensor:
    """`fit` on a few rows at a time: [rows, groups, group] or [rows, blocks, groups, group] -> [rows, groups, ...]."""
    rows, columns = weight.shape
    step = max(1, _CHUNK // max(1, columns))
    shape = (columns // block, block // group, group) if block else (columns // group, group)
    found = []
    for start in range(0, rows, step):
        values = weight[start : start + step].detach().float()
        found.append(fit(values.reshape(len(values), *shape)))
    joined = torch.cat(found) if found else fit(weight.detach().float().reshape(0, *shape))
    return joined.flatten(1, 2) if block else joined


def _half(scale: Tensor) -> Tensor:
    """The nearest float16 that is not zero, in float32."""
    rounded = scale.half().float()
    return torch.where(rounded == 0, torch.where(scale < 0, -MIN_HALF, MIN_HALF), rounded)


def _peak(values: Tensor) -> Tensor:
    """The value of largest magnitude along the last axis, with its sign."""
    return values.gather(-1, values.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)


def _error(values: Tensor, fit: _Fit, snap: _Snap) -> Tensor:
    """Squared error per group of rounding to the nearest level."""
    scale, minimum = fit.scale.unsqueeze(-1), fit.minimum.unsqueeze(-1)
    levels = snap((values - minimum) / scale)
    return (levels.mul_(scale).add_(minimum) - values).square_().sum(dim=-1)


def _best(values: Tensor, candidates: Iterator[tuple[Tensor, Tensor]], snap: _Snap) -> _Fit:
    """The candidate (scale, minimum) of least squared error, group by group; the first of equals."""
    best: _Fit | None = None
    least = torch.empty(())
    for candidate in candidates:
        fit = _Fit(*candidate)
        error = _error(values, fit, snap)
        if best is None:
            best, least = fit, error
            continue
        better = error < least
        best = _Fit(
            torch.where(better, fit.scale, best.scale), torch.where(better, fit.minimum, best.minimum)
        )
        least = torch.where(better, error, least)
    assert best is not None
    return best


def _fitted(values: Tensor, snap: _Snap, ends: list[float]) -> Tensor:
    """Signed float16 scale per group: the first end laid on the largest weight, or the best of the refitted others.

    Each of those gives codes, to which the scale is then fitted by least squares.
    """
    peak = _peak(values)

    def candidates() -> Iterator[tuple[Tensor, Tensor]]:
        zero = torch.zeros((), device=values.device)
        yield _half(peak / ends[0]), zero
        for end in ends[1:]:
            inverse = torch.where(peak == 0, 0.0, end / peak).unsqueeze(-1)
            levels = snap(values * inverse)
            power = levels.square().sum(dim=-1)
            yield _half(torch.where(power == 0, 0.0, (values * levels).sum(dim=-1) / power)), zero

    return _best(values, candidates(), snap).scale


def _affine(values: Tensor, top_level: int, search: bool, *, below_zero: bool) -> _Fit:
    """Scale above 0 and minimum per group for levels 0 .. top_level; with `below_zero` the minimum is 0 or less.

    The search narrows the range from both sides and refits scale and minimum to the codes it gave by least squares.
    """
    bottom, top = values.amin(dim=-1), values.amax(dim=-1)
    if below_zero:
        bottom, top = bottom.clamp(max=0), top.clamp(min=0)
    span = top - bottom

    def stored(scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
        scale = _half(scale.clamp(min=0))
        return scale, (minimum.clamp(max=0) if below_zero else minimum).half().float()

    def candidates() -> Iterator[tuple[Tensor, Tensor]]:
        yield stored(span / top_level, bottom)
        for ratio in _RATIOS if search else ():
            for shift in (0.0, 0.5, 1.0):
                scale = (span * (ratio / top_level)).clamp(min=MIN_HALF)
                minimum = bottom + span * ((1 - ratio) * shift)
                levels = torch.round((values - minimum.unsqueeze(-1)) / scale.unsqueeze(-1)).clamp_(
                    0, top_level
                )
                yield stored(*_least_squares(values, levels, below_zero))

    return _best(values, candidates(), _Integers(0, top_level))


def _least_squares(values: Tensor, levels: Tensor, below_zero: bool) -> tuple[Tensor, Tensor]:
    """Scale and minimum that fit `values` best at fixed levels."""
    mean_level, mean_value = levels.mean(dim=-1), values.mean(dim=-1)
    spread = (levels - mean_level.unsqueeze(-1)).square().mean(dim=-1)
    joint = (values * levels).mean(dim=-1) - mean_level * mean_value
    scale = torch.where(spread == 0, 0.0, joint / spread)
    minimum = mean_value - scale * mean_level
    if not below_zero:
        return scale, minimum
    power = levels.square().mean(dim=-1)
    through_zero = torch.where(power == 0, 0.0, (values * levels).mean(dim=-1) / power)
    above = minimum > 0
    return torch.where(above, through_zero, scale), torch.where(above, 0.0, minimum)
