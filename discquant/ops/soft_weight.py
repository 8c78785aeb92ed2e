# SPDX-License-Identifier: Apache-2.0
"""Public function of `soft_weight` (first form: the reference on every device)."""

from __future__ import annotations

from typing import Any

from discquant.ops.reference import soft_weight as _reference


def soft_weight(*args: Any, impl: str = "auto", **kwargs: Any) -> Any:
    """Call the reference; see its documentation."""
    if impl not in ("auto", "reference"):
        raise RuntimeError(f"soft_weight: impl must be available = 'auto' or 'reference' in this build, got {impl!r}")
    return _reference.soft_weight(*args, **kwargs)
