# SPDX-License-Identifier: Apache-2.0
"""Layers that must share one grid: what engines join into one matrix, and the experts of one layer."""

from __future__ import annotations

from collections.abc import Iterable

from discquant.grids.fused import JOINED, experts_of


def unit_of(name: str) -> str:
    """Return the name of the unit that a module belongs to: the joined module's, the experts', or its own.

    Engines run all experts of a layer in one kernel (vLLM's FusedMoE), on one grid.
    """
    experts = experts_of(name)
    if experts is not None:
        return experts
    parent, _, last = name.rpartition(".")
    joined = next((whole for whole, members in JOINED if last in members), None)
    return name if joined is None else f"{parent}.{joined}"


def units_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the modules of each unit, in order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(unit_of(name), []).append(name)
    return found
