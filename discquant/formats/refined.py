# SPDX-License-Identifier: Apache-2.0
"""Manifest and card of a refined folder: those of an exported one, and which file it was and what changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from discquant.formats.bits import bits_per_weight
from discquant.formats.card import CARD, MANIFEST, write_card
from discquant.formats.checkpoint import read_json
from discquant.formats.coded import Format
from discquant.formats.engines import engine_rows, problems
from discquant.formats.rewrite import write_manifest
from discquant.formats.scheme import Scheme

KEPT = "README.unrefined"


def finish_refined(
    chosen: Format, folder: Path, original: Path, origin: Mapping[str, Any], recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """Complete a rewritten folder, see `rewrite.Finish`.

    Args:
        chosen: Its format.
        folder: Holds the rewritten files, and the manifest that the byte diff is in.
        original: Folder of the original model, for licence and language.
        origin: The manifest's entry `source`, see `card.origin_of`.
        recipe: How codes were chosen; `summary` in it is the run's summary with its entry `refine`.

    Returns:
        The manifest, with the fields that an exported folder's has, and `refine`.

    Raises:
        CheckpointError: The folder does not read back.
    """
    recipe = dict(recipe)
    summary = recipe.pop("summary")
    manifest, found = read_json(folder / MANIFEST), chosen.describe(folder)
    schemes = {row.name: Scheme.of_facts(row) for row in found.layers}
    schemes = {name: replace(scheme, kind=scheme.kind.lower()) for name, scheme in schemes.items()}
    shapes = {row.name: row.shape for row in found.layers}
    manifest |= {
        "source": dict(origin),
        "recipe": recipe,
        "refine": summary["refine"],
        "engines": engine_rows(chosen.name, schemes),
        "warnings": [*problems(chosen.name, schemes, shapes, found.plain), *found.problems],
        "quantized_weights": sum(rows * columns for rows, columns in shapes.values()),
        "bits_per_weight": bits_per_weight((row.weight_bits, row.shape) for row in found.layers),
        "weight_file_bytes": found.file_bytes,
        "layers": {
            row.name: {**asdict(schemes[row.name]), "shape": list(row.shape), "bits": row.weight_bits}
            for row in found.layers
        },
    }
    manifest["refined_from"]["card"] = keep_card(folder)
    write_manifest(folder, manifest)
    write_card(folder, original, summary)
    return manifest


def keep_card(folder: Path) -> str | None:
    """Put the card of the file that was refined aside, and tell its new name; None where it has nothing to say."""
    card = folder / CARD
    if not card.is_file() or not card.read_bytes().strip():
        return None
    number, name = 1, f"{KEPT}.md"
    while (folder / name).exists():  # of a file that was refined before
        number += 1
        name = f"{KEPT}-{number}.md"
    card.rename(folder / name)
    return name
