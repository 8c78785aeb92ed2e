# SPDX-License-Identifier: Apache-2.0
"""Choosing one option per unit within a budget, against every choice there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discquant.allocation import Option, choose

SIZES = st.integers(1, 9)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Option]], float]:
    """Up to five units, options of any damages, and a budget that the cheapest fit."""
    units = [
        [Option(draw(SIZES), draw(st.integers(0, 50))) for _ in range(draw(st.integers(1, 4)))]
        for _ in range(draw(st.integers(1, 5)))
    ]
    least = sum(min(options).cost for options in units)
    return units, least + draw(st.integers(0, 20))


def totals(units: list[list[Option]], chosen: list[int]) -> tuple[float, float]:
    picked = [options[number] for options, number in zip(units, chosen, strict=True)]
    return sum(o.cost for o in picked), sum(o.damage for o in picked)


@given(problems())
def test_within_the_budget_and_near_the_best_there_is(problem: tuple[list[list[Option]], float]) -> None:
    """It misses the least damage by less than one unit can do, and nothing that fits is left undone."""
    units, budget = problem
    chosen = choose(units, budget)
    cost, damage = totals(units, chosen)
    assert cost <= budget
    every = [totals(units, list(numbers)) for numbers in itertools.product(*(range(len(o)) for o in units))]
    best = min(d for c, d in every if c <= budget)
    widest = max(max(o.damage for o in options) - min(o.damage for o in options) for options in units)
    assert damage <= best + widest
    for options, number in zip(units, chosen, strict=True):
        for other in options:
            fits = cost - options[number].cost + other.cost <= budget
            assert not fits or other.damage >= options[number].damage or other.cost < options[number].cost


@pytest.mark.parametrize(
    "option", [Option(2, float("nan")), Option(2, float("inf")), Option(float("nan"), 1)]
)
def test_what_is_no_number_is_refused(option: Option) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        choose([[Option(1, 2), option]], 10)


def test_a_budget_on_the_hull_gets_the_best() -> None:
    units = [[Option(2, 16), Option(3, 4), Option(4, 1)], [Option(2, 160), Option(3, 40), Option(4, 10)]]
    assert choose(units, 4) == [0, 0]
    assert choose(units, 5) == [0, 1]  # the sensitive one first
    assert choose(units, 6) == [0, 2]
    assert choose(units, 7) == [1, 2]
    assert choose(units, 100) == [2, 2]
    # What costs more and damages more is never taken; what costs nothing more and damages less always.
    assert choose([[Option(2, 1), Option(3, 5)], [Option(2, 9), Option(2, 3)]], 10) == [0, 1]


def test_room_goes_where_it_takes_off_most_for_what_it_costs() -> None:
    """Not to the change that takes off most at once; of equal ones to the first."""
    large, small = [Option(2, 10), Option(6, 0)], [Option(2, 5), Option(3, 0)]
    assert choose([large, small, small, small], 12) == [0, 1, 1, 1]
    assert choose([large, small, small, small], 10) == [0, 1, 1, 0]
    assert choose([large, small, small, small], 15) == [1, 1, 1, 1]


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"at least 4\.0, the cheapest, got 3\.5"):
        choose([[Option(2.0, 1)], [Option(2.0, 1), Option(5.0, 0)]], 3.5)
    with pytest.raises(ValueError, match="at least one option"):
        choose([[Option(1, 1)], []], 9)
