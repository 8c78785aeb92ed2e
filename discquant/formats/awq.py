# SPDX-License-Identifier: Apache-2.0
"""AWQ in its GEMM layout, 4 bits: eight nibbles of a word are eight rows' codes in the order 0 2 4 6 1 3 5 7.

Codes and zero points are both packed along out_features; zero points are stored as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discquant.errors import CheckpointError, UnrepresentableError
from discquant.formats.bitstream import pack, unpack
from discquant.formats.checkpoint import Checkpoint, stated_quantization
from discquant.formats.coded import CodedLayer, Format
from discquant.formats.gptq import CODES, FLOATS, SCALES, ZEROS, group_of, most_common
from discquant.formats.layout import StoredLayer
from discquant.formats.safetensors_file import TensorInfo
from discquant.formats.safetensors_format import (
    SafetensorsFormat,
    exact,
    expect,
    expect_matrix,
    grouped,
    integer,
    uniform,
)
from discquant.formats.scheme import Scheme
from discquant.formats.stated import contradictions, old_quantization, quantization, stated_in
from discquant.grids import UniformGrid

# Lists, not tensors: a module may be imported where new tensors get no values (transformers builds models on meta).
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which element nibble i holds
PLACE = [ORDER.index(element) for element in range(8)]


def pack_awq(codes: Tensor) -> Tensor:
    """Codes uint8 [rows, columns], columns a multiple of 8, to words int32 [rows, columns / 8]."""
    rows, columns = codes.shape
    ordered = codes.reshape(rows, columns // 8, 8)[:, :, ORDER].reshape(rows, columns)
    return pack(ordered, 4)


def unpack_awq(words: Tensor) -> Tensor:
    """Undo `pack_awq`."""
    rows, held = words.shape
    return unpack(words, 4, 8 * held).reshape(rows, held, 8)[:, :, PLACE].reshape(rows, 8 * held)


def stored_layer(
    name: str, tensors: Mapping[str, TensorInfo], group_size: int, symmetric: bool
) -> StoredLayer:
    """A layer of a file, checked by its headers.

    Raises:
        CheckpointError: The shapes contradict one another.
    """
    columns, words = expect_matrix(name, tensors, CODES, "I32")
    groups, zero_words = expect_matrix(name, tensors, ZEROS, "I32")
    expect(name, tensors, SCALES, FLOATS, (groups, 8 * words))
    if zero_words != words:
        raise CheckpointError(f"{name}.{ZEROS} must have {words} columns, got {zero_words}")
    size = group_of(name, columns, groups, group_size)
    return StoredLayer(name, (8 * words, columns), Scheme(4, size, symmetric), tensors)


def decode(stored: StoredLayer) -> CodedLayer:
    """Codes and grid of a layer."""
    q = unpack_awq(stored.read(CODES)).T.contiguous()
    zero = unpack_awq(stored.read(ZEROS)).T.contiguous()
    symmetric = bool((zero == 8).all())
    scale = stored.read(SCALES).T.contiguous()
    grid = UniformGrid(4, stored.scheme.group_size, symmetric, scale, None if symmetric else zero)
    return CodedLayer(stored.name, q, grid)


def encode(layer: CodedLayer, format_name: str) -> dict[str, Tensor]:
    """qweight, qzeros and scales of a layer.

    Raises:
        UnrepresentableError: The grid is not uniform, or a scale is no float16.
    """
    scale, zero = uniform(layer, format_name)
    stored = exact(layer.name, "scale", scale.cpu(), torch.float16, format_name).T.contiguous()
    return {CODES: pack_awq(layer.q.T), ZEROS: pack_awq(zero.cpu().T), SCALES: stored}


def encoded_bytes(shape: tuple[int, int], scheme: Scheme) -> int:
    """Bytes that `encode` needs."""
    rows, columns = shape
    return rows * columns // 2 + scheme.groups(columns) * (rows // 2 + 2 * rows)


def check_scheme(format_name: str, name: str, shape: tuple[int, int], scheme: Scheme) -> None:
    """Refuse what the layout has no place for.

    Raises:
        UnrepresentableError: The message names the module.
    """
    if scheme.kind != "int" or scheme.num_bits != 4:
        raise UnrepresentableError(f"{format_name} holds integers of 4 bits; {name} is {scheme}")
    if shape[0] % 8:
        raise UnrepresentableError(
            f"{format_name} needs rows in multiples of 8; {name} has {shape[0]}: ignore it"
        )
    if scheme.group_size != -1 and shape[1] % scheme.group_size:
        raise UnrepresentableError(
            f"{format_name}: the {shape[1]} columns of {name} are no multiple of the group size {scheme.group_size}"
        )


class Awq(SafetensorsFormat):
    """See `coded.Format`."""

    name = "awq"
    codes = CODES

    def claims(self, config: Mapping[str, Any]) -> bool:
        """By quant_method."""
        said = stated_quantization(config)
        return isinstance(said, dict) and said.get("quant_method") == "awq"

    def detects(self, path: Path) -> bool:
        """By config.json; AutoAWQ once wrote quant_config.json alone, which names no method."""
        if super().detects(path):
            return True
        said = old_quantization(path, "quant_config.json", CODES)
        return said is not None and said.get("quant_method", "awq") == "awq" and "w_bit" in said

    def layers(self, checkpoint: Checkpoint) -> Iterator[StoredLayer]:
        """Modules with a `qweight`."""
        said = quantization(checkpoint)
        where = f"{checkpoint.path}/{stated_in(checkpoint)}"
        version = str(said.get("version", "gemm")).lower()
        bits = said.get("bits", said.get("w_bit"))
        if version != "gemm" or bits != 4:
            raise NotImplementedError(f"{where}: of AWQ only gemm with 4 bits is read, got {version}, {bits}")
        group_size = _group(said, where)
        symmetric = said.get("zero_point", True) is False
        for name, tensors in grouped(checkpoint, CODES, (CODES, ZEROS, SCALES)):
            yield stored_layer(name, tensors, group_size, symmetric)

    def problems(self, checkpoint: Checkpoint) -> Iterator[str]:
        """Where shapes contradict the configuration."""
        said = quantization(checkpoint)
        size = _group(said, f"{checkpoint.path}/{stated_in(checkpoint)}")
        yield from contradictions(said, 4, size, self.layers(checkpoint))

    def decode(self, stored: StoredLayer) -> CodedLayer:
        """Codes and grid."""
        return decode(stored)

    def repack(self, stored: StoredLayer, q: Tensor) -> Tensor:
        """Along out_features, in AWQ's order."""
        return pack_awq(q.T)

    def check_scheme(self, name: str, shape: tuple[int, int], scheme: Scheme) -> None:
        """4 bits, rows in eights, whole groups; no head, which transformers leaves alone whatever a file says."""
        if name.rpartition(".")[2] == "lm_head":
            raise UnrepresentableError(f"{self.name}: engines do not quantize {name}: ignore it")
        check_scheme(self.name, name, shape, scheme)

    def encode(self, layer: CodedLayer, served: torch.dtype) -> dict[str, Tensor]:
        """Tensors by suffix."""
        return encode(layer, self.name)

    def encoded_bytes(self, shape: tuple[int, int], scheme: Scheme) -> int:
        """Bytes that `encode` will need."""
        return encoded_bytes(shape, scheme)

    def configure(
        self, config: dict[str, Any], schemes: Mapping[str, Scheme], ignored: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        """The quantization_config entry.

        Raises:
            UnrepresentableError: Layers differ in group size, which AWQ states once.
        """
        base = most_common(schemes)
        for name, scheme in schemes.items():
            if scheme.group_size != base.group_size:
                raise UnrepresentableError(
                    f"awq states one group size for all layers; {name} is {scheme}, most are {base}: ignore it"
                )
        config["quantization_config"] = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": base.group_size,
            # The layout always stores zero points; a symmetric grid stores 8.
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(ignored),
        }
        return {}


def _group(said: Mapping[str, Any], where: str) -> int:
    return integer(said, "group_size" if "group_size" in said else "q_group_size", where, -1, 1 << 24)


FORMAT: Format = Awq()
