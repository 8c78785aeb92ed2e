# SPDX-License-Identifier: Apache-2.0
"""One option for each unit, so that the damages add up to as little as possible within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """What an option costs, and what it damages; any units, the same for all."""

    cost: float
    damage: float


def choose(units: Sequence[Sequence[Option]], budget: float) -> list[int]:
    """Choose an option for each unit: least sum of damages at a sum of costs of at most `budget`.

    From the cheapest option of each, again and again the change that takes off most damage per cost and still fits.
    That walks along the lower convex hulls, where each choice is the best for what it costs; only the last changes,
    when hardly any room is left, may miss the best choice, by less than one of them takes off.

    Args:
        units: Options of each, in any order.
        budget: Sum of the costs at most.

    Returns:
        Number of the option of each unit. Of two equal changes the first counts.

    Raises:
        ValueError: The cheapest options exceed the budget, a unit has none, or an option is not finite.
    """
    if not all(units):
        raise ValueError("choose: every unit must have at least one option")
    if not all(math.isfinite(value) for options in units for option in options for value in option):
        raise ValueError("choose: costs and damages must be finite")
    chosen = [options.index(min(options)) for options in units]
    left = budget - sum(options[o].cost for options, o in zip(units, chosen, strict=True))
    if left < 0:
        raise ValueError(f"choose: the budget must be at least {budget - left}, the cheapest, got {budget}")
    while True:
        best: tuple[float, int, int] | None = None
        for unit, options in enumerate(units):
            cost, damage = options[chosen[unit]]
            for number, option in enumerate(options):
                gain, price = damage - option.damage, option.cost - cost
                if gain <= 0 or price > left:
                    continue
                rate = gain / price if price > 0 else float("inf")
                if best is None or rate > best[0]:
                    best = rate, unit, number
        if best is None:
            return chosen
        _, unit, number = best
        left -= units[unit][number].cost - units[unit][chosen[unit]].cost
        chosen[unit] = number
