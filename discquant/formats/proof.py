# SPDX-License-Identifier: Apache-2.0
"""Proof that a written checkpoint holds exactly what was solved, re-read from disk.

The decoder here shares no code with the packer: it spreads words into single bits and sums powers of two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discquant.errors import ProofError
from discquant.formats.checkpoint import Checkpoint, read_json
from discquant.formats.codes import QuantizedLinear
from discquant.formats.safetensors_file import TORCH_DTYPES, TensorInfo, read_bytes

_CHUNK = 1 << 20  # bytes of words whose bits are spread out at a time


def prove(source_dir: str | Path, out_dir: str | Path, layers: Iterable[QuantizedLinear]) -> dict[str, Any]:
    """Compare a compressed-tensors directory with the codes it was written from and with its source.

    Checked: (1) the keys are those of the source, less the quantized weights, plus what the format adds, and no more;
    (2) codes, scales and zero points equal the given ones; (3) the decoded weights equal `QuantizedLinear.dequantize`
    bit for bit in float32 and in the source's dtype; (4) every other tensor equals the source's byte for byte;
    (5) shards have the hashes of the manifest, if there is one; (6) the configuration says what the layers are.

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
    config = written.config().get("quantization_config", {})
    expected = set(source.tensors)
    weights = 0
    names = []
    for layer in layers:
        name = layer.name
        names.append(name)
        suffixes = {"weight_packed", "weight_scale", "weight_shape"}
        if not layer.symmetric:
            suffixes.add("weight_zero_point")
        _require(f"{name}.weight" in expected, f"{name}.weight is not in the source, or the layer came twice")
        expected.remove(f"{name}.weight")
        expected |= {f"{name}.{suffix}" for suffix in suffixes}
        missing = [suffix for suffix in sorted(suffixes) if f"{name}.{suffix}" not in written.tensors]
        _require(not missing, f"{name}: {', '.join(missing)} is missing from the file")
        _check_group(name, _group_of(config, name), layer)
        served = TORCH_DTYPES[source.tensors[f"{name}.weight"].dtype]
        _check_layer(layer, {suffix: written.read(f"{name}.{suffix}") for suffix in suffixes}, served)
        weights += layer.q.numel()
    actual = set(written.tensors)
    _require(actual >= expected, f"tensors are missing from the file: {sorted(expected - actual)[:8]}")
    _require(
        actual <= expected, f"tensors are in the file that nobody asked for: {sorted(actual - expected)[:8]}"
    )
    copied = sorted(actual & set(source.tensors))
    for key in copied:
        _check_copy(source.tensors[key], written.tensors[key])
    return {
        "layers": len(names),
        "weights": weights,
        "copied_tensors": len(copied),
        "copied_bytes": sum(written.tensors[key].num_bytes for key in copied),
        "shards_hashed": _check_shards(Path(out_dir)),
        "result": "every decoded weight and every copied tensor is identical",
    }


def _check_layer(layer: QuantizedLinear, stored: dict[str, Tensor], served: torch.dtype) -> None:
    name, (rows, columns) = layer.name, layer.q.shape
    _require(
        stored["weight_shape"].tolist() == [rows, columns], f"{name}: weight_shape is not {[rows, columns]}"
    )
    q = _bits_to_codes(stored["weight_packed"].numpy(), layer.num_bits, columns)
    _same(f"{name}: codes", q, layer.q.cpu().numpy())
    scale = stored["weight_scale"]
    _same(f"{name}: scale", scale.double().numpy(), layer.scale.double().cpu().numpy())
    groups = scale.shape[1]
    if layer.zero_point is None:
        zero = np.full((rows, groups), 1 << (layer.num_bits - 1), dtype=np.int16)
    else:
        zero = _bits_to_codes(stored["weight_zero_point"].numpy().T, layer.num_bits, rows).T.astype(np.int16)
        _same(f"{name}: zero point", zero, layer.zero_point.cpu().numpy().astype(np.int16))
    # The format's groups are equal. In float64 the product of a 16-bit scale and a small integer is exact.
    steps = q.reshape(rows, groups, -1).astype(np.int16) - zero[:, :, None]
    exact = (steps * scale.double().numpy()[:, :, None]).reshape(rows, columns)
    decoded = torch.from_numpy(exact.astype(np.float32))
    for dtype in {torch.float32: None, served: None}:
        _same(
            f"{name}: weight in {dtype}",
            _as_integers(decoded.to(dtype)),
            _as_integers(layer.dequantize(dtype).cpu()),
        )


def _bits_to_codes(words: np.ndarray[Any, Any], num_bits: int, count: int) -> np.ndarray[Any, Any]:
    """Rows of little-endian words to codes, by single bits; idle bits after the last code must be zero."""
    stream = np.ascontiguousarray(words).astype("<i4").view(np.uint8)
    out = np.zeros((len(stream), count), dtype=np.uint8)
    step = max(1, _CHUNK // max(1, stream.shape[1]))
    for start in range(0, len(stream), step):
        bits = np.unpackbits(stream[start : start + step], axis=1, bitorder="little")
        _require(not bits[:, count * num_bits :].any(), "bits after the last code are set")
        for place in range(num_bits):
            out[start : start + step] += bits[:, place : count * num_bits : num_bits] << place
    return out


def _group_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The configuration group that names a module, else the one that targets every linear layer."""
    _require(name not in config.get("ignore", []), f"config.json tells engines to ignore {name}")
    groups = list(config.get("config_groups", {}).values())
    for target in (name, "Linear"):
        for group in groups:
            if target in group["targets"]:
                return dict(group["weights"])
    raise ProofError(f"proof: config.json has no group for {name}")


def _check_group(name: str, said: dict[str, Any], layer: QuantizedLinear) -> None:
    rows = layer.group_size == -1
    expected = {
        "num_bits": layer.num_bits,
        "symmetric": layer.symmetric,
        "strategy": "channel" if rows else "group",
        "group_size": None if rows else layer.group_size,
        "type": "int",
    }
    for key, value in expected.items():
        _require(
            said.get(key) == value, f"{name}: config.json says {key} = {said.get(key)}, the layer has {value}"
        )


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
    manifest = out_dir / "discquant_manifest.json"
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
    different = np.argwhere(actual != expected)
    if len(different):
        place = tuple(int(number) for number in different[0])
        raise ProofError(
            f"proof: {what}: {len(different)} values differ, the first at {list(place)}: "
            f"{actual[place]} in the file, {expected[place]} solved"
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ProofError(f"proof: {message}")
