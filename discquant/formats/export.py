# SPDX-License-Identifier: Apache-2.0
"""Before and around writing: what a format cannot hold is refused early; compressed-tensors in one call; manifests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from discquant.errors import ProofError, UnrepresentableError
from discquant.formats.checkpoint import Checkpoint, check_unquantized, read_json
from discquant.formats.coded import DEFAULT_SHARD_BYTES, CodedLayer
from discquant.formats.codes import QuantizedLinear
from discquant.formats.engines import problems
from discquant.formats.layout import Layout
from discquant.formats.output import MANIFEST, check_space, check_target
from discquant.formats.proof import prove_configuration
from discquant.formats.registry import by_name
from discquant.formats.safetensors_format import SafetensorsFormat
from discquant.formats.scheme import Scheme
from discquant.formats.write import ExportPlan, unquantized, weight_shape, write_model


def plan_export(
    source_dir: str | Path,
    out_dir: str | Path,
    schemes: Mapping[str, Scheme],
    format_name: str = "compressed-tensors",
) -> ExportPlan:
    """Refuse before any work what cannot be exported after it.

    Args:
        source_dir: The original model.
        out_dir: Where the export will go.
        schemes: Scheme of every module that will be quantized, by path.
        format_name: A format of safetensors files.

    Raises:
        MissingModelError, CheckpointError: source_dir cannot be read.
        UnrepresentableError: A module has no weight of its own, or the format cannot hold its grid, or has no way to
            state all of them.
        OutputExistsError: out_dir holds something.
        DiskSpaceError: The output, with one shard's spool, would not fit.
    """
    source, out = Checkpoint(source_dir), Path(out_dir)
    chosen = by_name(format_name)
    if not isinstance(chosen, SafetensorsFormat):
        raise NotImplementedError(f"export: {format_name} is planned by its own module")
    check_unquantized(source)
    check_target(out)
    total = sum(info.num_bytes for info in source.tensors.values())
    shapes = {}
    for name, scheme in schemes.items():
        shapes[name] = weight_shape(source, name)
        chosen.check_scheme(name, shapes[name], scheme)
        total += chosen.encoded_bytes(shapes[name], scheme) - source.tensors[f"{name}.weight"].num_bytes
    _check_configuration(chosen, source, schemes, shapes)
    told = problems(format_name, schemes, shapes, unquantized(source, schemes))
    check_space(out, total + min(total, DEFAULT_SHARD_BYTES))
    return ExportPlan(dict(schemes), total, told, format_name)


def _check_configuration(
    chosen: Layout, source: Checkpoint, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse layers that fit one by one, but not beside each other in one configuration, as it will be written."""
    config = source.config()
    chosen.configure(config, schemes, unquantized(source, schemes))
    try:
        prove_configuration(config, schemes, shapes)
    except ProofError as cause:
        raise UnrepresentableError(f"{chosen.name} cannot state these layers: {cause}") from cause


def export_compressed_tensors(
    source_dir: str | Path,
    out_dir: str | Path,
    layers: Iterable[QuantizedLinear],
    *,
    recipe: Mapping[str, Any] | None = None,
    plan: ExportPlan | None = None,
    prove_from: Callable[[], Iterable[QuantizedLinear]] | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    source_sha256: str | None = None,
) -> dict[str, Any]:
    """Write compressed-tensors from uniform layers; see `write_model`."""
    chosen = by_name("compressed-tensors")
    assert isinstance(chosen, SafetensorsFormat)
    again = None if prove_from is None else lambda: map(CodedLayer.of, prove_from())
    return write_model(
        chosen,
        Checkpoint(source_dir),
        Path(out_dir),
        map(CodedLayer.of, layers),
        recipe=recipe,
        plan=plan,
        prove_from=again,
        shard_bytes=shard_bytes,
        source_sha256=source_sha256,
    )


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of an exported directory.

    Raises:
        CheckpointError: It is no JSON object.
    """
    return read_json(Path(path) / MANIFEST)
