# SPDX-License-Identifier: Apache-2.0
"""A type of 256-column blocks that rows do not fill: the type taken instead is told before any work."""

from __future__ import annotations

from discquant.config import GRID_KINDS, GridConfig
from discquant.run.choices import fallback_notes

ROWS = {"layers.0.up": (8, 256), "layers.0.down": (8, 640), "layers.1.down": (8, 640)}


def _grid(kind: str) -> GridConfig:
    return GridConfig(*GRID_KINDS.get(kind, (4, 32, True)), kind=kind)


def _notes(*kinds: str) -> list[str]:
    return fallback_notes((layer, shape, _grid(kind)) for layer, shape in ROWS.items() for kind in kinds)


def test_layers_and_types_are_named_in_one_note() -> None:
    assert _notes("q3_k", "q6_k") == [
        "rows of 2 layers are no multiple of 256: Q4_0 in place of Q3_K, Q8_0 in place of Q6_K (layers.0.down, ...)"
    ]
    assert not _notes("q4_0", "iq4_nl", "uniform")


def test_other_layers_have_a_note_of_their_own() -> None:
    grids = [("a", (8, 64), _grid("q2_k")), ("b", (8, 64), _grid("iq4_xs"))]
    assert fallback_notes(grids) == [
        "rows of a layer are no multiple of 256: Q4_0 in place of Q2_K (a)",
        "rows of a layer are no multiple of 256: IQ4_NL in place of IQ4_XS (b)",
    ]
