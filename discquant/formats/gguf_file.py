# SPDX-License-Identifier: Apache-2.0
"""One GGUF file, read without trusting it: the header is parsed and checked against the file's length on opening.

Own reader because the package's own one takes counts at their word: it loops, allocates or fails in numpy on a damaged
file. Writing goes through the package.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discquant.errors import CheckpointError, MissingModelError, either
from discquant.formats.mapped import forget_pages, map_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Block columns and bytes of every type that a file may hold; only some are decoded.
SIZES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
NUMBERS = {name: number for number, (name, _, _) in SIZES.items()}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Far above any vocabulary; a longer list is a damaged count, and each entry costs Python memory.
_MAX_LIST = 1 << 22
_MAX_KEY = 1 << 16
_MAX_DIMENSIONS = 4
_MAX_SIZE = 1 << 40


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        name: As the file spells it.
        type: Name of its GGUF type.
        shape: Row-major, [.., columns], the reverse of the file's order.
        start: First byte in the file.
        num_bytes: Length of its data.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def part(self, number: int | None) -> GgufTensor:
        """One entry of the first dimension as a tensor of its own; the tensor itself for None."""
        if number is None:
            return self
        size = self.num_bytes // self.shape[0]
        return GgufTensor(self.name, self.type, self.shape[1:], self.start + number * size, size)


class GgufFile:
    """The header of one file.

    Attributes:
        path: The file.
        metadata: Values by key; arrays as lists.
        tensors: Every tensor by name, in file order.
        size: Bytes of the file.

    Raises:
        MissingModelError: There is no such file.
        CheckpointError: It is no GGUF file, truncated, or corrupt; the message says where.
        NotImplementedError: A version, byte order or split that is not read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise MissingModelError(f"{self.path} is no model: there is no such file")
        self.size = self.path.stat().st_size
        if self.size < 24:
            raise CheckpointError(f"{self.path}: truncated: {self.size} bytes cannot hold a GGUF header")
        with self.path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
            cursor = _Cursor(self.path, view)
            self._read_header(cursor)

    def _read_header(self, cursor: _Cursor) -> None:
        if cursor.take(4) != MAGIC:
            raise CheckpointError(f"{self.path}: no GGUF file: it does not begin with GGUF")
        version = cursor.number("I")
        if version not in VERSIONS:
            if version & 0xFFFF == 0 and version:
                raise NotImplementedError(f"{self.path}: a big-endian GGUF file is not read")
            raise CheckpointError(
                f"{self.path}: GGUF version {version} is none of those that are read: {either(VERSIONS)}"
            )
        tensor_count, entry_count = cursor.number("Q"), cursor.number("Q")
        # The least that an entry takes: a length, a type and a byte; a name length, dimensions, type and offset.
        for what, count, least in (("metadata entries", entry_count, 13), ("tensors", tensor_count, 24)):
            if count * least > self.size:
                raise CheckpointError(
                    f"{self.path}: corrupt: {count} {what} do not fit into {self.size} bytes"
                )
        self.metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = cursor.text(_MAX_KEY)
            if key in self.metadata:
                raise CheckpointError(f"{self.path}: corrupt: {key!r} occurs twice")
            self.metadata[key] = cursor.value(cursor.number("I"), key)
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise NotImplementedError(
                f"{self.path}: one part of a split model; merge it with llama-gguf-split --merge"
            )
        entries = [self._entry(cursor) for _ in range(tensor_count)]
        self._place(entries, cursor.at)

    def _entry(self, cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int, int]:
        name = cursor.text(_MAX_KEY)
        dimensions = cursor.number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise CheckpointError(f"{self.path}: corrupt: {name!r} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        number, offset = cursor.number("I"), cursor.number("Q")
        if number not in SIZES:
            raise CheckpointError(f"{self.path}: {name!r} has the unknown type {number}")
        if not all(0 < size < _MAX_SIZE for size in shape):
            raise CheckpointError(f"{self.path}: corrupt: {name!r} has the shape {list(shape)}")
        kind, columns, size = SIZES[number]
        if shape[-1] % columns:
            raise CheckpointError(
                f"{self.path}: corrupt: rows of {name!r} have {shape[-1]} columns, no multiple of {columns} ({kind})"
            )
        return name, kind, shape, offset, math.prod(shape) // columns * size

    def _place(self, entries: list[tuple[str, str, tuple[int, ...], int, int]], end: int) -> None:
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: corrupt: general.alignment is {alignment!r}")
        self.data_start = -(-end // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for name, kind, shape, offset, length in entries:
            start = self.data_start + offset
            if offset % alignment:
                raise CheckpointError(
                    f"{self.path}: corrupt: {name!r} begins at {offset}, not aligned to {alignment}"
                )
            if start + length > self.size:
                raise CheckpointError(
                    f"{self.path}: truncated or corrupt: {name!r} ends at byte {start + length}, "
                    f"the file at {self.size}"
                )
            if name in self.tensors:
                raise CheckpointError(f"{self.path}: corrupt: tensor {name!r} occurs twice")
            self.tensors[name] = GgufTensor(name, kind, shape, start, length)
        last = None
        for tensor in sorted(self.tensors.values(), key=lambda row: (row.start, row.num_bytes)):
            if last is not None and tensor.start < last.start + last.num_bytes:
                raise CheckpointError(f"{self.path}: corrupt: {tensor.name!r} overlaps {last.name!r}")
            last = tensor

    def raw(self, name: str, part: int | None = None) -> Tensor:
        """The bytes of a tensor in memory of its own, uint8, [rows, bytes of a row].

        Args:
            name: Of the tensor.
            part: Read this entry of its first dimension alone.

        Raises:
            CheckpointError: The file became shorter since it was opened.
        """
        tensor = self.tensors[name].part(part)
        data = bytearray(tensor.num_bytes)
        with self.path.open("rb") as stream:
            stream.seek(tensor.start)
            if stream.readinto(data) != tensor.num_bytes:
                raise CheckpointError(f"{self.path}: the file became shorter while it was read")
        rows = math.prod(tensor.shape[:-1])
        if not tensor.num_bytes:
            return torch.zeros((rows, 0), dtype=torch.uint8)
        return torch.frombuffer(data, dtype=torch.uint8).reshape(rows, -1)

    def plain(self, name: str, part: int | None = None) -> Tensor:
        """A tensor as numbers, in its own dtype or, where it is quantized, decoded to float32 by the gguf package.

        Args:
            name: Of the tensor.
            part: Read this entry of its first dimension alone.

        Raises:
            NotImplementedError: The package does not decode its type.
        """
        tensor, raw = self.tensors[name].part(part), self.raw(name, part)
        if tensor.type in PLAIN:
            return raw.flatten().view(PLAIN[tensor.type]).reshape(tensor.shape)
        import gguf

        try:
            values = gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType(NUMBERS[tensor.type]))
        except (NotImplementedError, ValueError) as cause:
            raise NotImplementedError(
                f"{self.path}: {name} has type {tensor.type}, which is not decoded"
            ) from cause
        return torch.from_numpy(np.ascontiguousarray(values)).float().reshape(tensor.shape)

    def integer(self, key: str, low: int = 0, high: int = 1 << 31) -> int:
        """A metadata entry that must be an integer in [low, high).

        Raises:
            CheckpointError: It is missing or something else.
        """
        value = self.metadata.get(key)
        if type(value) is not int or not low <= value < high:
            raise CheckpointError(
                f"{self.path}: metadata {key} must be an integer from {low}, got {value!r}"[:300]
            )
        return value


class _Cursor:
    """Reads from the front, and never past the end."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.path, self.view, self.at = path, view, 0

    def take(self, count: int) -> bytes:
        if count > len(self.view) - self.at:
            raise CheckpointError(
                f"{self.path}: truncated or corrupt: the header wants {count} bytes at {self.at}, "
                f"the file has {len(self.view)}"
            )
        found = self.view[self.at : self.at + count]
        self.at += count
        return found

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self, limit: int | None = None) -> str:
        length = self.number("Q")
        if limit is not None and length > limit:
            raise CheckpointError(f"{self.path}: corrupt: a name of {length} bytes at {self.at}")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as cause:
            raise CheckpointError(f"{self.path}: corrupt: text at {self.at} is no UTF-8") from cause

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path}: corrupt: {key!r} has the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if count > _MAX_LIST:
            raise CheckpointError(f"{self.path}: corrupt: {key!r} claims {count} entries")
        if inner == _STRING:
            return [self.text() for _ in range(count)]
        if inner not in _SCALARS:
            raise CheckpointError(f"{self.path}: corrupt: {key!r} is a list of the unknown type {inner}")
        code = _SCALARS[inner]
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}"))))


def byte_diff(
    before: GgufFile,
    after: GgufFile,
    codes: Mapping[str, tuple[tuple[int, int], ...]],
    block: Mapping[str, int],
) -> dict[str, Any]:
    """Compare two files byte by byte, by position alone.

    Args:
        before: The original.
        after: Its rewritten copy.
        codes: Byte ranges within a block that may differ, by tensor.
        block: Bytes of a block, by tensor.

    Returns:
        `code_bytes` (all bytes that hold codes), `changed` of them, `tensors` (changed per tensor), `outside`: bytes
        that differ anywhere else, lengths included.
    """
    outside, total = abs(before.size - after.size), 0
    inside: dict[str, int] = {}
    spans = sorted((before.tensors[name].start, before.tensors[name].num_bytes, name) for name in codes)
    left, right = map_file(before.path), map_file(after.path)
    shorter = min(before.size, after.size)
    at = 0
    for start, length, name in spans:
        outside += _count_changed(left, right, at, start)
        for first, last in _pieces(start, min(start + length, shorter), block[name]):
            changed = (left[first:last] != right[first:last]).reshape(-1, block[name])
            found = sum(int(changed[:, low:high].sum()) for low, high in codes[name])
            outside += int(changed.sum()) - found
            if found:
                inside[name] = inside.get(name, 0) + found
        total += length // block[name] * sum(high - low for low, high in codes[name])
        forget_pages(left, right)
        at = start + length
    outside += _count_changed(left, right, at, shorter)
    return {"code_bytes": total, "changed": sum(inside.values()), "outside": outside, "tensors": inside}


def _pieces(start: int, stop: int, block: int) -> Iterator[tuple[int, int]]:
    step = max(1, (1 << 24) // block) * block
    for first in range(start, stop, step):
        yield first, min(stop, first + step)


def _count_changed(left: Any, right: Any, start: int, stop: int) -> int:
    found = 0
    for a, b in _pieces(start, stop, 1):
        found += int((left[a:b] != right[a:b]).sum())
        forget_pages(left, right)
    return found
