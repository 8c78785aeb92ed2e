# SPDX-License-Identifier: Apache-2.0
"""Regular expressions that somebody else's file holds: matched within a limit of time, for some take for ever."""

from __future__ import annotations

import functools

import regex

from discquant.errors import CheckpointError

SECONDS = 0.25  # a sane pattern takes microseconds


def compiles(pattern: str) -> bool:
    """Whether it is a regular expression at all."""
    return _compiled(pattern) is not None


@functools.lru_cache(maxsize=4096)  # files of experts ask for a few patterns tens of thousands of times
def _compiled(pattern: str) -> regex.Pattern[str] | None:
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, ValueError):
        return None


def matches(pattern: str, name: str, *, anywhere: bool = False) -> bool:
    """Whether a pattern matches from the beginning of a name, or anywhere in it; what is no pattern matches nothing.

    Raises:
        CheckpointError: It takes too long.
    """
    compiled = _compiled(pattern)
    if compiled is None:
        return False
    try:
        found = (compiled.search if anywhere else compiled.match)(name, timeout=SECONDS)
    except TimeoutError as error:
        raise CheckpointError(
            f"the configuration's pattern {pattern[:80]!r} takes too long to match {name}"
        ) from error
    return found is not None
