# SPDX-License-Identifier: Apache-2.0
"""From solved codes to a model directory that engines load: streamed, all or nothing, with a manifest and a proof.

One writer for every safetensors format; its `Layout` says how a layer's tensors and the configuration look.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from discquant import environment
from discquant.errors import UnrepresentableError
from discquant.formats.bits import bits_per_weight
from discquant.formats.card import origin_of, write_card
from discquant.formats.checkpoint import Checkpoint, check_unquantized
from discquant.formats.coded import DEFAULT_SHARD_BYTES, CodedLayer
from discquant.formats.engines import engine_rows, problems
from discquant.formats.layout import Layout
from discquant.formats.older_names import add_older_names
from discquant.formats.output import MANIFEST, PROOF, ShardWriter, atomic_directory
from discquant.formats.proof import prove
from discquant.formats.safetensors_file import TORCH_DTYPES, TensorInfo, read_bytes
from discquant.formats.scheme import Scheme

NOT_COPIED = (
    "config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    MANIFEST,
    PROOF,
)
# Never linear layers; any other name of an embedding does no harm in an engine's list.
EMBEDDINGS = ("embed_tokens", "embed_positions", "embed_in", "word_embeddings", "wte", "wpe")
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


@dataclass(frozen=True)
class ExportPlan:
    """What an export will write, known from file headers alone.

    Attributes:
        schemes: Scheme of every module to quantize.
        weight_bytes: Bytes of all tensors of the output.
        warnings: What some engines will refuse, one sentence each.
        format: Name of the format.
    """

    schemes: dict[str, Scheme]
    weight_bytes: int
    warnings: list[str]
    format: str = "compressed-tensors"


def write_model(
    chosen: Layout,
    source: Checkpoint,
    out: Path,
    layers: Iterable[CodedLayer],
    *,
    recipe: Mapping[str, Any] | None = None,
    plan: ExportPlan | None = None,
    prove_from: Callable[[], Iterable[CodedLayer]] | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    source_sha256: str | None = None,
) -> dict[str, Any]:
    """Write a checkpoint from integer codes.

    Layers are taken one at a time; every other tensor is copied byte for byte. The directory appears under its name
    only when it is complete (and proven, with prove_from). The same arguments give the same bytes.

    Args:
        chosen: The format.
        source: The original model.
        out: Where to write; must not exist or be empty.
        layers: Codes, in a fixed order; engines are told to leave every other linear layer alone.
        recipe: Grid, seed, method and so on, for manifest and card; `summary` in it is the run's summary.json.
        plan: From `export.plan_export`; then the layers must be exactly those planned.
        prove_from: Gives the layers a second time; the written files are then proven before they appear.
        shard_bytes: Largest size of a shard's data.
        source_sha256: Checkpoint.sha256() of the source if the caller has it, else it is computed.

    Returns:
        The manifest.

    Raises:
        MissingModelError, CheckpointError: The source cannot be read.
        UnrepresentableError: A layer fits neither the source nor the format, or not the plan.
        OutputExistsError, DiskSpaceError: See `export.plan_export`.
        ProofError: What was written is not what was given.
    """
    check_unquantized(source)
    config = source.config()
    add_older_names(config)
    recipe = dict(recipe or {})
    summary = recipe.pop("summary", None)
    with atomic_directory(out) as partial:
        writer = ShardWriter(partial, shard_bytes, dict(chosen.metadata))
        schemes, table, untouched = _write_layers(chosen, source, layers, writer)
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
        copy_side_files(source.path, partial)
        plain = unquantized(source, schemes)
        more = chosen.configure(config, schemes, plain)
        for name, value in {**more, "config.json": config}.items():
            _write_json(partial / name, value)
        weights = sum(row["shape"][0] * row["shape"][1] for row in table.values())
        shapes = {name: (row["shape"][0], row["shape"][1]) for name, row in table.items()}
        manifest = {
            "manifest_version": 2,
            "format": chosen.name,
            "requires": chosen.requires(schemes),
            "versions": environment.versions(),
            "source": origin_of(source.path, source_sha256 or source.sha256()),
            "recipe": recipe,
            "engines": engine_rows(chosen.name, schemes),
            "warnings": problems(chosen.name, schemes, shapes, plain),
            "quantized_weights": weights,
            "bits_per_weight": bits_per_weight((row["bits"], row["shape"]) for row in table.values()),
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
        write_card(partial, source.path, summary)
    return manifest


def _write_layers(
    chosen: Layout, source: Checkpoint, layers: Iterable[CodedLayer], writer: ShardWriter
) -> tuple[dict[str, Scheme], dict[str, dict[str, Any]], dict[str, TensorInfo]]:
    """Write every layer; return schemes, rows of the manifest's table, and the tensors that are left to copy."""
    untouched = dict(source.tensors)
    schemes: dict[str, Scheme] = {}
    table: dict[str, dict[str, Any]] = {}
    for layer in layers:
        name = layer.name
        if name in schemes:
            raise UnrepresentableError(f"export: {name} was given twice")
        shape = weight_shape(source, name)
        if tuple(layer.q.shape) != shape:
            raise UnrepresentableError(
                f"export: {name} must have the shape of its weight = {list(shape)}, got {list(layer.q.shape)}"
            )
        scheme = Scheme.of_grid(layer.grid)
        chosen.check_scheme(name, shape, scheme)
        stored = chosen.encode(layer, TORCH_DTYPES[untouched.pop(f"{name}.weight").dtype])
        schemes[name] = scheme
        for suffix, tensor in stored.items():
            writer.add(f"{name}.{suffix}", tensor)
        counted = [suffix for suffix in stored if suffix not in chosen.aside]
        bits = 8 * sum(writer.tensors[f"{name}.{suffix}"].num_bytes for suffix in counted)
        table[name] = {**asdict(scheme), "shape": list(shape), "bits": bits}
    return schemes, table, untouched


def weight_shape(source: Checkpoint, name: str) -> tuple[int, int]:
    """(out_features, in_features) of a module of the original.

    Raises:
        UnrepresentableError: It has no weight matrix of its own.
    """
    info = source.tensors.get(f"{name}.weight")
    fused = re.sub(r"\.\d+(\.\w+)$", r"\1", name)
    if info is None and fused != name and fused in source.tensors:
        raise UnrepresentableError(
            f"export: {source.path} holds the experts of {fused} in one tensor, which no format writes; leave them as "
            "they are with --ignore experts, or write no model with --format none"
        )
    if info is None:
        raise UnrepresentableError(
            f"export: {source.path} holds no {name}.weight; a layer that shares its weight with another (a tied head) "
            "must be ignored"
        )
    if len(info.shape) != 2:
        raise UnrepresentableError(f"export: {name}.weight must have 2 dimensions, got {list(info.shape)}")
    return info.shape[0], info.shape[1]


def unquantized(source: Checkpoint, schemes: Mapping[str, Scheme]) -> list[str]:
    """Full names of all matrices that stay as they are and could be linear layers: engines quantize all of Linear.

    Experts in tensors of three dimensions go by the module that holds them, of which engines make layers. Full names
    only: what users write (a last part, a glob) means something else in every format's patterns.
    """
    # A tied head has no tensor of its own, yet engines make a linear layer of it.
    found = {} if "lm_head" in schemes else {"lm_head": None}
    for key, info in source.tensors.items():
        name, dot, kind = key.rpartition(".")
        dimensions = 2 if kind == "weight" else 3
        if dot and len(info.shape) == dimensions and name not in schemes:
            found[name] = None
    return [name for name in found if name.rpartition(".")[2] not in EMBEDDINGS]


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what an original has beside weights and configuration (see SIDE_FILES)."""
    for pattern in SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            skipped = file.name.endswith(".index.json") or file.name in NOT_COPIED
            if file.is_file() and not skipped:
                shutil.copyfile(file, target / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
