# SPDX-License-Identifier: Apache-2.0
"""What a step replaces is put back byte for byte, as long as all of it fits the limit; else nothing is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from discquant.solver.journal import Journal


class Homes:
    """Four blocks of 100 bytes, all of which a step changes."""

    def __init__(self) -> None:
        self.blocks = [torch.full((100,), index, dtype=torch.uint8) for index in range(4)]

    def home(self, index: int) -> Any:
        """The block, which is the part that a step changes."""
        return type("Block", (), {"changed": lambda _: self.blocks[index]})()

    def step(self, journal: Journal, count: int) -> None:
        """Change some blocks from the last, as a step does."""
        journal.begin()
        for index in reversed(range(4 - count, 4)):
            journal.keep(index, self.blocks[index])
            self.blocks[index] += 10

    @property
    def first(self) -> list[int]:
        """The first byte of each block."""
        return [int(block[0]) for block in self.blocks]


def test_a_step_is_taken_back_as_far_as_it_got() -> None:
    """Also a second one, of other blocks: what the first kept is not put back again."""
    homes, journal = Homes(), Journal(400)
    homes.step(journal, 4)
    journal.forget()
    for count in (4, 3, 1):
        homes.step(journal, count)
        assert journal.outcome == "the state is as it was before the step"
        assert journal.restore(homes) and homes.first == [10, 11, 12, 13]  # type: ignore[arg-type]
    homes.step(journal, 0)
    assert not journal.restore(homes) and not journal.closed  # type: ignore[arg-type]


def test_a_step_that_does_not_fit_is_left_and_the_state_closed() -> None:
    """No half of it is put back, for that would be the state of no step either; nor does it open again."""
    homes, journal = Homes(), Journal(399)
    homes.step(journal, 4)
    assert "cannot be taken back" in journal.outcome
    assert not journal.restore(homes) and homes.first == [10, 11, 12, 13]  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="failed half-way"):
            journal.begin()
        journal.restore(homes)  # type: ignore[arg-type]


def test_a_large_step_that_ends_well_closes_nothing() -> None:
    homes, journal = Homes(), Journal(150)
    homes.step(journal, 4)
    journal.forget()
    homes.step(journal, 1)
    assert journal.restore(homes) and homes.first == [10, 11, 12, 13]  # type: ignore[arg-type]
