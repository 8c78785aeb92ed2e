# SPDX-License-Identifier: Apache-2.0
"""Autocast off: what every op's contract says of dtypes holds whatever the caller's autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def settled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The same function with autocast off for the device of its first tensor.

    Matmuls inside would take autocast's dtype, and not that of the contract (and of the fake). TF32 is left to the
    caller: its switch is the whole process's, and turning it here would turn it for other threads.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        kind = next(argument.device.type for argument in args if isinstance(argument, Tensor))
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return run
