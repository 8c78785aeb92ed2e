# SPDX-License-Identifier: Apache-2.0
"""The MatMulNBits nodes of one ONNX file, read without trusting it.

Everything a graph claims about its external data is checked against the lengths of the files before memory is taken.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discquant.errors import CheckpointError, ExtensionError, MissingModelError
from discquant.formats.coded import CodedLayer
from discquant.formats.onnx_blocks import WIDTHS, decode
from discquant.grids import UniformGrid

# A protobuf message cannot be longer, so a longer file is none.
_MAX_GRAPH = 2**31 - 1
_MAX_COUNT = 1 << 40
FLOATS = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}
_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2}
_UINT8 = 2
FILE, DATA = "model.onnx", "model.onnx.data"
WIDENED = "discquant.widened"
TYPE_NAMES = {1: "F32", 2: "U8", 10: "F16", 16: "BF16"}


@dataclass(frozen=True)
class External:
    """Where an initializer's bytes lie."""

    name: str
    type: int
    shape: tuple[int, ...]
    file: Path
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Node:
    """One MatMulNBits node, checked against the lengths of its files."""

    name: str
    shape: tuple[int, int]
    bits: int
    block: int
    narrow: int | None
    packed: External
    scales: External
    zero_points: External | None

    @property
    def group_size(self) -> int:
        """Columns per scale, -1 for the row: one block covers it."""
        return -1 if self.block >= self.shape[1] else self.block

    @property
    def num_bits(self) -> int:
        """Width of the codes that were solved, before they were widened."""
        return self.narrow or self.bits

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        zero = 0 if self.zero_points is None else self.zero_points.num_bytes
        return self.packed.num_bytes + self.scales.num_bytes + zero


def require_onnx() -> None:
    """See that the onnx package is there.

    Raises:
        ExtensionError: It is not; the message says how to install it.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as cause:
        raise ExtensionError("the onnx package is not installed: pip install 'discquant[onnx]'") from cause


def load(file: Path) -> Any:
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


def nodes_of(file: Path, model: Any) -> Iterator[Node]:
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
            found.append(external_of(file, initializers[key], count))
        packed, scales = found
        zero = None
        if inputs[3]:
            if inputs[3] not in initializers:
                raise CheckpointError(f"{label}: its input {inputs[3]!r} is no initializer")
            if initializers[inputs[3]].data_type != _UINT8:
                raise NotImplementedError(f"{label}: zero points that are no codes are not read")
            zero = external_of(file, initializers[inputs[3]], rows * -(-blocks * bits // 8))
        if packed.type != _UINT8 or scales.type not in FLOATS:
            raise CheckpointError(f"{label}: codes must be uint8 and scales floating")
        name = _module(node.name, inputs[1])
        if name in seen:
            raise CheckpointError(f"{label}: a second node of the name {name!r}")
        seen.add(name)
        kept = narrow.get(name)
        if kept is not None and not 2 <= kept < bits:
            raise CheckpointError(f"{label}: {kept} bits cannot have been widened to {bits}")
        yield Node(name, (rows, columns), bits, block, kept, packed, scales, zero)


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


def external_of(file: Path, tensor: Any, count: int) -> External:
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
    return External(tensor.name, tensor.data_type, shape, place, start, length)


def read_external(row: External, dtype: torch.dtype) -> Tensor:
    """An initializer in memory of its own.

    Raises:
        CheckpointError: The file became shorter since it was looked at.
    """
    data = bytearray(row.num_bytes)
    with row.file.open("rb") as stream:
        stream.seek(row.start)
        if stream.readinto(data) != row.num_bytes:
            raise CheckpointError(f"{row.file}: the file became shorter while it was read")
    return torch.frombuffer(data, dtype=dtype).reshape(row.shape)


def offset_of(node: Node) -> int:
    """What was added to the codes of a symmetric layer when they were widened."""
    if node.narrow is None or node.zero_points is not None:
        return 0
    return int(2 ** (node.bits - 1) - 2 ** (node.narrow - 1))


def layer_of(node: Node) -> CodedLayer:
    """Codes and grid of a node, as narrow as they were solved.

    Raises:
        CheckpointError: The tensors hold no grid, or codes wider than the file says they were.
    """
    rows, columns = node.shape
    blocks = -(-columns // node.block)
    packed = read_external(node.packed, torch.uint8).reshape(rows, blocks, -1)
    zero = None if node.zero_points is None else read_external(node.zero_points, torch.uint8)
    scales = read_external(node.scales, FLOATS[node.scales.type])
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
    offset, limit = offset_of(node), 1 << node.narrow
    if q.numel() and (int(q.min()) < offset or int(q.max()) >= limit + offset):
        raise CheckpointError(
            f"{node.packed.file}: {node.name} holds codes that {node.narrow} bits cannot have had"
        )
    return CodedLayer(
        node.name,
        q - offset,
        UniformGrid(node.narrow, node.group_size, grid.symmetric, grid.scale, grid.zero_point),
    )
