# SPDX-License-Identifier: Apache-2.0
"""linear_kl where nothing counts."""

from __future__ import annotations

import pytest
import torch

from discquant.ops.reference.linear_kl import linear_kl


@pytest.mark.parametrize("normalizer", [None, 0.0])
def test_where_nothing_counts_the_loss_is_zero(normalizer: float | None) -> None:
    """A rank whose windows are padding has tokens of no one to divide by."""
    student, teacher, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(11, 8)
    mask = torch.zeros(3, dtype=torch.bool)
    found = linear_kl(student, teacher, weight, mask=mask, normalizer=normalizer)
    assert all(bool((value == 0).all()) for value in found)
