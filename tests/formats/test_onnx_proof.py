# SPDX-License-Identifier: Apache-2.0
"""Damage that the proof of an ONNX folder finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from discquant.config import GridConfig
from discquant.errors import ProofError
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.formats.onnx import FORMAT
from discquant.formats.onnx_write import prove_onnx
from discquant.grids import place_grid

onnx = pytest.importorskip("onnx")
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def source(make_llama: Callable[..., Path], tmp_path: Path) -> Checkpoint:
    """A random Llama."""
    return Checkpoint(make_llama(tmp_path / "model", attention_bias=False))


def solved(source: Checkpoint, flipped: str = "") -> Iterator[CodedLayer]:
    """Nearest codes of all layers; one code of `flipped` is the other neighbour."""
    for key in source.tensors:
        if key.endswith("_proj.weight"):
            weight, name = source.read(key).float(), key.removesuffix(".weight")
            grid = place_grid(weight, GridConfig(4, 32, False))
            q = grid.nearest(weight)
            if name == flipped:
                q[3, 4] ^= 1
            yield CodedLayer(name, q, grid)


def damage(folder: Path, name: str) -> None:
    """Flip one bit of a tensor."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    tensor = next(row for row in model.graph.initializer if row.name == name)
    place = next(int(row.value) for row in tensor.external_data if row.key == "offset")
    raw = bytearray((folder / "model.onnx.data").read_bytes())
    raw[place] ^= 1
    (folder / "model.onnx.data").write_bytes(raw)


def change_graph(folder: Path, change: Callable[[Any], Any]) -> None:
    """Write the graph anew after a change; the data stay as they are."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    change(model.graph)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def drop(rows: Any, name: str) -> None:
    """Remove what is called so."""
    rows.remove(next(row for row in rows if row.name == name))


def add_beside(graph: Any, name: str) -> None:
    """Name the data of a tensor a second time."""
    copy = graph.initializer.add()
    copy.CopyFrom(next(row for row in graph.initializer if row.name == name))
    copy.name = "more"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: damage(folder, f"{UP}.qweight"), rf"{UP}: the file's weights differ, the first at \[0, 0\]"),
        (lambda folder: damage(folder, f"{UP}.scales"), rf"{UP}: the file's weights differ"),
        (lambda folder: damage(folder, f"{UP}.zero_points"), rf"{UP}: the file's weights differ"),
        (lambda folder: damage(folder, "model.norm.weight"), "model.norm.weight is not the source's byte for byte"),
        (lambda folder: change_graph(folder, lambda graph: drop(graph.node, UP)), f"{UP} is no MatMulNBits node"),
        (lambda folder: change_graph(folder, lambda graph: drop(graph.initializer, "model.norm.weight")),
         "model.norm.weight is missing from the file"),
        (lambda folder: change_graph(folder, lambda graph: add_beside(graph, "model.norm.weight")),
         r"nobody asked for: \['more'\]"),
    ],
    ids=["codes", "scale", "zero point", "norm", "layer missing", "norm missing", "one too many"],
)  # fmt: skip
def test_proof_finds_damage(
    change: Callable[[Path], None], message: str, source: Checkpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    FORMAT.write(source, folder, solved(source))
    assert prove_onnx(source, folder / "model.onnx", solved(source))["layers"] == 14
    change(folder)
    with pytest.raises(ProofError, match=message):
        prove_onnx(source, folder / "model.onnx", solved(source))


def test_proof_fails_before_anything_appears(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ProofError, match=rf"{UP}: the file's weights differ, the first at \[3, 4\]"):
        FORMAT.write(source, tmp_path / "out", solved(source), prove_from=lambda: solved(source, UP))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_proof_wants_every_layer(source: Checkpoint, tmp_path: Path) -> None:
    """A layer of the file that nobody solved stands where its weight should be."""
    FORMAT.write(source, tmp_path / "out", solved(source))
    layers = [layer for layer in solved(source) if layer.name != UP]
    with pytest.raises(ProofError, match=rf"{UP}\.weight is missing from the file"):
        prove_onnx(source, tmp_path / "out" / "model.onnx", layers)
