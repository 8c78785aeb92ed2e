# SPDX-License-Identifier: Apache-2.0
"""The rotations of one model, applied to single tensors in float64, a bounded piece at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from discquant.errors import UnrepresentableError
from discquant.ops import hadamard
from discquant.ops.hadamard_tables import factor
from discquant.rotation.places import Place, Space

# Elements of a piece: 32 MB in float64, with some temporaries of that size beside it.
_PIECE = 1 << 22


class Sizes(NamedTuple):
    """What a model's configuration says of its shape."""

    hidden_size: int
    head_dim: int
    heads: int
    kv_heads: int
    layers: int


@dataclass(frozen=True, eq=False)
class Rotation:
    """h' = H (signs * h) / sqrt(n) in the stream between blocks, and the same in every head's values.

    Attributes:
        sizes: Of the model.
        stream: Signs, int8, [hidden_size].
        values: Signs per block, int8, [head_dim] each; empty where the values stay as they are.
    """

    sizes: Sizes
    stream: Tensor
    values: tuple[Tensor, ...]

    @classmethod
    def random(cls, sizes: Sizes, seed: int, *, values: bool) -> Rotation:
        """Draw signs.

        Raises:
            UnrepresentableError: No Hadamard matrix of a size is known.
        """
        if factor(sizes.hidden_size) is None:
            raise UnrepresentableError(
                f"rotate: no Hadamard matrix of size hidden_size = {sizes.hidden_size} is known"
            )
        if values and factor(sizes.head_dim) is None:
            raise UnrepresentableError(
                f"rotate: no Hadamard matrix of size head_dim = {sizes.head_dim} is known; leave the values out "
                "(--no-values)"
            )
        generator = torch.Generator().manual_seed(seed)

        def draw(size: int) -> Tensor:
            return (torch.randint(0, 2, (size,), generator=generator) * 2 - 1).to(torch.int8)

        stream = draw(sizes.hidden_size)
        return cls(sizes, stream, tuple(draw(sizes.head_dim) for _ in range(sizes.layers if values else 0)))

    def turns(self, space: Space | None) -> bool:
        """Whether anything turns in a space."""
        return space == "stream" or (space == "values" and bool(self.values))

    def _turn(self, x: Tensor, space: Space | None, layer: int, heads: int, inverse: bool) -> Tensor:
        """Turn along the last dimension; of values, the last `heads` heads."""
        if not self.turns(space):
            return x
        if space == "stream":
            return hadamard(x, self.stream.to(x.device), inverse=inverse)
        signs = self.values[layer].to(x.device)
        width = heads * signs.numel()
        tail = x[:, x.shape[1] - width :].reshape(x.shape[0], heads, signs.numel())
        turned = hadamard(tail, signs, inverse=inverse).reshape(x.shape[0], width)
        return torch.cat((x[:, : x.shape[1] - width], turned), dim=1)

    def piece(self, x: Tensor, place: Place, *, inverse: bool = False) -> Tensor:
        """Turn a piece of a tensor (see `pieces`), float64, [rows, columns]."""
        # A piece holds whole heads of the columns; the rows of queries and keys come before those of values.
        x = self._turn(x, place.columns, place.layer, x.shape[1] // self.sizes.head_dim, inverse)
        return self._turn(x.t(), place.rows, place.layer, self.sizes.kv_heads, inverse).t()


def pieces(shape: torch.Size, place: Place, rotation: Rotation) -> Iterator[tuple[slice, slice]]:
    """Cut [rows, columns] so that each piece turns alone: across what a rotation mixes there is no cut."""
    rows, columns = shape
    if not rotation.turns(place.rows):
        height = max(1, _PIECE // max(1, columns))
        for first in range(0, rows, height):
            yield slice(first, first + height), slice(None)
    elif place.columns == "stream":  # a projection to values: no more rows than one of queries has
        yield slice(None), slice(None)
    else:
        step = rotation.sizes.head_dim if place.columns == "values" else 1
        width = max(1, _PIECE // max(1, rows) // step) * step
        for first in range(0, columns, width):
            yield slice(None), slice(first, first + width)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor[:, None] if tensor.dim() == 1 else tensor


def turned(
    tensor: Tensor,
    place: Place,
    rotation: Rotation,
    factors: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Turn a whole tensor: computed in float64, rounded once to `dtype`.

    Args:
        tensor: Floating, [rows, columns] or [rows].
        place: What to do.
        rotation: The model's.
        factors: Weight of the norm that moves into the columns, float64, [columns], or None.
        dtype: Of the result.
        device: Where to compute.
    """
    source = _matrix(tensor)
    out = torch.empty_like(source, dtype=dtype)
    for index in pieces(source.shape, place, rotation):
        wide = source[index].to(device, torch.float64)
        out[index] = rotation.piece(wide if factors is None else wide * factors.to(device), place).to(
            "cpu", dtype
        )
    return out.reshape(tensor.shape)


def relative_error(
    stored: Tensor,
    tensor: Tensor,
    place: Place,
    rotation: Rotation,
    factors: Tensor | None,
    device: torch.device,
) -> float:
    """Turn a stored tensor back: ||R^T stored - original|| / ||original||.

    Rounding to nearest moves a normal number by at most eps / 2 of itself, and R keeps norms.
    """
    back, want = _matrix(stored), _matrix(tensor)
    error = size = 0.0
    for index in pieces(back.shape, place, rotation):
        wide = want[index].to(device, torch.float64)
        wide = wide if factors is None else wide * factors.to(device)
        found = rotation.piece(back[index].to(device, torch.float64), place, inverse=True)
        error += float((found - wide).square().sum())
        size += float(wide.square().sum())
    if size == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return math.sqrt(error / size)
