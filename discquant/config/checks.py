# SPDX-License-Identifier: Apache-2.0
"""Checks that every configuration makes of its fields; messages name the field, what it must be, and what it is."""

from __future__ import annotations

import math


def check(argument: str, contract: str, ok: bool, actual: object) -> None:
    """Refuse a field that is not `ok`.

    Raises:
        ValueError: So it is.
    """
    if not ok:
        raise ValueError(f"config: {argument} must be {contract}, got {actual!r}")


def whole(argument: str, least: int, actual: object) -> None:
    """Ask for an integer of at least `least`; a bool is none."""
    ok = type(actual) is int and actual >= least
    check(argument, f"an integer, at least {least}", ok, actual)


def names(argument: str, actual: object) -> None:
    """Ask for a tuple of names; a str would be read letter by letter."""
    ok = isinstance(actual, (tuple, list)) and all(isinstance(name, str) and name for name in actual)
    check(argument, "a tuple of names", ok, actual)


def positive(argument: str, actual: float | None) -> None:
    """Ask for a finite number above 0, or None."""
    ok = actual is None or (actual > 0 and math.isfinite(actual))
    check(argument, "above 0 and finite, or None", ok, actual)
