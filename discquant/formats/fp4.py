# SPDX-License-Identifier: Apache-2.0
"""The e2m1 layouts of compressed-tensors: `nvfp4-pack-quantized` and `mxfp4-pack-quantized`.

Two nibbles a byte, low one first; a nibble is sign, two exponent bits, one mantissa bit. NVFP4: e4m3 scales per 16
columns, divided by one float32 of the tensor. MXFP4: e8m0 exponents per 32 columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from discquant.errors import UnrepresentableError
from discquant.formats.coded import CodedLayer
from discquant.formats.compressed_tensors import PACKED, SCALE
from discquant.formats.layout import StoredLayer
from discquant.formats.safetensors_file import TensorInfo
from discquant.formats.safetensors_format import expect, expect_matrix
from discquant.formats.scheme import Scheme
from discquant.grids.table import TableGrid, e2m1_codes, e2m1_nibbles

GLOBAL = "weight_global_scale"
# The release that the layouts were checked against; older ones were not.
MINIMUM_LIBRARY = {"nvfp4": "0.20.0", "mxfp4": "0.20.0"}
_GROUPS = {"nvfp4": 16, "mxfp4": 32}


def pack_nibbles(q: Tensor) -> Tensor:
    """Ascending codes to bytes of two nibbles; uint8, [out_features, in_features / 2]."""
    nibbles = e2m1_nibbles(q)
    return (nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).contiguous()


def check_shape(name: str, shape: tuple[int, int], scheme: Scheme) -> None:
    """Refuse rows that are no whole number of blocks.

    Raises:
        UnrepresentableError: The message names the module.
    """
    size = _GROUPS[scheme.kind]
    if shape[1] % size or scheme.group_size != size:
        raise UnrepresentableError(
            f"{scheme.kind} has blocks of {size} columns; {name} has {shape[1]} and group {scheme.group_size}"
        )


def encoded_bytes(shape: tuple[int, int], scheme: Scheme) -> int:
    """Bytes that `encode` needs."""
    rows, columns = shape
    return rows * columns // 2 + rows * columns // _GROUPS[scheme.kind] + (4 if scheme.kind == "nvfp4" else 0)


def encode(layer: CodedLayer) -> dict[str, Tensor]:
    """Tensors of a layer by suffix.

    Raises:
        UnrepresentableError: Its grid has no block scales to store.
    """
    grid = layer.grid
    if not isinstance(grid, TableGrid) or grid.block_scale is None or grid.kind not in _GROUPS:
        raise UnrepresentableError(
            f"compressed-tensors: {layer.name}: of look-up tables only nvfp4 and mxfp4 have a place, got "
            f"{getattr(grid, 'kind', type(grid).__name__)}"
        )
    tensors = {PACKED: pack_nibbles(layer.q), SCALE: grid.block_scale.contiguous()}
    if grid.kind == "nvfp4":
        assert grid.tensor_scale is not None
        tensors[GLOBAL] = grid.tensor_scale.float().reshape(1)
    return tensors


def stored_layer(name: str, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> StoredLayer:
    """A layer of a file, checked by its headers.

    Raises:
        CheckpointError: A tensor is missing or has another shape or dtype.
    """
    rows, half = expect_matrix(name, tensors, PACKED, "U8")
    columns = 2 * half
    dtype = "F8_E4M3" if scheme.kind == "nvfp4" else "U8"
    expect(name, tensors, SCALE, dtype, (rows, -(-columns // _GROUPS[scheme.kind])))
    if scheme.kind == "nvfp4":
        expect(name, tensors, GLOBAL, "F32", (1,))
    return StoredLayer(name, (rows, columns), scheme, tensors)


def decode(stored: StoredLayer) -> CodedLayer:
    """Codes and grid of a layer."""
    packed = stored.read(PACKED)
    nibbles = torch.stack((packed & 15, packed >> 4), dim=2).reshape(stored.shape)
    if stored.scheme.kind == "nvfp4":
        grid = TableGrid.nvfp4(stored.read(SCALE), stored.read(GLOBAL))
    else:
        grid = TableGrid.mxfp4(stored.read(SCALE))
    return CodedLayer(stored.name, e2m1_codes(nibbles).to(torch.uint8), grid)
