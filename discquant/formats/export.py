# SPDX-License-Identifier: Apache-2.0
"""From solved codes to a model directory that engines load: streamed, all or nothing, with a manifest and a proof."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from discquant import environment
from discquant.errors import UnrepresentableError
from discquant.formats.checkpoint import Checkpoint, read_json
from discquant.formats.codes import QuantizedLinear
from discquant.formats.compressed_tensors import (
    MINIMUM_LIBRARY,
    Scheme,
    check_representable,
    encode,
    encoded_bytes,
    quantization_config,
)
from discquant.formats.output import (
    DEFAULT_SHARD_BYTES,
    ShardWriter,
    atomic_directory,
    check_space,
    check_target,
)
from discquant.formats.proof import prove
from discquant.formats.safetensors_file import read_bytes

MANIFEST = "discquant_manifest.json"
PROOF = "discquant_proof.json"
# Tokenizer, generation settings, chat templates, code and licence go along; the original's model card does not,
# because it describes another model.
SIDE_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# Engines fuse these, so the members must share one grid.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(frozen=True)
class ExportPlan:
    """What an export will write, known from file headers alone.

    Attributes:
        schemes: Scheme of every module to quantize.
        weight_bytes: Bytes of all tensors of the output.
        warnings: What some engines will refuse, one sentence each.
    """

    schemes: dict[str, Scheme]
    weight_bytes: int
    warnings: list[str]


def plan_export(source_dir: str | Path, out_dir: str | Path, schemes: Mapping[str, Scheme]) -> ExportPlan:
    """Refuse before any work what cannot be exported after it.

    Args:
        source_dir: The original model.
        out_dir: Where the export will go.
        schemes: Scheme of every module that will be quantized, by path.

    Raises:
        MissingModelError, CheckpointError: source_dir cannot be read.
        UnrepresentableError: A module has no weight of its own, or the format cannot hold its grid.
        OutputExistsError: out_dir holds something.
        DiskSpaceError: The output, with one shard's spool, would not fit.
    """
    source, out = Checkpoint(source_dir), Path(out_dir)
    _check_unquantized(source)
    check_target(out)
    total = sum(info.num_bytes for info in source.tensors.values())
    warnings = []
    for name, scheme in schemes.items():
        shape = _weight_shape(source, name)
        check_representable(name, shape, scheme)
        total += encoded_bytes(shape, scheme) - source.tensors[f"{name}.weight"].num_bytes
        if shape[0] % 32 or shape[1] % 32:
            warnings.append(f"{name} is {shape[0]} x {shape[1]}: some engines want multiples of 32")
    for name, scheme in schemes.items():
        parent, _, last = name.rpartition(".")
        for members in FUSED:
            others = [schemes.get(f"{parent}.{member}") for member in members if last == members[0]]
            if any(other != scheme for other in others if other is not None) or None in others[1:]:
                warnings.append(f"{parent}: engines fuse {', '.join(members)}, which do not share one grid")
    if any(scheme.num_bits == 3 and not scheme.symmetric for scheme in schemes.values()):
        warnings.append(
            "3 bits asymmetric: no engine serves it from this format; symmetric is served by vLLM"
        )
    check_space(out, total + min(total, DEFAULT_SHARD_BYTES))
    return ExportPlan(dict(schemes), total, warnings)


def export_compressed_tensors(
    source_dir: str | Path,
    out_dir: str | Path,
    layers: Iterable[QuantizedLinear],
    *,
    ignore: Sequence[str] = ("lm_head",),
    recipe: Mapping[str, Any] | None = None,
    plan: ExportPlan | None = None,
    prove_from: Callable[[], Iterable[QuantizedLinear]] | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    source_sha256: str | None = None,
) -> dict[str, Any]:
    """Write a compressed-tensors checkpoint from integer codes.

    Layers are taken one at a time; every other tensor is copied byte for byte. The directory appears under its name
    only when it is complete (and proven, with prove_from). The same arguments give the same bytes.

    Args:
        source_dir: The original model.
        out_dir: Where to write; must not exist or be empty.
        layers: Codes, in a fixed order.
        ignore: Modules the engine must leave alone; every other linear layer that is not among `layers` is added.
        recipe: Grid, seed, method and so on, for the manifest.
        plan: From plan_export; then the layers must be exactly those planned.
        prove_from: Gives the layers a second time; the written files are then proven before they appear.
        shard_bytes: Largest size of a shard's data.
        source_sha256: Checkpoint.sha256() of the source if the caller has it, else it is computed.

    Returns:
        The manifest.

    Raises:
        MissingModelError, CheckpointError: source_dir cannot be read.
        UnrepresentableError: A layer fits neither the source nor the format, or not the plan.
        OutputExistsError, DiskSpaceError: See plan_export.
        ProofError: What was written is not what was given.
    """
    source, out = Checkpoint(source_dir), Path(out_dir)
    _check_unquantized(source)
    config = source.config()
    untouched = dict(source.tensors)
    schemes: dict[str, Scheme] = {}
    with atomic_directory(out) as partial:
        writer = ShardWriter(partial, shard_bytes)
        table: dict[str, dict[str, Any]] = {}
        for layer in layers:
            name = layer.name
            if name in schemes:
                raise UnrepresentableError(f"export: {name} was given twice")
            if tuple(layer.q.shape) != _weight_shape(source, name):
                raise UnrepresentableError(
                    f"export: {name} must have the shape of its weight = {list(_weight_shape(source, name))}, "
                    f"got {list(layer.q.shape)}"
                )
            scale_dtype = torch.float16 if untouched[f"{name}.weight"].dtype == "F16" else torch.bfloat16
            stored = encode(layer, scale_dtype)
            del untouched[f"{name}.weight"]
            schemes[name] = Scheme.of(layer)
            for key, tensor in stored.items():
                writer.add(key, tensor)
            bits = 8 * sum(writer.tensors[key].num_bytes for key in stored)
            table[name] = {**asdict(schemes[name]), "shape": list(layer.q.shape), "bits": bits}
        if plan is not None and schemes != plan.schemes:
            different = sorted(
                key
                for key in schemes.keys() | plan.schemes.keys()
                if schemes.get(key) != plan.schemes.get(key)
            )
            raise UnrepresentableError(
                f"export: the layers are not those planned: {', '.join(different[:8])}"
            )
        for name, info in untouched.items():
            writer.add_bytes(name, info.dtype, info.shape, info.num_bytes, read_bytes(info))
        writer.close()
        _copy_side_files(source.path, partial)
        config["quantization_config"] = quantization_config(schemes, _ignored(source, schemes, ignore))
        _write_json(partial / "config.json", config)
        weights = sum(row["shape"][0] * row["shape"][1] for row in table.values())
        manifest = {
            "manifest_version": 1,
            "format": "compressed-tensors pack-quantized",
            "requires": {
                "compressed-tensors": max(
                    (MINIMUM_LIBRARY[s.num_bits] for s in schemes.values()), default=None
                )
            },
            "versions": environment.versions(),
            "source": {"name": source.path.resolve().name, "sha256": source_sha256 or source.sha256()},
            "recipe": dict(recipe or {}),
            "quantized_weights": weights,
            "bits_per_weight": sum(row["bits"] for row in table.values()) / weights if weights else None,
            "weight_file_bytes": sum(row["bytes"] for row in writer.shards.values()),
            "layers": table,
            "shards": writer.shards,
            "tensors": {
                name: {
                    "dtype": row.dtype,
                    "shape": list(row.shape),
                    "sha256": row.sha256,
                    "shard": writer.shard_name(row.shard),
                    "copied": name in untouched,
                }
                for name, row in sorted(writer.tensors.items())
            },
        }
        _write_json(partial / MANIFEST, manifest)
        if prove_from is not None:
            _write_json(partial / PROOF, prove(source.path, partial, prove_from()))
    return manifest


def _check_unquantized(source: Checkpoint) -> None:
    if source.config().get("quantization_config"):
        raise UnrepresentableError(
            f"{source.path} is quantized already: export starts from the original model"
        )


def _weight_shape(source: Checkpoint, name: str) -> tuple[int, int]:
    info = source.tensors.get(f"{name}.weight")
    if info is None:
        raise UnrepresentableError(
            f"export: {source.path} holds no {name}.weight; a layer that shares its weight with another (a tied head) "
            "must be ignored"
        )
    if len(info.shape) != 2:
        raise UnrepresentableError(f"export: {name}.weight must have 2 dimensions, got {list(info.shape)}")
    return info.shape[0], info.shape[1]


def _ignored(source: Checkpoint, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> list[str]:
    """`ignore`, and every other matrix that is neither quantized nor an embedding: the group targets all of Linear."""
    found = [name for name in ignore if name not in schemes]
    # A tied head has no tensor of its own, yet engines make a linear layer of it.
    if "lm_head" not in schemes and "lm_head" not in found:
        found.append("lm_head")
    for key, info in source.tensors.items():
        name = key.removesuffix(".weight")
        if key == name or len(info.shape) != 2 or name in schemes or name in found:
            continue
        if not any(word in name.rpartition(".")[2] for word in ("embed", "wte", "wpe")):
            found.append(name)
    return found


def _copy_side_files(source: Path, target: Path) -> None:
    for pattern in SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            skipped = file.name.endswith(".index.json") or file.name in ("config.json", MANIFEST, PROOF)
            if file.is_file() and not skipped:
                shutil.copyfile(file, target / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of an exported directory.

    Raises:
        CheckpointError: It is no JSON object.
    """
    return read_json(Path(path) / MANIFEST)
