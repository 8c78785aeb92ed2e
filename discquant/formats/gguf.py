# SPDX-License-Identifier: Apache-2.0
"""GGUF behind the interface of all formats: whole models for llama.cpp, and other codes into existing files.

A written folder holds `model.gguf`, the original's config.json, manifest, proof and card. Anything a file of these
architectures holds besides matrices of `gguf_types.TYPES` is left as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discquant.config import GRID_KINDS, GridConfig
from discquant.errors import CheckpointError, MissingModelError, ProofError, UnrepresentableError, either
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import DEFAULT_SHARD_BYTES, CodedLayer, Description, Format, LayerFacts
from discquant.formats.gguf_blocks import replace_codes, unpack_blocks
from discquant.formats.gguf_file import MAGIC, PLAIN, GgufFile, GgufTensor, byte_diff
from discquant.formats.gguf_fit import WIDEST_AFFINE, fit_grid, grid_of, planned_type
from discquant.formats.gguf_model import Layout, Place, is_matrix, layout_of_file
from discquant.formats.gguf_types import TYPES, BlockType
from discquant.formats.gguf_write import check_source, space, write_gguf
from discquant.formats.output import MANIFEST, PROOF, atomic_directory, check_space
from discquant.formats.rewrite import Finish, close_rewritten, file_facts, span_row
from discquant.formats.scheme import Scheme
from discquant.grids import Grid
from discquant.grids.fused import experts_of
from discquant.grids.gguf import SUPER, gguf_kind

# One matrix of a file: where it lies, and its tensor, which holds those of all experts of its layer where it is one's.
_Slot = tuple[Place, GgufTensor]


class Gguf:
    """See `coded.Format`."""

    name = "gguf"

    def detects(self, path: Path) -> bool:
        """Whether it is a GGUF file, or a folder with exactly one and no safetensors."""
        try:
            file = path if path.is_file() else _only(path)
            if file is None:
                return False
            with file.open("rb") as stream:
                return stream.read(4) == MAGIC
        except OSError:
            return False

    def describe(self, path: Path) -> Description:
        """See `coded.Format`."""
        file, layout = self._open(path)
        rows: list[LayerFacts] = []
        used, others = 0, dict[str, int]()
        for module, (place, whole) in _coded(file, layout):
            kind, tensor = TYPES[whole.type], whole.part(place.expert)
            _rows_of(file, layout, module, tensor)
            facts = (kind.name, kind.num_bits, kind.group_size, kind.symmetric)
            shape, size = (tensor.shape[0], tensor.shape[1]), tensor.num_bytes
            rows.append(LayerFacts(module, shape, *facts, stored_bytes=size, weight_bits=8 * size))
            used += size
        known = {place.tensor for _, (place, _) in _coded(file, layout)}
        for name, tensor in file.tensors.items():
            if name not in known and tensor.type not in PLAIN:
                others[tensor.type] = others.get(tensor.type, 0) + 1
        notes = [
            f"{count} tensors are {kind}: decoded for evaluation, never rewritten"
            for kind, count in others.items()
        ]
        total = sum(tensor.num_bytes for tensor in file.tensors.values())
        return Description(self.name, tuple(rows), total - used, file.size, tuple(notes))

    def read(self, path: Path) -> Iterator[CodedLayer]:
        """See `coded.Format`; q and k rows in the order of transformers."""
        file, layout = self._open(path)
        for module, (place, tensor) in _coded(file, layout):
            kind = TYPES[tensor.type]
            rows = _rows_of(file, layout, module, tensor.part(place.expert))
            q, parts = unpack_blocks(kind, _unpermuted(file.raw(tensor.name, place.expert), rows))
            try:
                grid = grid_of(kind, parts)
            except ValueError as cause:
                raise CheckpointError(f"{file.path}: {tensor.name}: {cause}") from cause
            yield CodedLayer(module, q, grid)

    def plain_tensors(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is not quantized in any way, as transformers has it and by its name there.

        Raises:
            CheckpointError, MissingModelError, NotImplementedError: As `read`.
        """
        yield from self._others(path, tuple(PLAIN))

    def rest(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that `read` leaves out, as transformers has it and by its name there, decoded where quantized.

        Raises:
            CheckpointError, MissingModelError, NotImplementedError: As `read`.
        """
        yield from self._others(path, None)

    def _others(self, path: Path, types: tuple[str, ...] | None) -> Iterator[tuple[str, Tensor]]:
        file, layout = self._open(path)
        coded = {place.tensor for _, (place, _) in _coded(file, layout)}
        for name, (place, whole) in _named(file, layout):
            if place.tensor in coded or (types is not None and whole.type not in types):
                continue
            rows = _rows_of(file, layout, name.rpartition(".")[0], whole.part(place.expert))
            values = _unpermuted(file.plain(place.tensor, place.expert), rows)
            shift = layout.shift(name)
            yield name, values.float() - shift if shift else values

    def check(self, shape: tuple[int, int], grid: GridConfig, name: str = "layer") -> None:
        """Refuse what no block type holds, whatever its scales: see `gguf_fit.fit_grid`."""
        if grid.kind.upper() in TYPES:
            gguf_kind(grid.kind, shape[1], name)
            return
        if grid.kind != "uniform" or (not grid.sym and grid.bits > WIDEST_AFFINE):
            kind = grid.kind if grid.kind != "uniform" else f"{grid.bits}-bit asymmetric"
            raise UnrepresentableError(
                f"{name}: GGUF has no place for {kind} grids; lay one of its own with kind "
                f"{either(kind for kind in GRID_KINDS if kind.upper() in TYPES)}"
            )
        # Whether a block type holds the minima of an asymmetric grid shows in their values: `check_grid`.
        gguf_kind("q4_0" if grid.sym else "q4_1", shape[1], name)
        if grid.group_size != -1 and grid.group_size < shape[1] and grid.group_size % 32:
            raise UnrepresentableError(
                f"{name}: GGUF has a scale per 32 columns, got group_size {grid.group_size}; take a multiple of 32"
            )

    def check_grid(self, name: str, grid: Grid) -> None:
        """Refuse a grid whose scales no block type holds exactly."""
        size = 32 if grid.group_size == -1 else grid.group_size
        columns = size * grid.scale.shape[1]
        fit_grid(grid, columns if columns % 32 == 0 else 32 * columns, name)

    def check_source(self, source: Checkpoint) -> list[str]:
        """See `coded.Format`."""
        return check_source(source)

    def stored_wider(self, bits: int, symmetric: bool = True, group_size: int = -1) -> str:
        """See `coded.Format`; groups of 16 are those of a K type, which holds them as they are."""
        stored = planned_type(Scheme(bits, group_size, symmetric), SUPER)
        if bits >= stored.num_bits:
            return ""
        kinds = [
            name for name, (width, _, _) in GRID_KINDS.items() if width == bits and name.upper() in TYPES
        ]
        own = f"; its own {bits}-bit grid is --kind {either(kinds)}" if kinds else ""
        # A minimum may fit the smaller type of integer scales, too.
        size = f"{'' if symmetric else 'up to '}{8 * stored.size / stored.columns:g}"
        return f"{bits}-bit codes are stored in {stored.num_bits}-bit blocks ({size} bits per weight){own}"

    def space(self, source: Checkpoint, schemes: Mapping[str, Scheme]) -> int:
        """See `coded.Format`."""
        return space(source, schemes)

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
        """See `coded.Format`; one file however large, since llama.cpp maps it."""
        return write_gguf(source, out, layers, recipe=recipe, prove_from=prove_from)

    def rewrite(
        self, path: Path, out: Path, codes: Mapping[str, Tensor], *, finish: Finish | None = None
    ) -> dict[str, Any]:
        """See `coded.Format`; also a lone file becomes a folder, with the file of the same name."""
        file, layout = self._open(path)
        stored = dict(_coded(file, layout))
        unknown = sorted(set(codes) - set(stored))
        if unknown:
            raise UnrepresentableError(
                f"rewrite: {path} has no quantized layers of these names: {', '.join(unknown[:8])}"
            )
        for module, q in codes.items():
            place, whole = stored[module]
            _check_codes(module, whole.part(place.expert), q)
        check_space(out, file.size + file.size // 16)
        with atomic_directory(out) as partial:
            _copy_beside(path, partial)
            target = partial / file.path.name
            shutil.copyfile(file.path, target)
            with target.open("r+b") as stream:
                for module, q in codes.items():
                    place, whole = stored[module]
                    tensor = whole.part(place.expert)
                    rows = _rows_of(file, layout, module, tensor)
                    moved = q.cpu() if rows is None else q.cpu()[rows]
                    raw = replace_codes(TYPES[tensor.type], file.raw(whole.name, place.expert), moved)
                    stream.seek(tensor.start)
                    stream.write(raw.flatten().numpy().data)
            diff = self._prove_rewritten(file, target, stored, codes)
            coded = {place.tensor for place, _ in stored.values()}
            written = sorted(GgufFile(target).tensors.items())
            return close_rewritten(
                partial,
                {
                    "format": self.name,
                    "refined_from": file_facts(self.name, path, [file.path]),
                    "byte_diff": diff,
                    "tensors": {
                        name: span_row(
                            target, row.start, row.num_bytes, row.type, row.shape, name not in coded
                        )
                        for name, row in written
                    },
                },
                finish,
            )

    def _prove_rewritten(
        self, file: GgufFile, target: Path, stored: Mapping[str, _Slot], codes: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Byte diff against the original, and the codes read back."""
        kinds = {place.tensor: TYPES[whole.type] for place, whole in stored.values()}
        written = GgufFile(target)
        diff = byte_diff(
            file,
            written,
            {name: kind.codes for name, kind in kinds.items()},
            {name: kind.size for name, kind in kinds.items()},
        )
        if diff["outside"]:
            raise ProofError(f"proof: {diff['outside']} bytes outside the codes changed")
        named: dict[str, list[str]] = {}
        for module, (place, _) in stored.items():
            named.setdefault(place.tensor, []).append(module)
        changed = diff.pop("tensors")
        # Of experts all that lie in a tensor that has changed are looked at one by one.
        touched = [module for tensor in changed for module in named[tensor] if module not in codes]
        for module in touched:
            place, _ = stored[module]
            before, after = (part.raw(place.tensor, place.expert) for part in (file, written))
            if not torch.equal(before, after):
                raise ProofError(f"proof: codes of a layer changed that nobody named: {module}")
        diff["layers"] = dict(sorted((_together(named[tensor]), count) for tensor, count in changed.items()))
        for layer in self.read(target):
            if layer.name in codes and not torch.equal(layer.q, codes[layer.name].cpu()):
                raise ProofError(f"proof: {layer.name}: the codes read back are not those given")
        return diff

    def _open(self, path: Path) -> tuple[GgufFile, Layout]:
        file = path if path.is_file() else _only(path) if path.is_dir() else None
        if file is None:
            raise MissingModelError(
                f"{path} is no GGUF model: it must be a file, or a folder with exactly one"
            )
        opened = GgufFile(file)
        return opened, layout_of_file(opened.metadata, file)


def _only(folder: Path) -> Path | None:
    files = sorted(folder.glob("*.gguf"))
    return files[0] if len(files) == 1 and not any(folder.glob("*.safetensors")) else None


def _named(file: GgufFile, layout: Layout) -> Iterator[tuple[str, _Slot]]:
    """Tensors that transformers has, by their names there, in file order; experts one by one.

    Raises:
        CheckpointError: Experts do not lie in a tensor of three dimensions, one matrix for each.
    """
    for name, tensor in file.tensors.items():
        ours = layout.original(name)
        if ours is None:
            continue
        if "*" not in ours:
            yield ours, (Place(name), tensor)
            continue
        if len(tensor.shape) != 3 or tensor.shape[0] != layout.experts:
            raise CheckpointError(
                f"{file.path}: {name} must hold a matrix for each of {layout.experts} experts, its shape is "
                f"{list(tensor.shape)}"
            )
        for expert in range(layout.experts):
            yield ours.replace("*", str(expert)), (Place(name, expert), tensor)


def _coded(file: GgufFile, layout: Layout) -> Iterator[tuple[str, _Slot]]:
    """Linear layers whose codes are read: module path and where it lies, in file order."""
    for name, (place, tensor) in _named(file, layout):
        module = name.removesuffix(".weight")
        whole = len(tensor.shape) == (2 if place.expert is None else 3) and tensor.num_bytes > 0
        if module != name and is_matrix(module) and tensor.type in TYPES and whole:
            yield module, (place, tensor)


def _together(modules: Sequence[str]) -> str:
    """One name for the layers of a tensor."""
    return modules[0] if len(modules) == 1 else f"{experts_of(modules[0])}.*.{modules[0].rpartition('.')[2]}"


def _rows_of(file: GgufFile, layout: Layout, module: str, tensor: GgufTensor) -> Tensor | None:
    try:
        return layout.rows(module, tensor.shape[0])
    except ValueError as cause:
        raise CheckpointError(f"{file.path}: {cause}") from cause


def _unpermuted(values: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return values
    found = torch.empty_like(values)
    found[rows] = values
    return found


def _check_codes(module: str, tensor: GgufTensor, q: Tensor) -> None:
    kind: BlockType = TYPES[tensor.type]
    if q.dtype != torch.uint8 or tuple(q.shape) != tensor.shape:
        raise UnrepresentableError(
            f"rewrite: {module} must be uint8 of shape {list(tensor.shape)}, got {q.dtype} of {list(q.shape)}"
        )
    if q.numel() and int(q.max()) >> kind.num_bits:
        raise UnrepresentableError(
            f"rewrite: {module}: codes must be below {1 << kind.num_bits}, got {int(q.max())}"
        )


def _copy_beside(path: Path, partial: Path) -> None:
    """Small files that lie beside the weights of a folder; manifest and proof are of what is replaced."""
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            kept = entry.suffix in (".json", ".md", ".txt", ".jinja", ".model") and entry.name not in (
                MANIFEST,
                PROOF,
            )
            if entry.is_file() and kept and not entry.name.startswith("."):
                shutil.copyfile(entry, partial / entry.name)


FORMAT: Format = Gguf()
