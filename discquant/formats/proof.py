# SPDX-License-Identifier: Apache-2.0
"""Proof that a written checkpoint holds exactly what was solved, re-read from disk.

The decoders (`proof_layouts`) share no code with the packers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discquant.errors import ProofError
from discquant.formats import proof_layouts as layouts
from discquant.formats.checkpoint import Checkpoint, read_json
from discquant.formats.coded import CodedLayer
from discquant.formats.codes import QuantizedLinear
from discquant.formats.layout import StoredLayer
from discquant.formats.output import MANIFEST
from discquant.formats.safetensors_file import TORCH_DTYPES, TensorInfo, read_bytes
from discquant.formats.scheme import Scheme

_CHUNK = 1 << 18  # weights that are decoded in float64 at a time: a core's cache holds them


def prove(
    source_dir: str | Path, out_dir: str | Path, layers: Iterable[CodedLayer | QuantizedLinear]
) -> dict[str, Any]:
    """Compare a written directory with the codes it was written from and with its source.

    Checked: (1) the keys are those of the source, less the quantized weights, plus what the format adds, and no more;
    (2) codes, scales and zero points equal the given ones; (3) the decoded weights equal what the grid dequantizes to,
    bit for bit in float32 and in the source's dtype (MLX: codes and parameters only, because its engine's floats are
    its own); (4) every other tensor equals the source's byte for byte; (5) shards have the hashes of the manifest, if
    there is one; (6) the configuration says what the layers are.

    Args:
        source_dir: The original model.
        out_dir: The written one.
        layers: The codes, from wherever they were kept.

    Returns:
        Counts and the largest weight, for the report.

    Raises:
        ProofError: The first difference, with module and place.
        CheckpointError: A file cannot be read.
    """
    source, written = Checkpoint(source_dir), Checkpoint(out_dir)
    config = written.config()
    format_name = layouts.name_of(config)
    expected = set(source.tensors)
    added: set[str] = set()
    weights = count = 0
    for given in layers:
        layer = given if isinstance(given, CodedLayer) else CodedLayer.of(given)
        name = layer.name
        scheme = Scheme.of_grid(layer.grid)
        suffixes = layouts.suffixes(format_name, scheme.kind, scheme.symmetric)
        _require(f"{name}.weight" in expected, f"{name}.weight is not in the source, or the layer came twice")
        expected.remove(f"{name}.weight")
        added |= {f"{name}.{suffix}" for suffix in suffixes}
        missing = [suffix for suffix in sorted(suffixes) if f"{name}.{suffix}" not in written.tensors]
        _require(not missing, f"{name}: {', '.join(missing)} is missing from the file")
        claim = layouts.claimed(format_name, config, name)
        _check_claim(name, claim, scheme, layer.q.shape[1])
        served = TORCH_DTYPES[source.tensors[f"{name}.weight"].dtype]
        _check_layer(layer, written, format_name, claim, config, served)
        weights += layer.q.numel()
        count += 1
    actual, wanted = set(written.tensors), expected | added
    _require(actual >= wanted, f"tensors are missing from the file: {sorted(wanted - actual)[:8]}")
    _require(
        actual <= wanted, f"tensors are in the file that nobody asked for: {sorted(actual - wanted)[:8]}"
    )
    for key in sorted(expected):
        _check_copy(source.tensors[key], written.tensors[key])
    return {
        "layers": count,
        "weights": weights,
        "copied_tensors": len(expected),
        "copied_bytes": sum(written.tensors[key].num_bytes for key in expected),
        "shards_hashed": _check_shards(Path(out_dir)),
        "result": "every decoded weight and every copied tensor is identical",
    }


def prove_configuration(
    config: Mapping[str, Any], schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Compare what a config.json says with the layers that it is to be about; part (6) of `prove`, without files.

    Args:
        config: As `Layout.configure` left it.
        schemes: Scheme of every quantized module.
        shapes: (out_features, in_features) of each.

    Raises:
        ProofError: Engines that follow it would not take a module for what it is.
    """
    format_name = layouts.name_of(config)
    for name, scheme in schemes.items():
        _check_claim(name, layouts.claimed(format_name, config, name), scheme, shapes[name][1])


def prove_codes(format_name: str, stored: StoredLayer, q: Tensor) -> None:
    """Compare the codes of a stored layer with those it should hold.

    Raises:
        ProofError: The first difference, with module and place.
    """
    suffix = {"compressed-tensors": "weight_packed", "mlx": "weight"}.get(format_name, "qweight")
    scheme = stored.scheme
    found = layouts.codes_of(format_name, stored.read(suffix), scheme.num_bits, stored.shape, scheme.kind)
    _same(f"{stored.name}: codes", found, q.cpu().numpy())


def _check_layer(
    layer: CodedLayer,
    written: Checkpoint,
    format_name: str,
    claim: layouts.Claim,
    config: Mapping[str, Any],
    served: torch.dtype,
) -> None:
    name, grid = layer.name, layer.grid
    shape = (layer.q.shape[0], layer.q.shape[1])
    said = config.get("quantization_config", {})
    try:
        found = layouts.decode(
            format_name, lambda suffix: written.read(f"{name}.{suffix}"), claim, shape, said
        )
    except ProofError as cause:
        raise ProofError(str(cause).replace("proof: ", f"proof: {name}: ", 1)) from cause
    _same(f"{name}: codes", found.q, layer.q.cpu().numpy())
    _same(f"{name}: scale", found.scale, grid.scale.double().cpu().numpy())
    groups = found.scale.shape[1]
    center = torch.full(grid.scale.shape, 1 << (grid.num_bits - 1), dtype=torch.int64)
    zero = (center if grid.zero_point is None else grid.zero_point.long()).cpu().numpy()
    if found.affine:
        minimum = getattr(grid, "minimum", None)
        exact = -found.scale * zero if minimum is None else minimum.double().cpu().numpy()
        assert found.zero is not None
        _same(f"{name}: bias", found.zero, exact)
        return
    size = -(-shape[1] // groups) if claim.group_size == -1 else claim.group_size
    if found.zero is not None:
        _same(f"{name}: zero point", found.zero, zero)
    served_weights = {dtype: layer.dequantize(dtype).cpu() for dtype in {torch.float32: None, served: None}}
    step = max(1, _CHUNK // max(1, shape[1]))
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        if found.zero is None:
            steps = layouts.levels(claim.kind)[found.q[rows]]
        else:
            steps = found.q[rows].astype(np.int16) - _per_column(
                found.zero[rows].astype(np.int16), size, shape[1]
            )
        # In float64 the product of a 16-bit scale and a small integer is exact; so is that of a float32 and a level.
        product = steps * _per_column(found.scale[rows], size, shape[1])
        decoded = torch.from_numpy(product.astype(np.float32))
        for dtype, weight in served_weights.items():
            _same(
                f"{name}: weight in {dtype}, from row {start}",
                _as_integers(decoded.to(dtype)),
                _as_integers(weight[rows]),
            )


def _per_column(per_group: np.ndarray[Any, Any], size: int, columns: int) -> np.ndarray[Any, Any]:
    """[rows, groups] to [rows, columns]; the last group may be shorter."""
    return np.repeat(per_group, size, axis=1)[:, :columns]


def _check_claim(name: str, claim: layouts.Claim, scheme: Scheme, columns: int) -> None:
    # A group as wide as the row or wider is the row.
    row = {size for size in (claim.group_size, scheme.group_size) if size == -1 or size >= columns}
    same_size = claim.group_size == scheme.group_size or len(row) == 2
    kinds = (scheme.kind, "affine") if claim.kind == "affine" else (scheme.kind,)
    facts = [
        ("num_bits", claim.num_bits, scheme.num_bits, claim.num_bits == scheme.num_bits),
        ("group_size", claim.group_size, scheme.group_size, same_size),
        ("kind", claim.kind, scheme.kind, claim.kind in kinds),
        ("symmetric", claim.symmetric, scheme.symmetric, claim.symmetric in (None, scheme.symmetric)),
    ]
    for key, said, has, agrees in facts:
        _require(agrees, f"{name}: config.json says {key} = {said}, the layer has {has}")


def _check_copy(before: TensorInfo, after: TensorInfo) -> None:
    _require(
        (before.dtype, before.shape) == (after.dtype, after.shape), f"{before.name} changed dtype or shape"
    )
    _require(_digest(before) == _digest(after), f"{before.name} is not the source's byte for byte")


def _digest(info: TensorInfo) -> bytes:
    digest = hashlib.sha256()
    for piece in read_bytes(info):
        digest.update(piece)
    return digest.digest()


def _check_shards(out_dir: Path) -> int:
    manifest = out_dir / MANIFEST
    if not manifest.exists():
        return 0
    shards = read_json(manifest)["shards"]
    for name, row in shards.items():
        with (out_dir / name).open("rb") as stream:
            digest = (
                hashlib.file_digest(stream, "sha256")
                if hasattr(hashlib, "file_digest")
                else _file_digest(stream)
            )
        _require(digest.hexdigest() == row["sha256"], f"{name} does not have the hash of the manifest")
    return len(shards)


def _file_digest(stream: Any) -> Any:
    """hashlib.file_digest for Python 3.10."""
    digest = hashlib.sha256()
    while piece := stream.read(1 << 20):
        digest.update(piece)
    return digest


def _as_integers(weight: Tensor) -> np.ndarray[Any, Any]:
    """Bit patterns, so that -0.0 and 0.0 differ."""
    return weight.contiguous().view(torch.int32 if weight.element_size() == 4 else torch.int16).numpy()


def _same(what: str, actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    _require(
        actual.shape == expected.shape, f"{what}: shape {actual.shape} in the file, {expected.shape} solved"
    )
    if not np.array_equal(actual, expected):
        different = np.argwhere(actual != expected)
        place = tuple(int(number) for number in different[0])
        raise ProofError(
            f"proof: {what}: {len(different)} values differ, the first at {list(place)}: "
            f"{actual[place]} in the file, {expected[place]} solved"
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ProofError(f"proof: {message}")
