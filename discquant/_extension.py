# SPDX-License-Identifier: Apache-2.0
"""Lazy loading of the compiled extension discquant._C; the reason of a failure is kept and quoted."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from discquant.errors import ExtensionError


@functools.cache
def _attempt() -> tuple[ModuleType | None, str]:
    # torch first: its shared libraries must be in the process before an extension that needs their symbols.
    import torch  # noqa: F401

    try:
        return importlib.import_module("discquant._C"), ""
    except ImportError as cause:
        return None, f"{type(cause).__name__}: {cause}"


def load() -> ModuleType:
    """The extension module; loading it registers its operators with torch.

    Raises:
        ExtensionError: It was not built or does not load; the message holds the cause and the remedy.
    """
    module, reason = _attempt()
    if module is None:
        raise ExtensionError(
            f"discquant._C is not usable ({reason}); build it with a C++ compiler at hand: "
            "pip install --no-build-isolation --no-deps -e ."
        )
    return module


def available() -> bool:
    """Whether the extension loads here."""
    return _attempt()[0] is not None


def failure() -> str | None:
    """Why the extension does not load, or None if it does."""
    return _attempt()[1] or None
