# SPDX-License-Identifier: Apache-2.0
"""Public function of `projected_step_` (first form: the reference on every device)."""

from __future__ import annotations

from typing import Any

from discquant.ops.reference import projected_step as _reference


def projected_step_(*args: Any, impl: str = "auto", **kwargs: Any) -> Any:
    """Call the reference; see its documentation."""
    if impl not in ("auto", "reference"):
        raise RuntimeError(f"projected_step_: impl must be available = 'auto' or 'reference' in this build, got {impl!r}")
    return _reference.projected_step_(*args, **kwargs)
