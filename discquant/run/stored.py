# SPDX-License-Identifier: Apache-2.0
"""Tensors in a run's own files: written one at a time, read one at a time, so that no file is ever in memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from discquant.errors import CheckpointError, DiskSpaceError
from discquant.formats.output import FULL, sync_path
from discquant.formats.safetensors_file import (
    DTYPE_BITS,
    DTYPE_NAMES,
    encode_header,
    read_header,
    read_tensor,
    tensor_bytes,
)

DIGESTS = "sha256"  # in a header: digest of each tensor by name
Given = Tensor | Callable[[], Tensor]


def _made(given: Given) -> Tensor:
    return given if isinstance(given, Tensor) else given()


@contextlib.contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Tell a full disk as what it is, and what there was no room for.

    Raises:
        DiskSpaceError: The disk is full, a quota used up, or a file larger than the system lets it be.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DiskSpaceError(
            f"{error.filename or path}: no room to write it ({error.strerror}); make room and give the same command "
            "again, which continues"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file to write beside `path`: it takes that place when the block ends, and vanishes when it raises.

    Raises:
        DiskSpaceError: See `room_for`; the file that was there stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with room_for(path):
            yield temporary
            sync_path(temporary)
            temporary.replace(path)
            sync_path(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_tensors_atomic(path: Path, tensors: Mapping[str, Given], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; the same content gives the same bytes, those of the library.

    Args:
        path: The file.
        tensors: By name; a function is called twice, for shape and for content, and its result is not kept.
        metadata: Strings of the header.

    Raises:
        DiskSpaceError: There is no room; the file that was there stays.
    """
    facts: dict[str, tuple[torch.dtype, list[int]]] = {}
    for name, given in tensors.items():
        tensor = _made(given)
        facts[name] = (tensor.dtype, list(tensor.shape))
        del tensor
    # In the library's order, wide elements first: a view into the file is aligned.
    rank = {kind: -place for place, kind in enumerate(DTYPE_BITS)}
    names = sorted(facts, key=lambda name: (rank[DTYPE_NAMES[facts[name][0]]], name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        dtype, shape = facts[name]
        begin, kind = end, DTYPE_NAMES[dtype]
        end += torch.Size(shape).numel() * DTYPE_BITS[kind] // 8
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    with replacing(path) as temporary, temporary.open("wb") as handle:
        handle.write(encode_header(entries))
        for name in names:
            handle.write(tensor_bytes(_made(tensors[name])))


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def keep_codes(path: Path, codes: Mapping[str, Tensor]) -> None:
    """Write codes, one layer in memory at a time, with the digest of each layer for who reads them.

    Raises:
        DiskSpaceError: There is no room.
    """
    given: dict[str, Given] = {name: functools.partial(codes.__getitem__, name) for name in codes}
    digests = {name: _sha256(codes[name]) for name in codes}
    save_tensors_atomic(path, given, {DIGESTS: json.dumps(digests, sort_keys=True)})


def digest_codes(codes: Mapping[str, Tensor]) -> str:
    """Hash codes with their names and shapes, one layer in memory at a time."""
    found = hashlib.sha256()
    for name in sorted(codes):
        q = codes[name]
        found.update(json.dumps([name, list(q.shape), _sha256(q)]).encode())
    return found.hexdigest()


class StoredCodes(Mapping[str, Tensor]):
    """Codes by module name in a safetensors file, read from it whenever they are asked for.

    Files of earlier versions say no digests, and are taken as they are.
    """

    def __init__(self, path: Path) -> None:
        """Open.

        Raises:
            CheckpointError: The file is damaged.
        """
        self._found, metadata = read_header(path)
        self._path = path
        try:
            self._digests: dict[str, str] = dict(json.loads(metadata.get(DIGESTS, "{}")))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {DIGESTS} of its header is damaged") from error

    def __getitem__(self, name: str) -> Tensor:
        """Return the codes of a layer, uint8, [out_features, in_features].

        Raises:
            KeyError: There is no such layer.
            CheckpointError: They are not those that were written.
        """
        codes = read_tensor(self._found[name])
        wanted = self._digests.get(name)
        if wanted is not None and wanted != _sha256(codes):
            raise CheckpointError(
                f"{self._path}: {name} is damaged; these are codes that the run began with: choose another OUT, or "
                "remove the file, and the same command computes them again"
            )
        return codes

    def __iter__(self) -> Iterator[str]:
        """Yield names in the order of the file."""
        return iter(self._found)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._found)
