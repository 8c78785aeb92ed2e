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


@functools.cache
def cuda_code(major: int, minor: int) -> str | None:
    """What in the extension runs on a GPU of this compute capability, as in its build facts: "90a", "80+PTX"; or None.

    A cubin runs on its own major version from its own minor one on, one with a suffix on its architecture alone; PTX on
    everything from its architecture on, translated when it is loaded.
    """
    module, _ = _attempt()
    here, found = 10 * major + minor, []
    for name in [] if module is None else module.build_facts()["cuda_architectures"]:
        arch, ptx = name.removesuffix("+PTX"), name.endswith("+PTX")
        number = int(arch.rstrip("af"))
        own = number == here or (arch.isdigit() and number // 10 == major and number < here)
        if own or (ptx and number < here):
            found.append((own, number, len(arch), name))
    return max(found)[-1] if found else None


def failure() -> str | None:
    """Why the extension does not load, or None if it does."""
    return _attempt()[1] or None
