# SPDX-License-Identifier: Apache-2.0
"""The counter-based noise: pinned numbers, independence of tiling, uniformity."""

from __future__ import annotations

import pytest
import torch

from discquant.ops.reference.counter_rng import STREAMS, counter_uniform, mix32, step_key

CPU = torch.device("cpu")


def _plain(key: int, index: int, stream: int) -> float:
    mask = 0xFFFFFFFF
    value = (index * 0x9E3779B1) & mask
    value = ((value ^ (value >> 15) ^ key) * 0x85EBCA6B) & mask
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & mask
    return (((value * STREAMS[stream]) & mask) >> 16) * 2.0**-16


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_equals_integer_arithmetic(stream):
    """The int64 tensor arithmetic equals Python's exact integers, also above 2^31 and at the end of the range."""
    for key in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, step_key(3, 5, 7)):
        for start in (0, 12345, 2**31 - 2, 2**32 - 4):
            expected = torch.tensor([_plain(key, start + i, stream) for i in range(4)])
            assert torch.equal(counter_uniform(key, start, 4, CPU, stream), expected), (key, start)


def test_pinned():
    """Stored runs must resume in the same bytes: these numbers may never change."""
    assert mix32(1) == 1753845952
    assert step_key(0, 1, 0) == 7918727
    assert [
        counter_uniform(step_key(1, 2, 3), 10, 3, CPU, stream).mul(2**16).long().tolist()
        for stream in range(3)
    ] == [[24632, 64406, 5380], [16423, 27933, 21899], [61740, 53560, 52770]]


def test_independent_of_tiling():
    whole = counter_uniform(99, 1000, 64, CPU)
    parts = [counter_uniform(99, 1000 + start, 16, CPU) for start in range(0, 64, 16)]
    assert torch.equal(whole, torch.cat(parts))


def test_uniform():
    """Mean, variance, neighbours, streams and steps of 2^20 numbers within five standard errors of independent ones."""
    count = 2**20
    first, moment, root = (counter_uniform(step_key(0, 1, 0), 0, count, CPU, s).double() for s in range(3))
    second = counter_uniform(step_key(0, 2, 0), 0, count, CPU).double()
    error = 5 / count**0.5
    for noise in (first, moment, root):
        assert abs(noise.mean() - (0.5 - 2.0**-17)) < error * (1 / 12) ** 0.5
        assert abs(noise.var() - 1 / 12) < error * (1 / 180) ** 0.5
        assert noise.min() >= 0
        assert noise.max() < 1
    pairs = [(first, moment), (first, root), (moment, root), (first, second)]
    pairs += [(noise[lag:], noise[:-lag]) for noise in (first, moment, root) for lag in (1, 2, 64, 4096)]
    for left, right in pairs:
        assert abs(torch.corrcoef(torch.stack((left, right)))[0, 1]) < error
    # Neighbours fill the square evenly: chi-square of 32 x 32 cells, 1023 degrees of freedom.
    cells = torch.bincount(((first[1:] * 32).long() * 32 + (first[:-1] * 32).long()), minlength=1024).double()
    expected = (count - 1) / 1024
    assert abs(((cells - expected) ** 2 / expected).sum() - 1023) < 5 * (2 * 1023) ** 0.5


def test_no_noise_lifts_a_code_to_the_next():
    """A byte's code plus the largest noise stays below the next integer in float32."""
    codes = torch.arange(256, dtype=torch.float32)
    assert torch.equal(torch.floor(codes + (1 - 2.0**-16)), codes)
