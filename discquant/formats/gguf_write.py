# SPDX-License-Identifier: Apache-2.0
"""A whole GGUF file from codes: tensors spooled as they come, header through the gguf package, proof re-read."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from discquant import environment
from discquant.config import GridRules
from discquant.errors import UnrepresentableError
from discquant.formats.bits import bits_per_weight
from discquant.formats.card import ROTATION, hub_name, origin_of, write_card
from discquant.formats.checkpoint import Checkpoint, check_unquantized
from discquant.formats.coded import CodedLayer
from discquant.formats.engines import engine_rows
from discquant.formats.gguf_blocks import pack_blocks
from discquant.formats.gguf_file import NUMBERS
from discquant.formats.gguf_fit import fit_grid, planned_type
from discquant.formats.gguf_metadata import (
    Metadata,
    extra_tensors,
    layout_of,
    metadata_warnings,
    model_metadata,
)
from discquant.formats.gguf_model import Layout, Place, family_of, in_float32
from discquant.formats.gguf_proof import prove_gguf
from discquant.formats.gguf_spool import Spool, Spooled, check_same_type
from discquant.formats.gguf_tokenizer import GgufVocabulary, read_vocabulary
from discquant.formats.gguf_types import TYPES
from discquant.formats.output import MANIFEST, PROOF, atomic_directory, check_space
from discquant.formats.rewrite import digest
from discquant.formats.safetensors_file import read_bytes
from discquant.formats.scheme import Scheme
from discquant.grids.gguf import FALLBACK

FILE = "model.gguf"
_MOSTLY_F16 = 1  # llama.cpp's number of a file without a quantized matrix
# Bytes of a string's length, type and score in a header; of a tensor's entry there and its row in the manifest.
_STRING, _FACTS, ALIGNMENT = 16, 1024, 32
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_SKIPPED = re.compile(r"\.rotary_emb\.inv_freq$")


def check_source(source: Checkpoint) -> list[str]:
    """Refuse a model whose architecture, tensors or tokenizer have no place in GGUF; return warnings.

    Raises:
        UnrepresentableError, CheckpointError: The message says what is in the way.
    """
    check_unquantized(source)
    config = source.config()
    layout, metadata = layout_of(config), model_metadata(config)
    extra_tensors(config)
    for name in _wanted(source):
        layout.place(name)
    vocabulary = read_vocabulary(source.path, int(metadata["vocab_size"]))
    return [*metadata_warnings(config), *vocabulary.warnings]


def space(source: Checkpoint, schemes: Mapping[str, Scheme]) -> int:
    """Bytes of a file at most, and of the spool of its tensors that it is joined from.

    Raises:
        UnrepresentableError: Experts of a layer will have several types.
    """
    layout, data = layout_of(source.config()), 0
    types: dict[str, tuple[str, str]] = {}
    for key in _wanted(source):
        info, scheme = source.tensors[key], schemes.get(key.removesuffix(".weight"))
        if scheme is not None and key.endswith(".weight"):
            kind = planned_type(scheme, info.shape[1])
            name, size = kind.name, kind.row_bytes(info.shape[1]) * info.shape[0]
        else:
            wide = in_float32(key, len(info.shape))
            name, size = info.dtype, 4 * math.prod(info.shape) if wide else info.num_bytes
        first, other = types.setdefault(layout.place(key).tensor, (name, key))
        check_same_type(name, key, first, other)
        data += size + ALIGNMENT
    found = read_vocabulary(source.path, int(model_metadata(source.config())["vocab_size"]))
    texts = sum(len(text.encode("utf-8")) + _STRING for text in (*found.tokens, *found.merges))
    return 2 * data + texts + _FACTS * len(source.tensors) + _beside(source)


def _beside(source: Checkpoint) -> int:
    """Bytes of what the header takes from the original's small files: the configuration, a chat template."""
    return sum(file.stat().st_size for file in source.path.glob("*") if file.suffix in (".json", ".jinja"))


def write_gguf(
    source: Checkpoint,
    out: Path,
    layers: Iterable[CodedLayer],
    *,
    recipe: Mapping[str, Any] | None = None,
    prove_from: Callable[[], Iterable[CodedLayer]] | None = None,
) -> dict[str, Any]:
    """Write `out` with `model.gguf`; arguments, result and errors as `coded.Format.write`."""
    warnings = check_source(source)
    config = source.config()
    layout, metadata = layout_of(config), model_metadata(config)
    recipe = dict(recipe or {})
    summary = recipe.pop("summary", None)
    wanted = GridRules.of_dict(recipe) if recipe.get("grid") else None
    with atomic_directory(out) as partial:
        place = partial / "spool"
        with Spool(place, layout.experts) as spool:
            table, schemes = _spool(source, layers, layout, spool, wanted)
            tensors = spool.close()
        check_space(out, place.stat().st_size)  # as much again
        types = [row["type"] for row in table.values()]
        mostly = TYPES[max(sorted(set(types)), key=types.count)].file_type if types else _MOSTLY_F16
        _write_file(source, partial, place, tensors, metadata, layout.family.name, mostly)
        place.unlink()
        (partial / "config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if (source.path / ROTATION).is_file():
            shutil.copyfile(source.path / ROTATION, partial / ROTATION)
        fallbacks = sorted(name for name, row in table.items() if row["fallback"])
        if fallbacks:
            warnings = [
                *warnings,
                f"{len(fallbacks)} layers have rows that are no multiple of 256 and took the 32-column type: "
                f"{', '.join(fallbacks[:4])}",
            ]
        weights = sum(row["shape"][0] * row["shape"][1] for row in table.values())
        manifest = {
            "manifest_version": 2,
            "format": "gguf",
            "requires": {},
            "versions": environment.versions(),
            "source": origin_of(source.path, source.sha256()),
            "recipe": recipe,
            "engines": engine_rows("gguf", schemes),
            "warnings": warnings,
            "quantized_weights": weights,
            "bits_per_weight": bits_per_weight((row["bits"], row["shape"]) for row in table.values()),
            "weight_file_bytes": (partial / FILE).stat().st_size,
            "layers": table,
            "shards": {FILE: {"bytes": (partial / FILE).stat().st_size, "sha256": digest(partial / FILE)}},
            "tensors": {
                key: {"dtype": row.type, "shape": list(row.shape), "sha256": row.sha256, "shard": FILE}
                for key, row in sorted(tensors.items())
            },
        }
        _write_json(partial / MANIFEST, manifest)
        if prove_from is not None:
            _write_json(partial / PROOF, prove(source, partial / FILE, prove_from()))
        write_card(partial, source.path, summary)
    return manifest


def _wanted(source: Checkpoint) -> list[str]:
    """Names of the tensors of the file: no copy of the embedding, where llama.cpp takes that for the head."""
    found = [name for name in source.tensors if not _SKIPPED.search(name)]
    if _HEAD in found and not family_of(source.config()).head and _is_copy(source, _HEAD, _EMBEDDING):
        found.remove(_HEAD)
    return found


def _is_copy(source: Checkpoint, name: str, other: str) -> bool:
    """Whether two tensors are the same bytes; a piece at a time."""
    left, right = source.tensors[name], source.tensors.get(other)
    if right is None or (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return all(a == b for a, b in zip(read_bytes(left), read_bytes(right), strict=True))


def _spool(
    source: Checkpoint, layers: Iterable[CodedLayer], layout: Layout, spool: Spool, wanted: GridRules | None
) -> tuple[dict[str, dict[str, Any]], dict[str, Scheme]]:
    """Write the data of every tensor into one file, in the order it comes; `wanted` gives the grids of the run."""
    table: dict[str, dict[str, Any]] = {}
    schemes: dict[str, Scheme] = {}
    left = dict.fromkeys(_wanted(source))
    for layer in layers:
        key = f"{layer.name}.weight"
        if key not in left:
            raise UnrepresentableError(
                f"gguf: {source.path} holds no {key}, or the layer came twice; a layer that shares its weight "
                "with another (a tied head) must be ignored"
            )
        shape = source.tensors[key].shape
        if tuple(layer.q.shape) != shape:
            raise UnrepresentableError(
                f"gguf: {layer.name} must have the shape of its weight = {list(shape)}, got {list(layer.q.shape)}"
            )
        del left[key]
        kind, parts, offset = fit_grid(layer.grid, shape[1], layer.name)
        raw = pack_blocks(kind, layer.q.cpu() + offset, parts)
        rows = _rows(layout, layer.name, shape[0])
        spool.put(layout.place(key), kind.name, tuple(shape), raw if rows is None else raw[rows])
        schemes[layer.name] = Scheme(kind.num_bits, kind.group_size, kind.symmetric, kind.name.lower())
        asked = None if wanted is None else wanted(layer.name).kind
        table[layer.name] = {
            **asdict(schemes[layer.name]),
            "type": kind.name,
            "fallback": asked in FALLBACK and kind.name.lower() != asked,
            "widened_from_bits": layer.grid.num_bits if offset else None,
            "shape": list(shape),
            "bits": 8 * raw.numel(),
        }
    for key in left:
        tensor = source.read(key)
        shift = layout.shift(key)
        if in_float32(key, tensor.dim()) and tensor.is_floating_point():
            tensor = tensor.float()
        if shift:
            tensor = shift + tensor
        rows = _rows(layout, key.rpartition(".")[0], tensor.shape[0])
        data = tensor if rows is None else tensor[rows]
        spool.put_plain(layout.place(key), key, data)
    for name, vector in extra_tensors(source.config()).items():
        spool.put_plain(Place(name), name, vector)
    return table, schemes


def _rows(layout: Layout, module: str, count: int) -> Tensor | None:
    try:
        return layout.rows(module, count)
    except ValueError as cause:
        raise UnrepresentableError(f"gguf: {cause}") from cause


def _order(name: str) -> tuple[int, int, str]:
    """Embedding, blocks, then what comes after them."""
    if name.startswith("blk."):
        return 1, int(name.split(".")[1]), name
    return (0 if name.startswith(("token_embd", "rope")) else 2), 0, name


def _write_file(
    source: Checkpoint,
    partial: Path,
    spool: Path,
    tensors: Mapping[str, Spooled],
    metadata: Metadata,
    architecture: str,
    file_type: int,
) -> None:
    import gguf

    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type("model")
    writer.add_name((hub_name(source.path) or source.path.resolve().name).rpartition("/")[2])
    writer.add_string(
        "general.quantized_by", f"discquant {environment.versions().get('discquant', '')}".strip()
    )
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key}", value)
    _add_tokenizer(writer, source, read_vocabulary(source.path, int(metadata["vocab_size"])))
    names = sorted(tensors, key=_order)
    for name in names:
        row = tensors[name]
        # Any dtype but uint8: then the shape is taken as it is.
        writer.add_tensor_info(
            name, row.shape, np.dtype(np.float32), row.num_bytes, gguf.GGMLQuantizationType(NUMBERS[row.type])
        )
    writer.write_header_to_file(partial / FILE)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (out,) = writer.fout
    writer.write_padding(out, out.tell())
    with spool.open("rb") as stream:
        for name in names:
            row = tensors[name]
            stream.seek(row.start)
            left = row.num_bytes
            while left:
                piece = stream.read(min(left, 16 << 20))
                out.write(piece)
                left -= len(piece)
            writer.write_padding(out, row.num_bytes)
    writer.close()


def _add_tokenizer(writer: Any, source: Checkpoint, found: GgufVocabulary) -> None:
    import gguf

    writer.add_tokenizer_model(found.model)
    if found.model == "no_vocab":
        return
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.space_prefix)
    if found.merges:
        writer.add_token_merges(found.merges)
    logger = logging.getLogger("gguf.vocab")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns about templates for pairs of texts, which no decoder uses
    try:
        special = gguf.SpecialVocab(source.path, n_vocab=len(found.tokens))
    finally:
        logger.setLevel(level)
    # llama.cpp's own habit differs by model type; transformers does what the tokenizer's template says.
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def prove(source: Checkpoint, file: Path, layers: Iterable[CodedLayer]) -> dict[str, Any]:
    """Read a written file back, see `gguf_proof.prove_gguf`.

    Raises:
        ProofError: The first difference.
    """
    config = source.config()
    return prove_gguf(source, file, layers, layout_of(config), _wanted(source), extra_tensors(config))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
