# SPDX-License-Identifier: Apache-2.0
"""Data of a GGUF file's tensors, kept in a file in the order that they come, until the header can be written.

The experts of a layer come one by one, between other tensors: the first makes room for all of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from discquant.errors import UnrepresentableError
from discquant.formats.gguf_model import Place
from discquant.formats.safetensors_file import tensor_bytes

_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_PIECE = 16 << 20


@dataclass(frozen=True)
class Spooled:
    """A tensor of the file to be.

    Attributes:
        type: Name of its GGUF type.
        shape: Row-major.
        start: First byte in the spool.
        num_bytes: Length of its data.
        sha256: Of its data.
    """

    type: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int
    sha256: str


@dataclass
class _Experts:
    """Room for one matrix of every expert of a layer."""

    type: str
    shape: tuple[int, ...]
    start: int
    size: int
    first: str
    held: set[int] = field(default_factory=set)


def check_same_type(kind: str, name: str, first: str, other: str) -> None:
    """Refuse experts of a layer that GGUF would store in several types: they lie in one tensor.

    Args:
        kind: Type of one of them, or its dtype.
        name: Its name.
        first: Type of another.
        other: The other's name.

    Raises:
        UnrepresentableError: The types differ.
    """
    if kind != first:
        raise UnrepresentableError(
            f"gguf: the experts of a layer lie in one tensor, of one type, and {other} is {first}, {name} is {kind}: "
            "give all of them the same grid, of a kind of GGUF (q4_0, ...)"
        )


class Spool:
    """The file and what lies in it. A context: the file is closed with it."""

    def __init__(self, path: Path, experts: int) -> None:
        """Make the file.

        Args:
            path: Where.
            experts: Of each layer.
        """
        self._path, self._experts = path, experts
        self._stream: Any = None
        self._end = 0
        self._tensors: dict[str, Spooled] = {}
        self._pending: dict[str, _Experts] = {}

    def __enter__(self) -> Spool:
        """Open the file."""
        self._stream = self._path.open("w+b")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._stream.close()

    def put(self, place: Place, kind: str, shape: tuple[int, ...], tensor: Tensor) -> None:
        """Keep a tensor's data.

        Args:
            place: Where it belongs.
            kind: Name of its GGUF type.
            shape: Of the tensor, of one expert's matrix where it is one.
            tensor: The data.

        Raises:
            UnrepresentableError: It is an expert's and of another type or shape than the others of its layer.
        """
        data = tensor_bytes(tensor)
        if place.expert is None:
            self._tensors[place.tensor] = Spooled(
                kind, shape, self._end, len(data), hashlib.sha256(data).hexdigest()
            )
            self._stream.seek(self._end)
            self._stream.write(data)
            self._end += len(data)
            return
        name = f"expert {place.expert} of {place.tensor}"
        room = self._pending.get(place.tensor)
        if room is None:
            room = _Experts(kind, shape, self._end, len(data), name)
            self._pending[place.tensor] = room
            self._end += self._experts * len(data)
        check_same_type(kind, name, room.type, room.first)
        if shape != room.shape:
            raise UnrepresentableError(
                f"gguf: {name} has the shape {list(shape)}, {room.first} {list(room.shape)}"
            )
        self._stream.seek(room.start + place.expert * room.size)
        self._stream.write(data)
        room.held.add(place.expert)

    def put_plain(self, place: Place, name: str, tensor: Tensor) -> None:
        """Keep a tensor as it is.

        Raises:
            UnrepresentableError: No engine reads its dtype, or see `put`.
        """
        if tensor.dtype not in _PLAIN:
            raise UnrepresentableError(
                f"gguf: {name} is {tensor.dtype}, which no engine reads; convert the model"
            )
        self.put(place, _PLAIN[tensor.dtype], tuple(tensor.shape), tensor)

    def close(self) -> dict[str, Spooled]:
        """Return every tensor by its name in the file.

        Raises:
            UnrepresentableError: An expert of a layer did not come.
        """
        self._stream.flush()
        for name, room in self._pending.items():
            missing = sorted(set(range(self._experts)) - room.held)
            if missing:
                raise UnrepresentableError(f"gguf: {name} lacks the experts {missing[:8]} of {self._experts}")
            size = self._experts * room.size
            shape = (self._experts, *room.shape)
            self._tensors[name] = Spooled(room.type, shape, room.start, size, self._digest(room.start, size))
        self._pending.clear()
        return self._tensors

    def _digest(self, start: int, size: int) -> str:
        found = hashlib.sha256()
        self._stream.seek(start)
        while size:
            piece = self._stream.read(min(size, _PIECE))
            found.update(piece)
            size -= len(piece)
        return found.hexdigest()
