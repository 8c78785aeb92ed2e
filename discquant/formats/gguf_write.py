# SPDX-License-Identifier: Apache-2.0
"""A whole GGUF file from codes: tensors spooled as they come, header through the gguf package, proof re-read.

The proof decodes with the package's own reader and dequantizer and puts rows back by a formula of its own; nothing of
the packer is used in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discquant import environment
from discquant.config import GridRules
from discquant.errors import ProofError, UnrepresentableError
from discquant.formats.bits import bits_per_weight
from discquant.formats.card import ROTATION, hub_name, origin_of, write_card
from discquant.formats.checkpoint import Checkpoint, check_unquantized
from discquant.formats.coded import CodedLayer
from discquant.formats.engines import engine_rows
from discquant.formats.gguf_blocks import pack_blocks
from discquant.formats.gguf_file import NUMBERS
from discquant.formats.gguf_fit import fit_grid, planned_type
from discquant.formats.gguf_model import (
    ROPE_FACTORS,
    Heads,
    architecture_of,
    model_metadata,
    rope_factors,
    to_gguf,
)
from discquant.formats.gguf_tokenizer import GgufVocabulary, read_vocabulary
from discquant.formats.gguf_types import TYPES
from discquant.formats.mapped import forget_pages
from discquant.formats.output import MANIFEST, PROOF, atomic_directory, check_space
from discquant.formats.rewrite import digest
from discquant.formats.safetensors_file import tensor_bytes
from discquant.formats.scheme import Scheme
from discquant.grids.gguf import FALLBACK

FILE = "model.gguf"
_MOSTLY_F16 = 1  # llama.cpp's number of a file without a quantized matrix
_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Bytes of a string's length, type and score in a header; of a tensor's entry there and its row in the manifest.
_STRING, _FACTS, ALIGNMENT = 16, 1024, 32
_SKIPPED = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class _Spooled:
    type: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int
    sha256: str


def check_source(source: Checkpoint) -> list[str]:
    """Refuse a model whose architecture, tensors or tokenizer have no place in GGUF; return warnings.

    Raises:
        UnrepresentableError, CheckpointError: The message says what is in the way.
    """
    check_unquantized(source)
    config = source.config()
    metadata = model_metadata(config)
    for name in _wanted(source):
        to_gguf(name)
    return read_vocabulary(source.path, int(metadata["vocab_size"])).warnings


def space(source: Checkpoint, schemes: Mapping[str, Scheme]) -> int:
    """Bytes of a file at most, and of the spool of its tensors that it is joined from."""
    data = 0
    for key in _wanted(source):
        info, scheme = source.tensors[key], schemes.get(key.removesuffix(".weight"))
        if scheme is not None and key.endswith(".weight"):
            size = planned_type(scheme, info.shape[1]).row_bytes(info.shape[1]) * info.shape[0]
        else:  # vectors are widened to float32
            size = 4 * info.shape[0] if len(info.shape) == 1 else info.num_bytes
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
    architecture, permuted = architecture_of(config)
    metadata = model_metadata(config)
    heads = Heads(int(metadata["attention.head_count"]), int(metadata["attention.head_count_kv"]), permuted)
    recipe = dict(recipe or {})
    summary = recipe.pop("summary", None)
    wanted = GridRules.of_dict(recipe) if recipe.get("grid") else None
    with atomic_directory(out) as partial:
        spool = partial / "spool"
        table, schemes, tensors = _spool(source, layers, heads, spool, wanted)
        factors = rope_factors(config)
        if factors is not None:
            with spool.open("ab") as stream:
                tensors[ROPE_FACTORS] = _put(stream, "F32", tuple(factors.shape), factors)
        check_space(out, spool.stat().st_size)  # as much again
        types = [row["type"] for row in table.values()]
        mostly = TYPES[max(sorted(set(types)), key=types.count)].file_type if types else _MOSTLY_F16
        _write_file(source, partial, spool, tensors, metadata, architecture, mostly)
        spool.unlink()
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
            _write_json(partial / PROOF, prove_gguf(source, partial / FILE, prove_from(), heads))
        write_card(partial, source.path, summary)
    return manifest


def _wanted(source: Checkpoint) -> list[str]:
    return [name for name in source.tensors if not _SKIPPED.search(name)]


def _spool(
    source: Checkpoint, layers: Iterable[CodedLayer], heads: Heads, spool: Path, wanted: GridRules | None
) -> tuple[dict[str, dict[str, Any]], dict[str, Scheme], dict[str, _Spooled]]:
    """Write the data of every tensor into one file, in the order it comes; `wanted` gives the grids of the run."""
    table: dict[str, dict[str, Any]] = {}
    schemes: dict[str, Scheme] = {}
    tensors: dict[str, _Spooled] = {}
    left = dict.fromkeys(_wanted(source))
    with spool.open("wb") as stream:
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
            rows = _rows(heads, layer.name, shape[0])
            found = _put(stream, kind.name, tuple(shape), raw if rows is None else raw[rows])
            tensors[to_gguf(key)] = found
            schemes[layer.name] = Scheme(kind.num_bits, kind.group_size, kind.symmetric, kind.name.lower())
            asked = None if wanted is None else wanted(layer.name).kind
            table[layer.name] = {
                **asdict(schemes[layer.name]),
                "type": kind.name,
                "fallback": asked in FALLBACK and kind.name.lower() != asked,
                "widened_from_bits": layer.grid.num_bits if offset else None,
                "shape": list(shape),
                "bits": 8 * found.num_bytes,
            }
        for key in left:
            tensor = source.read(key)
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor = tensor.float()  # llama.cpp wants vectors in float32; the widening is exact
            if tensor.dtype not in _PLAIN:
                raise UnrepresentableError(
                    f"gguf: {key} is {tensor.dtype}, which no engine reads; convert the model"
                )
            rows = _rows(heads, key.rpartition(".")[0], tensor.shape[0])
            data = tensor if rows is None else tensor[rows]
            tensors[to_gguf(key)] = _put(stream, _PLAIN[tensor.dtype], tuple(tensor.shape), data)
    return table, schemes, tensors


def _rows(heads: Heads, module: str, count: int) -> Tensor | None:
    try:
        return heads.rows(module, count)
    except ValueError as cause:
        raise UnrepresentableError(f"gguf: {cause}") from cause


def _put(stream: Any, kind: str, shape: tuple[int, ...], tensor: Tensor) -> _Spooled:
    data = tensor_bytes(tensor)
    start = stream.tell()
    stream.write(data)
    return _Spooled(kind, shape, start, len(data), hashlib.sha256(data).hexdigest())


def _order(name: str) -> tuple[int, int, str]:
    """Embedding, blocks, then what comes after them."""
    if name.startswith("blk."):
        return 1, int(name.split(".")[1]), name
    return (0 if name.startswith(("token_embd", "rope")) else 2), 0, name


def _write_file(
    source: Checkpoint,
    partial: Path,
    spool: Path,
    tensors: Mapping[str, _Spooled],
    metadata: Mapping[str, int | float | str],
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


def prove_gguf(source: Checkpoint, file: Path, layers: Iterable[CodedLayer], heads: Heads) -> dict[str, Any]:
    """Read a written file back and compare it with the codes and the original, tensor by tensor.

    Raises:
        ProofError: The first difference.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    left = dict.fromkeys(_wanted(source))
    weights, count = 0, 0
    for layer in layers:
        key = f"{layer.name}.weight"
        name = to_gguf(key)
        if key not in left or name not in stored:
            raise ProofError(f"proof: {name} is not in the file, or came twice")
        del left[key]
        tensor = stored.pop(name)
        if tensor.tensor_type.name not in TYPES:
            raise ProofError(f"proof: {name} is {tensor.tensor_type.name}, not a quantized type")
        decoded = _original_rows(
            np.array(gguf.dequantize(tensor.data, tensor.tensor_type)), layer.name, heads
        )
        expected = layer.grid.dequantize(layer.q, torch.float32).cpu().numpy()
        _same(name, decoded, expected)
        forget_pages(reader.data)
        weights += layer.q.numel()
        count += 1
    copied = 0
    for key in left:
        name = to_gguf(key)
        if name not in stored:
            raise ProofError(f"proof: {name} is missing from the file")
        tensor = stored.pop(name)
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(
            tuple(int(size) for size in reversed(tensor.shape))
        )
        _same(name, _original_rows(values, key.rpartition(".")[0], heads), source.read(key).float().numpy())
        forget_pages(reader.data)
        copied += tensor.n_bytes
    extra = set(stored) - {ROPE_FACTORS}
    if extra:
        raise ProofError(f"proof: tensors are in the file that nobody asked for: {sorted(extra)[:8]}")
    return {
        "layers": count,
        "weights": weights,
        "copied_tensors": len(left),
        "copied_bytes": copied,
        "shards_hashed": 1,
        "result": "every weight that the gguf package decodes is identical",
    }


def _original_rows(values: np.ndarray[Any, Any], module: str, heads: Heads) -> np.ndarray[Any, Any]:
    """Rows back in the order of transformers: within a head, even rows first, then odd ones."""
    last = module.rpartition(".")[2]
    if not heads.permuted or last not in ("q_proj", "k_proj"):
        return values
    number = heads.query if last == "q_proj" else heads.key
    split = values.reshape(number, -1, *values.shape[1:])
    return np.asarray(np.concatenate((split[:, 0::2], split[:, 1::2]), axis=1).reshape(values.shape))


def _same(name: str, actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    if actual.shape != expected.shape:
        raise ProofError(f"proof: {name}: shape {actual.shape} in the file, {expected.shape} solved")
    if not np.array_equal(actual, expected):
        different = np.argwhere(actual != expected)
        place = tuple(int(number) for number in different[0])
        raise ProofError(
            f"proof: {name}: {len(different)} values differ, the first at {list(place)}: "
            f"{actual[place]} in the file, {expected[place]} solved"
        )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
