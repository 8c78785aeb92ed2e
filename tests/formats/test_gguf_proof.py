# SPDX-License-Identifier: Apache-2.0
"""Damage that the proof of a GGUF file finds, by what the gguf package decodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from discquant.config import GridConfig
from discquant.errors import ProofError
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.formats.gguf import FORMAT
from discquant.formats.gguf_model import FAMILIES, Layout
from discquant.formats.gguf_proof import prove_gguf
from discquant.formats.gguf_write import prove
from discquant.grids import place_grid

gguf = pytest.importorskip("gguf")


@pytest.fixture
def source(make_llama: Callable[..., Path], tmp_path: Path) -> Checkpoint:
    """A random Llama without a tokenizer."""
    path = make_llama(tmp_path / "model", attention_bias=False)
    (path / "tokenizer.json").unlink()
    return Checkpoint(path)


def solved(source: Checkpoint, flipped: str = "") -> Iterator[CodedLayer]:
    """Nearest codes of all layers; one code of `flipped` is the other neighbour."""
    for key in source.tensors:
        if key.endswith("_proj.weight"):
            weight, name = source.read(key).float(), key.removesuffix(".weight")
            grid = place_grid(weight, GridConfig.of_kind("q4_0"))
            q = grid.nearest(weight)
            if name == flipped:
                q[3, 4] ^= 1
            yield CodedLayer(name, q, grid)


def damage(file: Path, name: str) -> None:
    """Flip one bit of a tensor."""
    offset = next(row.data_offset for row in gguf.GGUFReader(file).tensors if row.name == name)
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 1
    file.write_bytes(raw)


def rename(file: Path, before: str, after: str) -> None:
    """Call a tensor something else."""
    raw = file.read_bytes()
    assert raw.count(before.encode()) == 1 and len(before) == len(after)
    file.write_bytes(raw.replace(before.encode(), after.encode()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, s: damage(f, "blk.0.ffn_up.weight"), r"blk\.0\.ffn_up\.weight: \d+ values differ"),
        (lambda f, s: damage(f, "output_norm.weight"), r"output_norm\.weight: 1 values differ, the first at \[0"),
        (lambda f, s: rename(f, "blk.0.ffn_up.weight", "blk.0.ffn_xx.weight"), "ffn_up.weight is not in the file"),
        (lambda f, s: rename(f, "output_norm.weight", "output_xxxx.weight"), "output_norm.weight is missing"),
        (lambda f, s: s.tensors.pop("model.norm.weight"), r"nobody asked for: \['output_norm\.weight'\]"),
    ],
    ids=["codes", "norm", "layer missing", "norm missing", "one too many"],
)  # fmt: skip
def test_proof_finds_damage(
    change: Callable[[Path, Checkpoint], Any], message: str, source: Checkpoint, tmp_path: Path
) -> None:
    FORMAT.write(source, tmp_path / "out", solved(source))
    file = tmp_path / "out" / "model.gguf"
    assert prove(source, file, solved(source))["layers"] == 14
    change(file, source)
    with pytest.raises(ProofError, match=message):
        prove(source, file, solved(source))


def test_proof_fails_before_anything_appears(source: Checkpoint, tmp_path: Path) -> None:
    """Also where the file holds a layer's rows in another order: the place is that of the original."""
    name = "model.layers.1.self_attn.q_proj"
    with pytest.raises(ProofError, match=r"blk\.1\.attn_q\.weight: 1 values differ, the first at \[3, 4\]"):
        FORMAT.write(source, tmp_path / "out", solved(source), prove_from=lambda: solved(source, name))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_proof_wants_every_layer_once(source: Checkpoint, tmp_path: Path) -> None:
    FORMAT.write(source, tmp_path / "out", solved(source))
    file = tmp_path / "out" / "model.gguf"
    layers = list(solved(source))
    with pytest.raises(ProofError, match="came twice"):
        prove(source, file, [*layers, layers[0]])
    with pytest.raises(ProofError, match=r"attn_[qk].weight: \d+ values differ"):
        prove_gguf(source, file, solved(source), Layout(FAMILIES["qwen2"], 4, 2), source.tensors)
