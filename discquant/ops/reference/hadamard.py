# SPDX-License-Identifier: Apache-2.0
"""Reference of `hadamard`: randomized Hadamard rotation along the last dimension, and its inverse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from discquant.ops.reference.settled import settled
from discquant.ops.reference.soft_weight import accumulate_dtype

# Order of the largest factor: what measured best on a CPU.
_FACTOR = 64


def sylvester(values: Tensor) -> Tensor:
    """Multiply the last dimension, a power of two, by the Sylvester matrix; not normalised."""
    size = values.shape[-1]
    half = 1
    while half < size:
        pairs = values.reshape(*values.shape[:-1], size // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        values = torch.stack((first + second, first - second), dim=-2).reshape(values.shape)
        half *= 2
    return values


def multiply_sylvester(values: Tensor) -> Tensor:
    """`sylvester`, whose matrix of order 2^m is a Kronecker product: a matmul per factor, six times as fast."""
    size, done = values.shape[-1], 1
    while done < size:
        order = min(_FACTOR, size // done)
        factor = sylvester(torch.eye(order, dtype=values.dtype, device=values.device))  # symmetric
        blocks = values.reshape(-1, order) @ factor if done == 1 else factor @ values.reshape(-1, order, done)
        values, done = blocks.reshape(values.shape), done * order
    return values


@settled
def hadamard(x: Tensor, signs: Tensor | None, matrix: Tensor, inverse: bool) -> Tensor:
    """y = H (signs * x) / sqrt(n), or x = signs * (H^T y) / sqrt(n); H = matrix (x) Sylvester.

    Args:
        x: Floating, [..., n], n = K * 2^m.
        signs: +1 or -1 each, [n], or None.
        matrix: Hadamard matrix of order K, +1 and -1, [K, K].
        inverse: Undo the rotation.

    Returns:
        Same shape and dtype, computed in float32 (float64 for float64).
    """
    compute = accumulate_dtype(x)
    size, order = x.shape[-1], matrix.shape[0]
    values = x.to(compute)
    flips = None if signs is None else signs.to(compute)
    if flips is not None and not inverse:
        values = values * flips
    values = multiply_sylvester(values.reshape(*x.shape[:-1], order, size // order))
    mix = matrix.to(compute)
    values = (mix.t() if inverse else mix) @ values
    values = values.reshape(x.shape) * (1 / math.sqrt(size))
    if flips is not None and inverse:
        values = values * flips
    return values.to(x.dtype)
