# SPDX-License-Identifier: Apache-2.0
"""The same files with other codes: everything is copied, code bytes are overwritten, and a byte diff proves it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discquant import environment
from discquant.errors import ProofError, UnrepresentableError
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.layout import Layout, StoredLayer
from discquant.formats.output import MANIFEST, PROOF, atomic_directory, check_space
from discquant.formats.proof import prove_codes
from discquant.formats.safetensors_file import TensorInfo, tensor_bytes

_CHUNK = 16 << 20
_WEIGHTS = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx.data", "*.onnx_data")
# Completes a written folder and its manifest before the folder appears; gets the folder, gives the manifest.
Finish = Callable[[Path], dict[str, Any]]


def rewrite_model(
    chosen: Layout, path: Path, out: Path, codes: Mapping[str, Tensor], finish: Finish | None = None
) -> dict[str, Any]:
    """Write `path` again with other codes.

    Args:
        chosen: The format of `path`.
        path: The quantized model.
        out: Where to write; must not exist or be empty.
        codes: uint8, [out_features, in_features], by module path; layers that are not named keep theirs.
        finish: See `Finish`.

    Returns:
        The manifest: hashes of every file before and after, and the byte diff, per layer and outside all codes (0).

    Raises:
        UnrepresentableError: A name is no quantized layer of the file, or a code or shape does not fit.
        OutputExistsError, DiskSpaceError: See `output.atomic_directory`.
        ProofError: A byte outside the codes changed, or the codes do not read back.
    """
    checkpoint = Checkpoint(path)
    stored = {layer.name: layer for layer in chosen.layers(checkpoint)}
    unknown = sorted(set(codes) - set(stored))
    if unknown:
        raise UnrepresentableError(
            f"rewrite: {path} has no quantized layers of these names: {', '.join(unknown[:8])}"
        )
    for name, q in codes.items():
        check_codes(stored[name], q)
    size = sum(info.num_bytes for info in checkpoint.tensors.values())
    check_space(out, size + size // 16)
    with atomic_directory(out) as partial:
        _copy_all(path, partial)
        for name, q in codes.items():
            info = stored[name].tensors[chosen.codes]
            data = tensor_bytes(chosen.repack(stored[name], q))
            if len(data) != info.num_bytes:
                raise ProofError(
                    f"proof: {name}: the codes take {len(data)} bytes, the file has {info.num_bytes}"
                )
            with (partial / info.file.name).open("r+b") as stream:
                stream.seek(info.start)
                stream.write(data)
        diff = byte_diff(
            checkpoint, partial, {name: row.tensors[chosen.codes] for name, row in stored.items()}
        )
        if diff["outside"]:
            raise ProofError(f"proof: {diff['outside']} bytes outside the codes changed")
        surprising = sorted(set(diff["layers"]) - set(codes))
        if surprising:
            raise ProofError(f"proof: codes of layers changed that nobody named: {', '.join(surprising[:8])}")
        after = Checkpoint(partial)
        written = {layer.name: layer for layer in chosen.layers(after)}
        for name, q in codes.items():
            prove_codes(chosen.name, written[name], q)
        coded = {f"{name}.{chosen.codes}" for name in stored}
        return close_rewritten(
            partial,
            {
                "format": chosen.name,
                "refined_from": file_facts(chosen.name, path, sorted(path.glob("*.safetensors"))),
                "byte_diff": diff,
                "tensors": {
                    name: span_row(
                        info.file, info.start, info.num_bytes, info.dtype, info.shape, name not in coded
                    )
                    for name, info in sorted(after.tensors.items())
                },
            },
            finish,
        )


def close_rewritten(partial: Path, facts: Mapping[str, Any], finish: Finish | None) -> dict[str, Any]:
    """Write the manifest of a rewritten folder; `finish` may add to it and to the folder.

    Args:
        partial: The folder, complete but for this.
        facts: `format`, `refined_from`, `byte_diff`, `tensors`.
        finish: See `Finish`.

    Returns:
        The manifest: `facts`, versions, and the hashes of all weight files.
    """
    names = [name for name in facts["refined_from"]["files"] if (partial / name).is_file()]
    manifest = {
        "manifest_version": 2,
        "versions": environment.versions(),
        **facts,
        "requires": {},  # whatever read the file before reads it now
        "shards": {
            name: {"bytes": (partial / name).stat().st_size, "sha256": digest(partial / name)}
            for name in names
        },
    }
    write_manifest(partial, manifest)
    return manifest if finish is None else finish(partial)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a folder's manifest."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def weight_files(path: Path) -> list[Path]:
    """Files that hold the weights of a model: of a folder, or one file and the external data of a graph beside it."""
    if path.is_file():
        beside = (path.with_name(path.name + suffix) for suffix in (".data", "_data"))
        return [path, *(file for file in beside if file.is_file())]
    return sorted({file for kind in _WEIGHTS for file in path.glob(kind)})


def file_facts(format_name: str, path: Path, files: Iterable[Path]) -> dict[str, Any]:
    """Name, format and files of a quantized model, each file with its SHA-256."""
    return {
        "name": path.resolve().name,
        "format": format_name,
        "files": {file.name: digest(file) for file in files},
    }


def span_row(
    file: Path, start: int, num_bytes: int, dtype: str, shape: Iterable[int], copied: bool
) -> dict[str, Any]:
    """A row of the manifest's table of tensors, hashed where it lies."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        stream.seek(start)
        while num_bytes and (piece := stream.read(min(num_bytes, _CHUNK))):
            found.update(piece)
            num_bytes -= len(piece)
    return {
        "dtype": dtype,
        "shape": list(shape),
        "sha256": found.hexdigest(),
        "shard": file.name,
        "copied": copied,
    }


def check_codes(stored: StoredLayer, q: Tensor) -> None:
    """Refuse codes that do not fit their layer.

    Raises:
        UnrepresentableError: Wrong dtype, shape or a code too large; the message names the module.
    """
    name, bits = stored.name, stored.scheme.num_bits
    if q.dtype != torch.uint8 or tuple(q.shape) != stored.shape:
        raise UnrepresentableError(
            f"rewrite: {name} must be uint8 of shape {list(stored.shape)}, got {q.dtype} of {list(q.shape)}"
        )
    if q.numel() and int(q.max()) >> bits:
        raise UnrepresentableError(f"rewrite: {name}: codes must be below {1 << bits}, got {int(q.max())}")


def byte_diff(before: Checkpoint, after: Path, codes: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Compare every weight file byte by byte.

    Args:
        before: The original files.
        after: Folder of the new ones, same names.
        codes: By layer, where its codes lie in the original files.

    Returns:
        `code_bytes` (all bytes that hold codes), `changed` of them, `layers` (changed per layer), `outside`: bytes that
        differ anywhere else, lengths included.
    """
    inside: dict[str, int] = {}
    outside = 0
    for file in sorted({info.file for info in before.tensors.values()}):
        spans = sorted((info.start, info.stop, name) for name, info in codes.items() if info.file == file)
        outside += abs(file.stat().st_size - (after / file.name).stat().st_size)
        for offset, different in _differences(file, after / file.name):
            # Positions are ascending: cut them at the edges of the codes' ranges.
            positions = offset + different
            counted = 0
            for start, stop, name in spans:
                low, high = np.searchsorted(positions, (start, stop))
                if high > low:
                    inside[name] = inside.get(name, 0) + int(high - low)
                    counted += int(high - low)
            outside += len(positions) - counted
    return {
        "code_bytes": sum(info.num_bytes for info in codes.values()),
        "changed": sum(inside.values()),
        "outside": outside,
        "layers": dict(sorted(inside.items())),
    }


def _differences(before: Path, after: Path) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """(offset, positions from there that differ), piece by piece, up to the shorter file's end."""
    offset = 0
    with before.open("rb") as old, after.open("rb") as new:
        while (left := old.read(_CHUNK)) and (right := new.read(_CHUNK)):
            length = min(len(left), len(right))
            one, two = np.frombuffer(left, np.uint8)[:length], np.frombuffer(right, np.uint8)[:length]
            yield offset, np.flatnonzero(one != two)
            offset += length


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            found.update(piece)
    return found.hexdigest()


def _copy_all(path: Path, partial: Path) -> None:
    """Every file but pickles, hidden ones and the manifest and proof of what is replaced."""
    for entry in sorted(path.iterdir()):
        hidden = entry.name.startswith(".") or entry.name in (MANIFEST, PROOF)
        pickled = entry.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        if entry.is_file() and not hidden and not pickled:
            shutil.copyfile(entry, partial / entry.name)
    templates = path / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, partial / templates.name)
