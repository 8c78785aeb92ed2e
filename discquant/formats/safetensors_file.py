# SPDX-License-Identifier: Apache-2.0
"""One safetensors file, read without trusting it: the whole header is validated before any tensor is.

Own reader because three things are needed that the library hides: byte ranges for byte-for-byte copies, a message that
names file and defect, and no memory map that outlives the call.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discquant.errors import CheckpointError

# Bits per element of every dtype that the format defines.
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "C64": torch.complex64, "F64": torch.float64,
    "I64": torch.int64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# The limit of the reference implementation; a larger number is a corrupt file, not a large model.
MAX_HEADER_BYTES = 100_000_000
# More dimensions, or a longer one, than any tensor has: torch would fail on them in ways that name no file.
MAX_RANK, MAX_DIMENSION = 16, 1 << 48
_CHUNK = 16 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `dtype` as the format spells it, byte range [start, stop) of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Length of its data."""
        return self.stop - self.start

    def entry(self, index: int) -> TensorInfo:
        """Return where one entry of the first dimension lies."""
        size = self.num_bytes // self.shape[0]
        start = self.start + index * size
        return TensorInfo(self.name, self.file, self.dtype, self.shape[1:], start, start + size)


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Validate a file by its header and length alone.

    Returns:
        Tensors by name in the order of their data, and the file's own metadata.

    Raises:
        CheckpointError: The file is truncated, its header is no valid JSON of the format, a tensor's length does not
            fit its shape, or byte ranges overlap, leave holes or pass the end of the file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{file}: truncated: {size} bytes cannot hold a safetensors header")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise CheckpointError(
                f"{file}: truncated or no safetensors file: the header claims {length} bytes, the file has {size}"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as cause:
        raise CheckpointError(f"{file}: corrupt header: {cause}") from cause
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file}: corrupt header: __metadata__ must be an object")
    tensors = [_tensor(file, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.start, info.stop))
    end = 8 + length
    for info in tensors:
        if info.start != end:
            defect = "overlaps the one before it" if info.start < end else "leaves a hole before it"
            raise CheckpointError(f"{file}: corrupt header: the data of {info.name} {defect}")
        end = info.stop
    if end != size:
        raise CheckpointError(
            f"{file}: {'truncated' if end > size else 'corrupt'}: the tensors end at byte {end}, the file at {size}"
        )
    return {info.name: info for info in tensors}, metadata


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor in memory of its own, on the CPU.

    Raises:
        NotImplementedError: torch has no dtype for it.
        CheckpointError: The file became shorter since its header was read.
    """
    dtype = TORCH_DTYPES.get(info.dtype)
    if dtype is None:
        raise NotImplementedError(
            f"{info.file}: {info.name} has dtype {info.dtype}, which is copied but not decoded"
        )
    if info.num_bytes == 0:
        return torch.empty(info.shape, dtype=dtype)
    data = bytearray(info.num_bytes)
    with info.file.open("rb") as stream:
        stream.seek(info.start)
        if stream.readinto(data) != info.num_bytes:
            raise CheckpointError(f"{info.file}: the file became shorter while it was read")
    return torch.frombuffer(data, dtype=dtype).reshape(info.shape)


def read_bytes(info: TensorInfo) -> Iterator[bytes]:
    """The stored bytes of a tensor, in pieces of bounded size.

    Raises:
        CheckpointError: The file became shorter since its header was read.
    """
    left = info.num_bytes
    with info.file.open("rb") as stream:
        stream.seek(info.start)
        while left:
            piece = stream.read(min(left, _CHUNK))
            if not piece:
                raise CheckpointError(f"{info.file}: the file became shorter while it was read")
            left -= len(piece)
            yield piece


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as the format stores them (contiguous, little-endian)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def encode_header(entries: dict[str, Any]) -> bytes:
    """Length prefix and JSON, padded with spaces so that the data begins at a multiple of eight."""
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensor(file: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = all(type(number) is int and number >= 0 for number in (*shape, start, stop)) and start <= stop
        sound = sound and len(shape) <= MAX_RANK and all(number <= MAX_DIMENSION for number in shape)
        name.encode()  # half a surrogate pair cannot be written again
        sound = sound and isinstance(dtype, str)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file}: corrupt header: the entry of {name} is malformed")
    if dtype not in DTYPE_BITS:
        raise CheckpointError(f"{file}: corrupt header: {name} has the unknown dtype {dtype!r}")
    expected = -(-math.prod(shape) * DTYPE_BITS[dtype] // 8)
    if stop - start != expected:
        raise CheckpointError(
            f"{file}: corrupt header: {name} ({dtype}, {shape}) must have {expected} bytes, got {stop - start}"
        )
    return TensorInfo(name, file, dtype, tuple(shape), base + start, base + stop)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} occurs twice")
        found[key] = value
    return found
