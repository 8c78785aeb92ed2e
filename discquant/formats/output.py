# SPDX-License-Identifier: Apache-2.0
"""Writing a model directory: all of it or nothing, tensors streamed into shards of bounded size.

Everything goes into a hidden directory beside the target, which is renamed at the end. A process killed at any moment
leaves at most that directory, and the next attempt removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from discquant.errors import DiskSpaceError, OutputExistsError
from discquant.formats.checkpoint import INDEX, read_json
from discquant.formats.coded import DEFAULT_SHARD_BYTES
from discquant.formats.safetensors_file import DTYPE_BITS, DTYPE_NAMES, encode_header, tensor_bytes

MANIFEST, PROOF = "discquant_manifest.json", "discquant_proof.json"
_COPY = 16 << 20
# What a system says where there is no room: on the disk, within a quota, within the limit on a file's size.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(out_dir: Path) -> None:
    """Refuse a target that holds anything.

    Raises:
        OutputExistsError: It is a file, or a directory that is not empty.
    """
    if out_dir.is_file() or (out_dir.is_dir() and any(out_dir.iterdir())):
        raise OutputExistsError(f"{out_dir} exists already: choose another output directory or remove it")


def missing_part(out_dir: Path) -> str | None:
    """Say what is missing of a model that was written whole: by the sizes in its manifest, nothing is hashed.

    Returns:
        The first file that is gone, or has another size than was written; None where all are there.
    """
    if not (out_dir / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    shards = read_json(out_dir / MANIFEST).get("shards")
    sizes = {name: facts["bytes"] for name, facts in shards.items()} if isinstance(shards, dict) else {}
    if any(name.endswith(".safetensors") for name in sizes):
        sizes["config.json"] = None  # may be edited
    if any("-of-" in name for name in sizes):
        sizes[INDEX] = None
    for name, size in sizes.items():
        file = out_dir / name
        if not file.is_file():
            return f"{name} is missing"
        if size is not None and file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes, and {size:,} were written"
    return None


def check_space(out_dir: Path, needed: int) -> None:
    """Refuse a target whose file system is too full.

    Raises:
        DiskSpaceError: Fewer than `needed` bytes are free.
    """
    parent = out_dir.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        wanted, there = _sizes(needed, free)
        raise DiskSpaceError(f"{out_dir} needs {wanted}, but its file system has {there} free")


def _sizes(needed: int, free: int) -> tuple[str, str]:
    """Both in a unit that tells them apart."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        told = f"{needed / unit:.2f} {name}", f"{free / unit:.2f} {name}"
        if needed >= unit and told[0] != told[1]:
            return told
    return f"{needed:,} bytes", f"{free:,} bytes"


def check_writable(path: Path, folder: Path) -> None:
    """Refuse to begin what cannot be written in the end; nothing is written.

    Args:
        path: What will be written, for the message.
        folder: Where; it need not exist.

    Raises:
        OutputExistsError: The folder or a parent of it is a file.
        PermissionError: The folder cannot be made or written.
    """
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputExistsError(f"{parent} is a file; {path} cannot be a folder in it")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: no permission in {parent}")


@contextmanager
def atomic_directory(out_dir: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `out_dir` when the block ends and vanishes when it raises.

    So do parents that were made for it.

    Raises:
        OutputExistsError: `out_dir` holds something, or another process is writing it.
        DiskSpaceError: The file system filled up.
    """
    out_dir = out_dir.absolute()
    check_target(out_dir)
    made = [folder for folder in out_dir.parents if not folder.exists()]
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = out_dir.parent / f".{out_dir.name}.partial"
    handle = _claim(partial, out_dir)
    try:
        yield partial
        _sync_tree(partial)
        check_target(out_dir)
        # An empty directory may stand there already; rename replaces it in one step.
        partial.rename(out_dir)
        sync_path(out_dir.parent)
    except BaseException as cause:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # another process has put something there
            for folder in made:
                folder.rmdir()
        if isinstance(cause, OSError) and cause.errno in FULL:
            raise DiskSpaceError(f"{out_dir}: the file system filled up while writing") from cause
        raise
    finally:
        os.close(handle)


def _claim(partial: Path, out_dir: Path) -> int:
    """Create and lock the hidden directory, emptied; the lock dies with the process, so a killed one blocks nobody."""
    while True:
        partial.mkdir(exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            os.close(handle)
            raise OutputExistsError(f"{out_dir} is being written by another process") from cause
        # Between opening and locking, its former owner may have renamed it: then this is no longer the hidden one.
        if partial.exists() and os.path.samestat(partial.stat(), os.fstat(handle)):
            break
        os.close(handle)
    for left in partial.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()
    return handle


@dataclass(frozen=True)
class WrittenTensor:
    """A row of the manifest's table of tensors."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    num_bytes: int
    shard: int


class ShardWriter:
    """Tensors one after the other into `model*.safetensors` and, with several shards, the index.

    A shard's header comes first but is known last, and readers want 8-byte elements before 4-byte ones (a view into
    the file must be aligned), so data is spooled by element size and joined when the shard is full.

    Args:
        directory: Where to write.
        shard_bytes: A shard is closed before its data would pass this; a single larger tensor has a shard of its own.
        metadata: `__metadata__` of every shard; `{"format": "pt"}` is what transformers asks for.
    """

    def __init__(
        self,
        directory: Path,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        metadata: dict[str, str] | None = None,
    ) -> None:
        if shard_bytes < 1:
            raise ValueError(f"ShardWriter: shard_bytes must be at least 1, got {shard_bytes}")
        self.directory = directory
        self.shard_bytes = shard_bytes
        self.metadata = metadata or {"format": "pt"}
        self.tensors: dict[str, WrittenTensor] = {}
        self.shards: dict[str, dict[str, Any]] = {}
        self._open: dict[int, IO[bytes]] = {}
        self._entries: dict[int, list[tuple[str, str, tuple[int, ...], int]]] = {}
        self._filled = 0
        self._closed: list[tuple[int, str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor.

        Raises:
            ValueError: A tensor of that name was written already, or the format has no dtype for it.
        """
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"ShardWriter: {name} has a dtype that safetensors cannot hold: {tensor.dtype}")
        data = tensor_bytes(tensor)
        self.add_bytes(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), len(data), [data])

    def add_bytes(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        num_bytes: int,
        pieces: Iterable[bytes | memoryview],
    ) -> None:
        """Append stored bytes unchanged.

        Raises:
            ValueError: A tensor of that name was written already, or the pieces do not add up to num_bytes.
        """
        if name in self.tensors:
            raise ValueError(f"ShardWriter: {name} was written already")
        if self._filled and self._filled + num_bytes > self.shard_bytes:
            self._close_shard()
        element = DTYPE_BITS[dtype]
        if element not in self._open:
            self._open[element] = (self.directory / f"spool-{element}").open("w+b")
        spool, digest, written = self._open[element], hashlib.sha256(), 0
        for piece in pieces:
            spool.write(piece)
            digest.update(piece)
            written += len(piece)
        if written != num_bytes:
            raise ValueError(f"ShardWriter: {name} must have {num_bytes} bytes, got {written}")
        self._entries.setdefault(element, []).append((name, dtype, shape, num_bytes))
        self._filled += num_bytes
        self.tensors[name] = WrittenTensor(dtype, shape, digest.hexdigest(), num_bytes, len(self._closed))

    def close(self) -> None:
        """Finish the last shard, give the shards their final names, and write the index if there are several."""
        if self._open:
            self._close_shard()
        total = len(self._closed)
        for number, (_, digest) in enumerate(self._closed):
            file = self.directory / self.shard_name(number)
            self._part(number).rename(file)
            self.shards[file.name] = {"bytes": file.stat().st_size, "sha256": digest}
        if total > 1:
            size = sum(row.num_bytes for row in self.tensors.values())
            weight_map = {name: self.shard_name(row.shard) for name, row in sorted(self.tensors.items())}
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def shard_name(self, number: int) -> str:
        """File name of a shard; final once `close` was called."""
        total = len(self._closed)
        return "model.safetensors" if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"

    def _part(self, number: int) -> Path:
        return self.directory / f"part-{number:05d}"

    def _close_shard(self) -> None:
        header: dict[str, Any] = {"__metadata__": self.metadata}
        start = 0
        order = sorted(self._open, reverse=True)
        for element in order:
            for name, dtype, shape, num_bytes in self._entries[element]:
                header[name] = {
                    "dtype": dtype,
                    "shape": list(shape),
                    "data_offsets": [start, start + num_bytes],
                }
                start += num_bytes
        digest = hashlib.sha256()
        with self._part(len(self._closed)).open("wb") as out:

            def put(piece: bytes) -> None:
                out.write(piece)
                digest.update(piece)

            put(encode_header(header))
            for element in order:
                spool = self._open[element]
                spool.seek(0)
                while piece := spool.read(_COPY):
                    put(piece)
                spool.close()
                Path(spool.name).unlink()
        self._closed.append((start, digest.hexdigest()))
        self._open, self._entries, self._filled = {}, {}, 0


def sync_path(path: Path) -> None:
    """Make a file's content, or a rename in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(root: Path) -> None:
    """Everything on disk before the rename makes it visible, or a power cut could leave a complete-looking wreck."""
    for path in [*root.rglob("*"), root]:
        sync_path(path)
