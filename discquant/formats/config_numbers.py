# SPDX-License-Identifier: Apache-2.0
"""Numbers of a config.json, which anybody may have edited: what is no number is said by name, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from discquant.errors import CheckpointError

# llama.cpp keeps counts in 32 bits.
MOST = (1 << 31) - 1


def integer(
    config: Mapping[str, Any], key: str, default: int | None = None, least: int = 1, most: int = MOST
) -> int:
    """An entry that must be an integer in [least, most]; null counts as missing.

    Raises:
        CheckpointError: It is missing without a default, or something else.
    """
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not least <= value <= most:
        limit = "" if most == MOST else f" to {most}"
        raise CheckpointError(
            f"config.json: {key} must be an integer from {least}{limit}, got {_told(value)}"
        )
    return value


def number(
    config: Mapping[str, Any], key: str, default: float | None = None, *, positive: bool = True
) -> float:
    """An entry that must be a finite number; null counts as missing.

    Raises:
        CheckpointError: It is missing without a default, not positive where it must be, or something else.
    """
    value = config.get(key)
    value = default if value is None else value
    if not is_number(value) or (positive and value <= 0):
        raise CheckpointError(
            f"config.json: {key} must be a {'positive ' if positive else ''}number, got {_told(value)}"
        )
    return float(value)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a number that float32 holds."""
    # A bool is an int to isinstance; integers are compared, not converted, as JSON's have no bound.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e38 < value < 1e38


def table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An entry that must be an object; empty where it is missing or null.

    Raises:
        CheckpointError: It is something else.
    """
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(f"config.json: {key} must be an object, got {_told(value)}")
    return dict(value or {})


def _told(value: object) -> str:
    return repr(value)[:100]
