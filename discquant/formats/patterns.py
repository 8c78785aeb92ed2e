# SPDX-License-Identifier: Apache-2.0
"""Regular expressions that somebody else's file holds: matched within a limit of time, for some take for ever."""

from __future__ import annotations

import regex

from discquant.errors import CheckpointError

SECONDS = 0.25  # a sane pattern takes microseconds


def compiles(pattern: str) -> bool:
    """Whether it is a regular expression at all."""
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, ValueError):
        return False
    return True


def matches(pattern: str, name: str, *, anywhere: bool = False) -> bool:
    """Whether a pattern matches from the beginning of a name, or anywhere in it; what is no pattern matches nothing.

    Raises:
        CheckpointError: It takes too long.
    """
    if not compiles(pattern):
        return False
    try:
        found = (regex.search if anywhere else regex.match)(pattern, name, timeout=SECONDS)
    except TimeoutError as error:
        raise CheckpointError(
            f"the configuration's pattern {pattern[:80]!r} takes too long to match {name}"
        ) from error
    return found is not None
