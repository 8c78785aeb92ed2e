# SPDX-License-Identifier: Apache-2.0
"""Public function of `linear_kl` (first form: the reference on every device)."""

from __future__ import annotations

from typing import Any

from discquant.ops.reference import linear_kl as _reference


def linear_kl(*args: Any, impl: str = "auto", **kwargs: Any) -> Any:
    """Call the reference; see its documentation."""
    if impl not in ("auto", "reference"):
        raise RuntimeError(f"linear_kl: impl must be available = 'auto' or 'reference' in this build, got {impl!r}")
    return _reference.linear_kl(*args, **kwargs)
