# SPDX-License-Identifier: Apache-2.0
"""The counter-based noise: pinned numbers, independence of tiling, uniformity."""

from __future__ import annotations

import torch

from discquant.ops.reference.counter_rng import counter_uniform, mix32, stream_key

CPU = torch.device("cpu")


def _plain(key: int, index: int) -> float:
    return (mix32((index & 0xFFFFFFFF) ^ key) >> 8) * 2.0**-24


def test_equals_integer_arithmetic():
    """The int64 tensor arithmetic equals Python's exact integers, also above 2^31 and at the end of the range."""
    for key in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, stream_key(3, 5, 7, 1)):
        for start in (0, 12345, 2**31 - 2, 2**32 - 4):
            expected = torch.tensor([_plain(key, start + i) for i in range(4)])
            assert torch.equal(counter_uniform(key, start, 4, CPU), expected), (key, start)


def test_pinned():
    """Stored runs must resume in the same bytes: these numbers may never change."""
    assert mix32(1) == 1753845952
    assert stream_key(0, 1, 0, 0) == 1913594624
    assert counter_uniform(stream_key(1, 2, 3, 0), 10, 3, CPU).mul(2**24).long().tolist() == [
        11254260,
        5058242,
        8132649,
    ]


def test_independent_of_tiling():
    whole = counter_uniform(99, 1000, 64, CPU)
    parts = [counter_uniform(99, 1000 + start, 16, CPU) for start in range(0, 64, 16)]
    assert torch.equal(whole, torch.cat(parts))


def test_uniform():
    """Mean, variance, neighbours and steps of 2^20 numbers within five standard errors of independent uniforms."""
    count = 2**20
    first = counter_uniform(stream_key(0, 1, 0, 0), 0, count, CPU).double()
    second = counter_uniform(stream_key(0, 2, 0, 0), 0, count, CPU).double()
    error = 5 / count**0.5
    assert abs(first.mean() - 0.5) < error * (1 / 12) ** 0.5
    assert abs(first.var() - 1 / 12) < error * (1 / 180) ** 0.5
    for left, right in ((first[1:], first[:-1]), (first, second), (first[4096:], first[:-4096])):
        assert abs(torch.corrcoef(torch.stack((left, right)))[0, 1]) < error
    assert first.min() >= 0
    assert first.max() < 1
