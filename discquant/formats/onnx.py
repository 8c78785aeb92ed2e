# SPDX-License-Identifier: Apache-2.0
"""ONNX behind the interface of all formats: a decoder that ONNX Runtime executes, its linear layers MatMulNBits.

A written folder holds `model.onnx`, the weights in `model.onnx.data`, configuration, tokenizer, manifest, proof, card.
Read are MatMulNBits nodes of any file whose weights lie in external data.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discquant.config import GridConfig
from discquant.errors import (
    MissingModelError,
    ProofError,
    UnrepresentableError,
)
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import DEFAULT_SHARD_BYTES, CodedLayer, Description, Format, LayerFacts
from discquant.formats.mapped import forget_pages, map_file
from discquant.formats.onnx_blocks import WIDTHS, block_size, check, encode
from discquant.formats.onnx_file import (
    FLOATS,
    TYPE_NAMES,
    External,
    Node,
    external_of,
    layer_of,
    load,
    nodes_of,
    offset_of,
    read_external,
    require_onnx,
)
from discquant.formats.onnx_graph import check_architecture
from discquant.formats.onnx_write import space, write_onnx
from discquant.formats.output import MANIFEST, PROOF, atomic_directory, check_space
from discquant.formats.rewrite import Finish, close_rewritten, file_facts, span_row
from discquant.formats.scheme import Scheme
from discquant.grids import Grid, UniformGrid


class Onnx:
    """See `coded.Format`."""

    name = "onnx"

    def detects(self, path: Path) -> bool:
        """Whether it is an .onnx file, or a folder with exactly one."""
        return _file_of(path) is not None

    def describe(self, path: Path) -> Description:
        """See `coded.Format`."""
        file = _require(path)
        nodes = list(nodes_of(file, load(file)))
        rows = [
            LayerFacts(
                node.name,
                node.shape,
                f"int{node.num_bits}",
                node.num_bits,
                node.group_size,
                node.zero_points is None,
                node.num_bytes,
                8 * node.num_bytes,
            )
            for node in nodes
        ]
        files = {node.packed.file for node in nodes} | {file}
        size = sum(entry.stat().st_size for entry in files)
        notes = tuple(
            f"{sum(1 for node in nodes if node.narrow == bits)} layers of {bits} bits are stored wider"
            for bits in sorted({node.narrow for node in nodes if node.narrow})
        )
        return Description(self.name, tuple(rows), size - sum(row.stored_bytes for row in rows), size, notes)

    def read(self, path: Path) -> Iterator[CodedLayer]:
        """See `coded.Format`; codes that were widened come back as they were."""
        file = _require(path)
        for node in nodes_of(file, load(file)):
            yield layer_of(node)

    def plain_tensors(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        """Every other floating tensor beside the graph, by its name there (in our files that of transformers).

        Raises:
            CheckpointError, MissingModelError, NotImplementedError: As `read`.
        """
        file = _require(path)
        model = load(file)
        for row in _others(file, model, nodes_of(file, model)):
            yield row.name, read_external(row, FLOATS[row.type])

    def check(self, shape: tuple[int, int], grid: GridConfig, name: str = "layer") -> None:
        """Refuse grids that are not uniform, and groups that no block divides."""
        if grid.kind not in ("uniform", "q4_0", "q5_0", "q3_k", "q6_k"):
            raise UnrepresentableError(
                f"{name}: MatMulNBits has no place for {grid.kind} grids; take kind uniform, q4_0 or q5_0"
            )
        block_size(-1 if grid.group_size > shape[1] else grid.group_size, name)

    def check_grid(self, name: str, grid: Grid) -> None:
        """Refuse grids that are not uniform."""
        check(grid, name)

    def check_source(self, source: Checkpoint) -> list[str]:
        """See `coded.Format`."""
        require_onnx()
        check_architecture(source.config())
        return []

    def stored_wider(self, bits: int, symmetric: bool = True, group_size: int = -1) -> str:
        """See `coded.Format`."""
        wide = next(width for width in WIDTHS if width >= bits)
        return "" if wide == bits else f"{bits}-bit codes are stored in {wide} bits"

    def space(self, source: Checkpoint, schemes: Mapping[str, Scheme]) -> int:
        """See `coded.Format`."""
        return space(source)

    def write(
        self,
        source: Checkpoint,
        out: Path,
        layers: Iterable[CodedLayer],
        *,
        recipe: Mapping[str, Any] | None = None,
        prove_from: Callable[[], Iterable[CodedLayer]] | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> dict[str, Any]:
        """See `coded.Format`; all weights in one file of external data."""
        self.check_source(source)
        return write_onnx(source, out, layers, recipe=recipe, prove_from=prove_from)

    def rewrite(
        self, path: Path, out: Path, codes: Mapping[str, Tensor], *, finish: Finish | None = None
    ) -> dict[str, Any]:
        """See `coded.Format`."""
        file = _require(path)
        model = load(file)
        stored = {node.name: node for node in nodes_of(file, model)}
        unknown = sorted(set(codes) - set(stored))
        if unknown:
            raise UnrepresentableError(
                f"rewrite: {path} has no quantized layers of these names: {', '.join(unknown[:8])}"
            )
        for name, q in codes.items():
            _check_codes(stored[name], q)
        files = sorted({node.packed.file for node in stored.values()})
        taken = sorted({file, *files, *_external(file, model), *_beside(path)})
        size = sum(entry.stat().st_size for entry in taken)
        check_space(out, size + size // 16)
        with atomic_directory(out) as partial:
            for entry in taken:
                shutil.copyfile(entry, partial / entry.name)
            for name, q in codes.items():
                node = stored[name]
                # A scale of 1 and no zero point: encode packs the codes of the file's own width as they are.
                plain = UniformGrid(
                    node.bits, node.block, True, torch.ones(len(q), -(-q.shape[1] // node.block))
                )
                packed = encode(plain, q.cpu() + offset_of(node), name).packed
                with (partial / node.packed.file.name).open("r+b") as stream:
                    stream.seek(node.packed.start)
                    stream.write(packed.flatten().numpy().data)
            diff = _byte_diff(files, partial, stored)
            if diff["outside"]:
                raise ProofError(f"proof: {diff['outside']} bytes outside the codes changed")
            surprising = sorted(set(diff["layers"]) - set(codes))
            if surprising:
                raise ProofError(
                    f"proof: codes of layers changed that nobody named: {', '.join(surprising[:8])}"
                )
            for layer in self.read(partial / file.name):
                if layer.name in codes and not torch.equal(layer.q, codes[layer.name].cpu()):
                    raise ProofError(f"proof: {layer.name}: the codes read back are not those given")
            coded = {node.packed.name for node in stored.values()}
            rows = [*_parts(stored.values()), *_others(file, load(file), stored.values())]
            return close_rewritten(
                partial,
                {
                    "format": self.name,
                    "refined_from": file_facts(self.name, path, [file, *files]),
                    "byte_diff": diff,
                    "tensors": {
                        row.name: span_row(
                            partial / row.file.name,
                            row.start,
                            row.num_bytes,
                            TYPE_NAMES.get(row.type, str(row.type)),
                            row.shape,
                            row.name not in coded,
                        )
                        for row in sorted(rows, key=lambda row: row.name)
                    },
                },
                finish,
            )


def _external(file: Path, model: Any) -> set[Path]:
    """Files beside a graph that hold its tensors."""
    rows = (row for tensor in model.graph.initializer for row in tensor.external_data)
    names = {row.value for row in rows if row.key == "location" and Path(row.value).name == row.value}
    return {place for name in names if (place := file.parent / name).is_file()}


def _beside(path: Path) -> list[Path]:
    """Everything else in a folder; manifest and proof are of what is replaced. Beside a lone file lie other models."""
    if not path.is_dir():
        return []
    return [
        entry
        for entry in path.iterdir()
        if entry.is_file() and not entry.name.startswith(".") and entry.name not in (MANIFEST, PROOF)
    ]


def _file_of(path: Path) -> Path | None:
    try:
        if path.is_file():
            return path if path.suffix == ".onnx" else None
        files = sorted(path.glob("*.onnx")) if path.is_dir() else []
    except OSError:
        return None
    return files[0] if len(files) == 1 else None


def _parts(nodes: Iterable[Node]) -> Iterator[External]:
    for node in nodes:
        yield from (part for part in (node.packed, node.scales, node.zero_points) if part is not None)


def _others(file: Path, model: Any, nodes: Iterable[Node]) -> Iterator[External]:
    """Floating tensors beside the graph that belong to none of the nodes."""
    used = {part.name for part in _parts(nodes)}
    for tensor in model.graph.initializer:
        if tensor.name not in used and tensor.data_location == 1 and tensor.data_type in FLOATS:
            yield external_of(file, tensor, math.prod(int(size) for size in tensor.dims))


def _require(path: Path) -> Path:
    file = _file_of(path)
    if file is None:
        raise MissingModelError(
            f"{path} is no ONNX model: it must be an .onnx file, or a folder with exactly one"
        )
    return file


def _check_codes(node: Node, q: Tensor) -> None:
    if q.dtype != torch.uint8 or tuple(q.shape) != node.shape:
        raise UnrepresentableError(
            f"rewrite: {node.name} must be uint8 of shape {list(node.shape)}, got {q.dtype} of {list(q.shape)}"
        )
    if q.numel() and int(q.max()) >> node.num_bits:
        raise UnrepresentableError(
            f"rewrite: {node.name}: codes must be below {1 << node.num_bits}, got {int(q.max())}"
        )


def _byte_diff(files: list[Path], after: Path, stored: Mapping[str, Node]) -> dict[str, Any]:
    """Bytes that differ, within the codes of each layer and anywhere else, by position alone."""
    inside: dict[str, int] = {}
    outside = 0
    for file in files:
        left, right = map_file(file), map_file(after / file.name)
        if len(left) != len(right):
            raise ProofError(f"proof: {file.name} has {len(right)} bytes, the original {len(left)}")
        mine = [node for node in stored.values() if node.packed.file == file]
        total, counted = 0, 0
        for start in range(0, len(left), 1 << 24):
            total += int((left[start : start + (1 << 24)] != right[start : start + (1 << 24)]).sum())
            forget_pages(left, right)
        for node in mine:
            span = slice(node.packed.start, node.packed.start + node.packed.num_bytes)
            changed = int((left[span] != right[span]).sum())
            forget_pages(left, right)
            counted += changed
            if changed:
                inside[node.name] = changed
        outside += total - counted
    return {
        "code_bytes": sum(node.packed.num_bytes for node in stored.values()),
        "changed": sum(inside.values()),
        "outside": outside,
        "layers": dict(sorted(inside.items())),
    }


FORMAT: Format = Onnx()
