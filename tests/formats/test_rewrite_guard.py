# SPDX-License-Identifier: Apache-2.0
"""A rewritten folder with other bytes than the codes that were named never appears."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from discquant.errors import ProofError
from discquant.formats import Checkpoint, QuantizedLinear, rewrite
from discquant.formats.registry import by_name

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("touched", "message"),
    [
        (f"{UP}.weight_scale", "1 bytes outside the codes changed"),
        ("model.norm.weight", "1 bytes outside the codes changed"),
        (f"{DOWN}.weight_packed", f"codes of layers changed that nobody named: {DOWN}"),
    ],
)
def test_another_byte_is_refused(
    touched: str, message: str, exported: Path, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    make_layers: Callable[..., Iterator[QuantizedLinear]],
) -> None:  # fmt: skip
    codes = {layer.name: 7 - layer.q for layer in make_layers(llama_dir, 3, 32, True) if layer.name == UP}
    info = Checkpoint(exported).tensors[touched]
    copied = rewrite._copy_all

    def touching(path: Path, partial: Path) -> None:
        copied(path, partial)
        file = partial / info.file.name
        raw = bytearray(file.read_bytes())
        raw[info.start + 1] ^= 1
        file.write_bytes(raw)

    chosen = by_name("compressed-tensors")
    assert chosen.rewrite(exported, tmp_path / "sound", codes)["byte_diff"]["layers"].keys() == {UP}
    shutil.rmtree(tmp_path / "sound")
    monkeypatch.setattr(rewrite, "_copy_all", touching)
    with pytest.raises(ProofError, match=message):
        chosen.rewrite(exported, tmp_path / "out", codes)
    assert not list(tmp_path.iterdir())
