# SPDX-License-Identifier: Apache-2.0
"""ONNX behind the interface of all formats: a decoder that ONNX Runtime executes, its linear layers MatMulNBits.

A written folder holds `model.onnx`, the weights in `model.onnx.data`, configuration, tokenizer, manifest, proof, card.
Read are MatMulNBits nodes of any file whose weights lie in external data.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discquant import environment
from discquant.config import GridConfig
from discquant.errors import (
    CheckpointError,
    ExtensionError,
    MissingModelError,
    ProofError,
    UnrepresentableError,
)
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import DEFAULT_SHARD_BYTES, CodedLayer, Description, Format, LayerFacts
from discquant.formats.onnx_blocks import WIDTHS, block_size, check, decode, encode
from discquant.formats.onnx_graph import check_architecture
from discquant.formats.output import atomic_directory, check_space
from discquant.formats.rewrite import MANIFEST, PROOF, digest
from discquant.grids import Grid, UniformGrid

FILE, DATA = "model.onnx", "model.onnx.data"
# A protobuf message cannot be longer, so a longer file is none.
_MAX_GRAPH = 2**31 - 1
_MAX_COUNT = 1 << 40
_FLOATS = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}
_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2}
_UINT8 = 2
WIDENED = "discquant.widened"


@dataclass(frozen=True)
class _External:
    """Where an initializer's bytes lie."""

    name: str
    type: int
    shape: tuple[int, ...]
    file: Path
    start: int
    num_bytes: int


@dataclass(frozen=True)
class _Node:
    """One MatMulNBits node, checked against the lengths of its files."""

    name: str
    shape: tuple[int, int]
    bits: int
    block: int
    narrow: int | None
    packed: _External
    scales: _External
    zero_points: _External | None

    @property
    def num_bits(self) -> int:
        """Width of the codes that were solved, before they were widened."""
        return self.narrow or self.bits

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        zero = 0 if self.zero_points is None else self.zero_points.num_bytes
        return self.packed.num_bytes + self.scales.num_bytes + zero


class Onnx:
    """See `coded.Format`."""

    name = "onnx"

    def detects(self, path: Path) -> bool:
        """Whether it is an .onnx file, or a folder with exactly one."""
        return _file_of(path) is not None

    def describe(self, path: Path) -> Description:
        """See `coded.Format`."""
        file = _require(path)
        nodes = list(_nodes(file, _load(file)))
        rows = [
            LayerFacts(
                node.name,
                node.shape,
                f"int{node.num_bits}",
                node.num_bits,
                node.block,
                node.zero_points is None,
                node.num_bytes,
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
        for node in _nodes(file, _load(file)):
            yield _layer(node)

    def plain_tensors(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        """Every other floating tensor beside the graph, by its name there (in our files that of transformers).

        Raises:
            CheckpointError, MissingModelError, NotImplementedError: As `read`.
        """
        file = _require(path)
        model = _load(file)
        used = {
            part.name
            for node in _nodes(file, model)
            for part in (node.packed, node.scales, node.zero_points)
            if part is not None
        }
        for tensor in model.graph.initializer:
            if tensor.name not in used and tensor.data_location == 1 and tensor.data_type in _FLOATS:
                count = math.prod(int(size) for size in tensor.dims)
                row = _external(file, tensor, count)
                yield tensor.name, _tensor(row, _FLOATS[row.type])

    def check(self, shape: tuple[int, int], grid: GridConfig, name: str = "layer") -> None:
        """Refuse grids that are not uniform, and groups that no block divides."""
        if grid.kind not in ("uniform", "q4_0", "q3_k"):
            raise UnrepresentableError(
                f"{name}: MatMulNBits has no place for {grid.kind} grids; take kind uniform, or q4_0"
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

    def write(
        self,
        source: Checkpoint,
        out: Path,
        layers: Iterable[CodedLayer],
        *,
        recipe: Mapping[str, Any] | None = None,
        ignore: Iterable[str] = ("lm_head",),
        prove_from: Callable[[], Iterable[CodedLayer]] | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> dict[str, Any]:
        """See `coded.Format`; all weights in one file of external data."""
        from discquant.formats.onnx_write import write_onnx

        self.check_source(source)
        return write_onnx(source, out, layers, recipe=recipe, prove_from=prove_from)

    def rewrite(self, path: Path, out: Path, codes: Mapping[str, Tensor]) -> dict[str, Any]:
        """See `coded.Format`."""
        file = _require(path)
        stored = {node.name: node for node in _nodes(file, _load(file))}
        unknown = sorted(set(codes) - set(stored))
        if unknown:
            raise UnrepresentableError(
                f"rewrite: {path} has no quantized layers of these names: {', '.join(unknown[:8])}"
            )
        for name, q in codes.items():
            _check_codes(stored[name], q)
        files = sorted({node.packed.file for node in stored.values()})
        size = sum(entry.stat().st_size for entry in {*files, file})
        check_space(out, size + size // 16)
        with atomic_directory(out) as partial:
            for entry in sorted(file.parent.iterdir()):
                if entry.is_file() and not entry.name.startswith(".") and entry.name not in (MANIFEST, PROOF):
                    shutil.copyfile(entry, partial / entry.name)
            for name, q in codes.items():
                node = stored[name]
                # A scale of 1 and no zero point: encode packs the codes of the file's own width as they are.
                plain = UniformGrid(
                    node.bits, node.block, True, torch.ones(len(q), -(-q.shape[1] // node.block))
                )
                packed = encode(plain, q.cpu() + _offset(node), name).packed
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
            manifest = {
                "manifest_version": 2,
                "format": self.name,
                "rewritten": True,
                "versions": environment.versions(),
                "source": {"name": path.resolve().name, "sha256": digest(file)},
                "byte_diff": diff,
                "files": {
                    entry.name: {"sha256_before": digest(entry), "sha256": digest(partial / entry.name)}
                    for entry in [file, *files]
                },
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        return manifest


def require_onnx() -> None:
    """See that the onnx package is there.

    Raises:
        ExtensionError: It is not; the message says how to install it.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as cause:
        raise ExtensionError("the onnx package is not installed: pip install 'discquant[onnx]'") from cause


def _file_of(path: Path) -> Path | None:
    try:
        if path.is_file():
            return path if path.suffix == ".onnx" else None
        files = sorted(path.glob("*.onnx")) if path.is_dir() else []
    except OSError:
        return None
    return files[0] if len(files) == 1 else None


def _require(path: Path) -> Path:
    file = _file_of(path)
    if file is None:
        raise MissingModelError(
            f"{path} is no ONNX model: it must be an .onnx file, or a folder with exactly one"
        )
    return file


def _load(file: Path) -> Any:
    """The graph, without the weights beside it.

    Raises:
        CheckpointError: It is no ONNX file.
    """
    require_onnx()
    import onnx
    from google.protobuf.message import DecodeError

    size = file.stat().st_size
    if not 0 < size <= _MAX_GRAPH:
        raise CheckpointError(f"{file}: {size} bytes are no ONNX graph")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except (DecodeError, ValueError, RuntimeError) as cause:
        raise CheckpointError(f"{file}: no ONNX file, or a damaged one: {cause}") from cause
    if not model.graph.node:
        raise CheckpointError(f"{file}: no ONNX file, or a damaged one: its graph is empty")
    _check_text(file, model)
    return model


def _check_text(file: Path, model: Any) -> None:
    """Refuse names that are no UTF-8: protobuf hands those out as bytes, or fails when they are asked for."""
    try:
        texts = [entry.key for entry in model.metadata_props] + [
            entry.value for entry in model.metadata_props
        ]
        for node in model.graph.node:
            texts += [node.name, node.op_type, *node.input, *(row.name for row in node.attribute)]
        for tensor in model.graph.initializer:
            texts += [tensor.name, *(part for row in tensor.external_data for part in (row.key, row.value))]
        sound = all(isinstance(text, str) for text in texts)
    except UnicodeError:
        sound = False
    if not sound:
        raise CheckpointError(f"{file}: a damaged ONNX file: a name in it is no UTF-8")


def _nodes(file: Path, model: Any) -> Iterator[_Node]:
    """Every MatMulNBits node.

    Raises:
        CheckpointError: An attribute or tensor is missing or contradicts another, or external data is not there.
        NotImplementedError: Weights lie in the graph, codes are not 2, 4 or 8 bits wide, or columns are permuted.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    narrow = _widened(file, model)
    seen: set[str] = set()
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        label = f"{file}: node {node.name!r}"
        try:
            values = {row.name: int(row.i) for row in node.attribute}
            columns, rows, bits, block = (values[key] for key in ("K", "N", "bits", "block_size"))
        except KeyError as cause:
            raise CheckpointError(f"{label}: the attribute {cause} is missing") from cause
        if bits not in WIDTHS:
            raise NotImplementedError(f"{label}: codes of {bits} bits are not read")
        if not (0 < rows < _MAX_COUNT and 0 < columns < _MAX_COUNT and 16 <= block <= 1 << 16) or block & (
            block - 1
        ):
            raise CheckpointError(f"{label}: K = {columns}, N = {rows}, block_size = {block} make no layer")
        inputs = [*node.input, *[""] * 6]
        if inputs[4]:
            raise NotImplementedError(f"{label}: permuted columns (g_idx) are not read")
        blocks = -(-columns // block)
        found = []
        for key, count in ((inputs[1], rows * blocks * (block * bits // 8)), (inputs[2], rows * blocks)):
            if key not in initializers:
                raise CheckpointError(f"{label}: its input {key!r} is no initializer")
            found.append(_external(file, initializers[key], count))
        packed, scales = found
        zero = None
        if inputs[3]:
            if inputs[3] not in initializers:
                raise CheckpointError(f"{label}: its input {inputs[3]!r} is no initializer")
            if initializers[inputs[3]].data_type != _UINT8:
                raise NotImplementedError(f"{label}: zero points that are no codes are not read")
            zero = _external(file, initializers[inputs[3]], rows * -(-blocks * bits // 8))
        if packed.type != _UINT8 or scales.type not in _FLOATS:
            raise CheckpointError(f"{label}: codes must be uint8 and scales floating")
        name = _module(node.name, inputs[1])
        if name in seen:
            raise CheckpointError(f"{label}: a second node of the name {name!r}")
        seen.add(name)
        kept = narrow.get(name)
        if kept is not None and not 2 <= kept < bits:
            raise CheckpointError(f"{label}: {kept} bits cannot have been widened to {bits}")
        yield _Node(name, (rows, columns), bits, block, kept, packed, scales, zero)


def _module(node: str, codes: str) -> str:
    """Module path of a node: ours are named by it; onnxruntime-genai's `/model/layers.0/attn/q_proj/..` are known."""
    match = re.search(r"layers[./](\d+)[./](?:self_)?(attn|mlp)[./](\w+_proj)", node or codes)
    if match:
        part = "self_attn" if match[2] == "attn" else "mlp"
        return f"model.layers.{int(match[1])}.{part}.{match[3]}"
    return "lm_head" if "lm_head" in (node or codes) else (node or codes)


def _widened(file: Path, model: Any) -> dict[str, int]:
    """Original width of codes that were widened, by module, as the writer noted it."""
    for entry in model.metadata_props:
        if entry.key == WIDENED:
            try:
                found = json.loads(entry.value)
            except (ValueError, RecursionError) as cause:
                raise CheckpointError(f"{file}: {WIDENED} is no JSON") from cause
            if not isinstance(found, dict) or not all(type(bits) is int for bits in found.values()):
                raise CheckpointError(f"{file}: {WIDENED} must map modules to widths")
            return found
    return {}


def _external(file: Path, tensor: Any, count: int) -> _External:
    """An initializer's place in its data file, checked against the file's length."""
    label = f"{file}: {tensor.name!r}"
    shape = tuple(int(size) for size in tensor.dims)
    if any(size < 1 for size in shape) or math.prod(shape) != count:
        raise CheckpointError(f"{label} must have {count} elements, got shape {list(shape)[:8]}")
    if tensor.data_type not in _BYTES:
        raise CheckpointError(f"{label} has the type {tensor.data_type}, which is not read")
    if tensor.data_location != 1:
        raise NotImplementedError(
            f"{label}: weights inside the graph are not read; save it with external data"
        )
    entries = {row.key: row.value for row in tensor.external_data}
    location, size = entries.get("location", ""), count * _BYTES[tensor.data_type]
    # The name comes from the file: it must not lead out of the folder.
    if not 0 < len(location.encode()) <= 255 or Path(location).name != location or "\0" in location:
        raise CheckpointError(f"{label}: {location[:80]!r} is no file name in this folder")
    place = file.parent / location
    try:
        start, length = int(entries.get("offset", "0")), int(entries.get("length", size))
    except ValueError as cause:
        raise CheckpointError(f"{label}: offset and length must be numbers") from cause
    if not place.is_file():
        raise MissingModelError(f"{file.parent} is incomplete: {location[:80]!r} is missing")
    if length != size or start < 0 or start + length > place.stat().st_size:
        raise CheckpointError(
            f"{label}: {length} bytes at {start} of {location}, which has {place.stat().st_size}; {size} are needed"
        )
    return _External(tensor.name, tensor.data_type, shape, place, start, length)


def _tensor(row: _External, dtype: torch.dtype) -> Tensor:
    data = bytearray(row.num_bytes)
    with row.file.open("rb") as stream:
        stream.seek(row.start)
        if stream.readinto(data) != row.num_bytes:
            raise CheckpointError(f"{row.file}: the file became shorter while it was read")
    return torch.frombuffer(data, dtype=dtype).reshape(row.shape)


def _offset(node: _Node) -> int:
    if node.narrow is None or node.zero_points is not None:
        return 0
    return int(2 ** (node.bits - 1) - 2 ** (node.narrow - 1))


def _layer(node: _Node) -> CodedLayer:
    rows, columns = node.shape
    blocks = -(-columns // node.block)
    packed = _tensor(node.packed, torch.uint8).reshape(rows, blocks, -1)
    zero = None if node.zero_points is None else _tensor(node.zero_points, torch.uint8)
    scales = _tensor(node.scales, _FLOATS[node.scales.type])
    q, grid = decode(
        packed,
        scales,
        zero,
        bits=node.bits,
        block=node.block,
        columns=columns,
        name=f"{node.packed.file}: {node.name}",
    )
    if node.narrow is None:
        return CodedLayer(node.name, q, grid)
    offset, limit = _offset(node), 1 << node.narrow
    if q.numel() and (int(q.min()) < offset or int(q.max()) >= limit + offset):
        raise CheckpointError(
            f"{node.packed.file}: {node.name} holds codes that {node.narrow} bits cannot have had"
        )
    return CodedLayer(
        node.name,
        q - offset,
        UniformGrid(node.narrow, node.block, grid.symmetric, grid.scale, grid.zero_point),
    )


def _check_codes(node: _Node, q: Tensor) -> None:
    if q.dtype != torch.uint8 or tuple(q.shape) != node.shape:
        raise UnrepresentableError(
            f"rewrite: {node.name} must be uint8 of shape {list(node.shape)}, got {q.dtype} of {list(q.shape)}"
        )
    if q.numel() and int(q.max()) >> node.num_bits:
        raise UnrepresentableError(
            f"rewrite: {node.name}: codes must be below {1 << node.num_bits}, got {int(q.max())}"
        )


def _byte_diff(files: list[Path], after: Path, stored: Mapping[str, _Node]) -> dict[str, Any]:
    """Bytes that differ, within the codes of each layer and anywhere else, by position alone."""
    inside: dict[str, int] = {}
    outside = 0
    for file in files:
        left = np.memmap(file, dtype=np.uint8, mode="r")
        right = np.memmap(after / file.name, dtype=np.uint8, mode="r")
        if len(left) != len(right):
            raise ProofError(f"proof: {file.name} has {len(right)} bytes, the original {len(left)}")
        mine = [node for node in stored.values() if node.packed.file == file]
        total, counted = 0, 0
        for start in range(0, len(left), 1 << 24):
            total += int((left[start : start + (1 << 24)] != right[start : start + (1 << 24)]).sum())
        for node in mine:
            span = slice(node.packed.start, node.packed.start + node.packed.num_bytes)
            changed = int((left[span] != right[span]).sum())
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
