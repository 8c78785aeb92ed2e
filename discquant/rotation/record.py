# SPDX-License-Identifier: Apache-2.0
"""What a rotated folder says of itself: the signs that undo it, where it comes from, and its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from discquant import environment
from discquant.formats.card import CARD, ROTATION, inherited, origin_of
from discquant.rotation.turn import Rotation


def write_record(
    partial: Path,
    folder: Path,
    sha256: str,
    rotation: Rotation,
    seed: int,
    *,
    head_untied: bool,
    worst: tuple[str, float],
) -> dict[str, Any]:
    """Write discquant_rotation.json and the card.

    Args:
        partial: The rotated folder.
        folder: The original.
        sha256: Of the original's tensors.
        rotation: Whose signs are kept: hexadecimal, 1 is +1, first sign first.
        seed: They were drawn with.
        head_untied: The head got weights of its own.
        worst: Name and relative error of the tensor that is furthest from the original when turned back.

    Returns:
        What was written into the former.
    """
    record = {
        "rotation_version": 1,
        "versions": environment.versions(),
        "source": origin_of(folder, sha256),
        "seed": seed,
        "stream": _hexadecimal(rotation.stream),
        "values": [_hexadecimal(signs) for signs in rotation.values],
        "head_untied": head_untied,
        "largest_relative_error": worst[1],
        "largest_relative_error_at": worst[0],
    }
    (partial / ROTATION).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _write_card(partial, folder, record)
    return record


def _write_card(partial: Path, folder: Path, record: dict[str, Any]) -> None:
    """A card that passes licence and language on, and says what this is."""
    from huggingface_hub import ModelCard, ModelCardData

    origin = record["source"]
    data = ModelCardData(**inherited(folder / CARD), base_model=origin["hub"], tags=["discquant", "rotated"])
    heads = ", and the values of its attention heads," if record["values"] else ""
    lines = [
        f"# {origin['name']}, rotated",
        "",
        f"`{origin['hub'] or origin['name']}` with its hidden states{heads} in another basis, by discquant, seed "
        f"{record['seed']}: it computes what the original does, up to the rounding of its weights. `{ROTATION}` has "
        "the signs that turn it back (the weights of its norms are in the matrices behind them). Meant to be "
        "quantized.",
    ]
    (partial / CARD).write_text(
        str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")), encoding="utf-8"
    )


def _hexadecimal(signs: Tensor) -> str:
    bits = "".join("1" if sign > 0 else "0" for sign in signs.tolist())
    bits += "0" * (-len(bits) % 4)
    return "".join(f"{int(bits[i : i + 4], 2):x}" for i in range(0, len(bits), 4))
