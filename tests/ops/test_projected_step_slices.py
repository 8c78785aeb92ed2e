# SPDX-License-Identifier: Apache-2.0
"""The reference steps a large matrix some rows at a time: same bits, temporaries of a slice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from discquant.ops import StepOptions
from discquant.ops.reference import projected_step as reference


def state(rows: int, columns: int, small: bool) -> dict[str, Any]:
    """Return arguments of a momentum step, seeded."""
    generator = torch.Generator().manual_seed(4)

    def draw() -> Tensor:
        return torch.rand(rows, columns, generator=generator)

    frac, frac_ref, grad = draw(), draw() * 1.4 - 0.2, draw() - 0.5
    momentum = (draw() - 0.5) * 2
    if small:
        frac, frac_ref = (frac * 255).to(torch.uint8), reference.encode_frac_ref(frac_ref)
        momentum = (momentum * 100).to(torch.int8)
    return {
        "frac": frac,
        "frac_ref": frac_ref,
        "weight_grad": grad,
        "scale": draw()[:, : -(-columns // 8)] + 0.1,
        "group_size": 8,
        "options": StepOptions(
            optimizer="momentum", lr=0.1, kl_weight=3.0, step=3, moment_bound=2.0, first_index=40
        ),
        "momentum": momentum,
    }


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("slice_size", [1, 50, 100])
def test_slices_change_no_bit(slice_size: int, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of one row, of some, and of a size that does not divide; counts add up."""
    whole, parts = state(13, 20, small), state(13, 20, small)
    expected = reference.projected_step_(**whole)
    monkeypatch.setattr(reference, "SLICE", slice_size)
    assert torch.equal(reference.projected_step_(**parts), expected)
    assert torch.equal(parts["frac"], whole["frac"]) and torch.equal(parts["momentum"], whole["momentum"])


def test_memory_is_that_of_a_slice(monkeypatch: pytest.MonkeyPatch, live_bytes: Any) -> None:
    """What is alive at a time beside the state does not grow with the matrix, only with the slice."""
    peaks = []
    for rows, slice_size in ((64, 1 << 14), (512, 1 << 14), (512, 1 << 16)):
        arguments = state(rows, 2048, True)
        monkeypatch.setattr(reference, "SLICE", slice_size)
        with live_bytes(value for value in arguments.values() if isinstance(value, Tensor)) as live:
            reference.projected_step_(**arguments)
        peaks.append(live.peak)
    one_copy = 4 * 512 * 2048
    assert 0 < peaks[0] == peaks[1] < one_copy
    assert 3 * peaks[1] < peaks[2] < 5 * peaks[1]
