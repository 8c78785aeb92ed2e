# SPDX-License-Identifier: Apache-2.0
"""What the proof finds beside codes and scales: zero points, idle bits, the kind of grid, the served dtype."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from discquant.errors import ProofError
from discquant.formats import Checkpoint, CodedLayer, prove
from discquant.formats.registry import by_name
from discquant.grids import UniformGrid

NAME = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS, GROUP = 6, 40, 8  # 3-bit codes of a row end 8 bits before a word does, zero points 14


def layer_of(symmetric: bool) -> CodedLayer:
    """Random 3-bit codes."""
    q = torch.randint(0, 8, (ROWS, COLUMNS), dtype=torch.uint8)
    scale = (torch.randint(64, 128, (ROWS, COLUMNS // GROUP)).float() / 4096).bfloat16()
    zero = torch.randint(0, 8, scale.shape, dtype=torch.uint8)
    return CodedLayer(NAME, q, UniformGrid(3, GROUP, symmetric, scale, None if symmetric else zero))


def written(folder: Path, layer: CodedLayer) -> tuple[Path, Path]:
    """A model of one matrix, and what was written of it; no manifest that would tell by a hash."""
    source, out = folder / "source", folder / "out"
    source.mkdir()
    save_file({f"{NAME}.weight": torch.zeros(ROWS, COLUMNS).bfloat16()}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["X"]}))
    by_name("compressed-tensors").write(Checkpoint(source), out, [layer], prove_from=lambda: [layer])
    (out / "discquant_manifest.json").unlink()
    return source, out


def flip(out: Path, suffix: str, word: int, bit: int) -> None:
    """Flip one bit of a tensor of words."""
    file = out / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[Checkpoint(out).tensors[f"{NAME}.{suffix}"].start + 4 * word + bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)


def say_symmetric(out: Path) -> None:
    """Let config.json say the contrary."""
    text = (out / "config.json").read_text()
    assert text.count('"symmetric": true') == 1
    (out / "config.json").write_text(text.replace('"symmetric": true', '"symmetric": false'))


@pytest.mark.parametrize(
    ("symmetric", "damage", "message"),
    [
        (False, lambda out: flip(out, "weight_zero_point", 0, 3),
         rf"{NAME}: zero point: 1 values differ, the first at \[1, 0\]"),
        (False, lambda out: flip(out, "weight_zero_point", 0, 31), f"{NAME}: bits after the last code are set"),
        (True, lambda out: flip(out, "weight_packed", 3, 24), f"{NAME}: bits after the last code are set"),
        (True, lambda out: flip(out, "weight_packed", 3, 23),
         rf"{NAME}: codes: 1 values differ, the first at \[0, 39\]"),
        (True, say_symmetric, f"{NAME}: config.json says symmetric = False, the layer has True"),
    ],
    ids=["zero point", "idle bit of zero points", "idle bit of codes", "last code", "symmetric"],
)  # fmt: skip
def test_proof_finds_damage(
    symmetric: bool, damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    layer = layer_of(symmetric)
    source, out = written(tmp_path, layer)
    prove(source, out, [layer])
    damage(out)
    with pytest.raises(ProofError, match=message):
        prove(source, out, [layer])


def test_proof_compares_what_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid that were right in float32 alone: the source's dtype, in which engines compute, is compared too."""
    layer = layer_of(True)
    source, out = written(tmp_path, layer)
    exact = CodedLayer.dequantize

    def off_by_one(self: CodedLayer, dtype: torch.dtype) -> torch.Tensor:
        weight = exact(self, dtype).clone()
        if dtype == torch.bfloat16:
            weight.view(torch.int16)[2, 5] ^= 1
        return weight

    monkeypatch.setattr(CodedLayer, "dequantize", off_by_one)
    with pytest.raises(ProofError, match=r"weight in torch.bfloat16, from row 0: 1 values .* at \[2, 5\]"):
        prove(source, out, [layer])
