# SPDX-License-Identifier: Apache-2.0
"""Hadamard matrices of the orders that hidden sizes of models need, by the constructions of Paley and Williamson.

n = K * 2^m with K as small as a construction gives: 12, 20, 28 (28672 = 28 * 1024), 36, 52, 92, 108, 172 and others.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# order -> (length of the circulants, first halves of their symmetric first rows; a set bit, highest first, is -1).
_WILLIAMSON = {92: (23, (309, 212, 611, 1149)), 172: (43, (730052, 1698736, 1627778, 1433865))}
_LARGEST = 2048
# Whatever the caller's default device.
CPU = torch.device("cpu")


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _prime_root(n: int) -> tuple[int, int] | None:
    """(p, 1) for a prime, (p, 2) for a prime's square, else None."""
    if _is_prime(n):
        return n, 1
    root = round(n**0.5)
    return (root, 2) if root * root == n and _is_prime(root) else None


def _quadratic_characters(p: int, degree: int) -> Tensor:
    """Matrix of chi(a - b) over the field of p^degree elements: 0, 1 for squares, -1 for the others."""
    chi = torch.full((p,), -1, dtype=torch.int8, device=CPU)
    chi[[i * i % p for i in range(1, p)]] = 1
    chi[0] = 0
    index = torch.arange(p**degree, device=CPU)
    if degree == 1:
        return chi[(index[:, None] - index[None, :]) % p]
    # Elements u + v sqrt(d), d no square: one is a square where its norm u^2 - d v^2 is a square of the prime field.
    d = next(i for i in range(2, p) if chi[i] == -1)
    u, v = index // p, index % p
    norm = (u[:, None] - u[None, :]) ** 2 - d * (v[:, None] - v[None, :]) ** 2
    return chi[norm % p]


def _paley_field(order: int) -> tuple[int, int, int] | None:
    """(kind, p, degree) of Paley's construction of this order, over the field of p^degree elements; None for none."""
    for q, kind in ((order - 1, 1), (order // 2 - 1, 2)):
        field = _prime_root(q)
        if order > 2 and order % 4 == 0 and field is not None and q % 4 == (3 if kind == 1 else 1):
            return kind, *field
    return None


def _paley(kind: int, p: int, degree: int) -> Tensor:
    characters, q = _quadratic_characters(p, degree), p**degree
    border = torch.ones(q, 1, dtype=torch.int8, device=CPU)
    corner = torch.zeros(1, 1, dtype=torch.int8, device=CPU)
    identity = torch.eye(q + 1, dtype=torch.int8, device=CPU)
    if kind == 1:
        conference = torch.cat((torch.cat((corner, border.t()), 1), torch.cat((-border, characters), 1)))
        return identity + conference
    conference = torch.cat((torch.cat((corner, border.t()), 1), torch.cat((border, characters), 1)))
    top = torch.cat((conference + identity, conference - identity), 1)
    return torch.cat((top, torch.cat((conference - identity, -conference - identity), 1)))


def _williamson(order: int) -> Tensor:
    length, rows = _WILLIAMSON[order]
    half = (length + 1) // 2
    place = torch.arange(length, device=CPU)
    shift = (place[None, :] - place[:, None]) % length
    blocks = []
    for bits in rows:
        signs = [1 - 2 * (bits >> (half - 1 - i) & 1) for i in range(half)]
        first = torch.tensor(signs, dtype=torch.int8, device=CPU)
        blocks.append(torch.cat((first, first[1:].flip(0)))[shift])
    a, b, c, d = blocks
    return torch.cat((
        torch.cat((a, b, c, d), 1), torch.cat((-b, a, -d, c), 1),
        torch.cat((-c, d, a, -b), 1), torch.cat((-d, -c, b, a), 1),
    ))  # fmt: skip


def _is_known(order: int) -> bool:
    return order == 1 or order in _WILLIAMSON or _paley_field(order) is not None


def hadamard_matrix(order: int) -> Tensor | None:
    """Hadamard matrix of an order that is no power of two, int8, on the CPU; None if no construction is known here.

    Made anew, never kept: made while a mode is active (fake tensors, functionalize, inference) it is one of that mode.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8, device=CPU)
    field = _paley_field(order)
    if field is not None:
        return _paley(*field)
    return _williamson(order) if order in _WILLIAMSON else None


@functools.cache
def factor(size: int) -> tuple[int, int] | None:
    """(K, 2^m) with size = K * 2^m, K as small as a known matrix allows; None if there is none up to 2048."""
    if size < 1:
        return None
    order, power = size, 1
    while order % 2 == 0:
        order, power = order // 2, power * 2
    while order <= _LARGEST:
        if _is_known(order):
            return order, power
        if power == 1:
            return None
        order, power = order * 2, power // 2
    return None
