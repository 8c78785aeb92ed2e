# SPDX-License-Identifier: Apache-2.0
"""Errors a user can cause: one clear sentence each, printed by the command line without a traceback.

Each is also the built-in class that fits, so that library callers need not know these names.
"""

from __future__ import annotations

from collections.abc import Iterable


def either(choices: Iterable[object]) -> str:
    """Choices in words, for a message: `a, b or c`."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last


class UserError(Exception):
    """Marks an error whose message is written for the person at the terminal."""


class ConfigError(UserError, ValueError):
    """An option, or a combination of options, cannot be used."""


class CheckpointError(UserError, ValueError):
    """A checkpoint file is truncated, corrupt, inconsistent, or of a kind that is not read (pickle)."""


class NonFiniteError(UserError, ValueError):
    """A weight is NaN or infinite; the message names the tensor."""


class CalibrationError(UserError, ValueError):
    """Calibration text is empty, too short, or does not fit the tokenizer."""


class UnrepresentableError(UserError, ValueError):
    """A format cannot hold this grid or shape; the message names the module."""


class MissingModelError(UserError, FileNotFoundError):
    """A path is no model, or a file of it is missing."""


class OutputExistsError(UserError, FileExistsError):
    """The output directory holds something else already."""


class DiskSpaceError(UserError, RuntimeError):
    """The output would not fit on its file system."""


class ResumeError(UserError, RuntimeError):
    """A run cannot be resumed because model, data or configuration changed."""


class RankLostError(UserError, RuntimeError):
    """Another process of a run on several ranks stopped or cannot be reached."""


class ProofError(UserError, RuntimeError):
    """A written checkpoint does not hold exactly what was solved."""


class ExtensionError(UserError, RuntimeError):
    """The compiled extension is absent or does not load; the message quotes the cause."""


class CapacityError(UserError, RuntimeError):
    """A model fits this machine with no placement; the message has the numbers and what would fit."""
