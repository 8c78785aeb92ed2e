# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors behind the interface of all formats: integers, and the e2m1 tables it serves (NVFP4, MXFP4)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from discquant.errors import CheckpointError, UnrepresentableError
from discquant.formats import fp4
from discquant.formats.checkpoint import Checkpoint, stated_quantization
from discquant.formats.coded import CodedLayer, Format
from discquant.formats.compressed_tensors import (
    GROUP_INDEX,
    LAYOUTS,
    MINIMUM_LIBRARY,
    PACKED,
    SCALE,
    SHAPE,
    ZERO,
    act_order,
    activations,
    check_representable,
    decode,
    encode,
    encoded_bytes,
    fits_layout,
    parse_config,
    quantization_config,
    repack_like,
)
from discquant.formats.layout import StoredLayer
from discquant.formats.safetensors_file import read_tensor
from discquant.formats.safetensors_format import SafetensorsFormat, expect, expect_matrix, grouped
from discquant.formats.scheme import Scheme
from discquant.grids import UniformGrid
from discquant.grids.fused import FUSED

_FLOATS = "BF16 F16 F32"
# How activations are rounded, where a file quantizes them: of a layer, and of attention's cache.
_PARTS = ("scale", "zero_point", "global_scale")
_ACTIVATIONS = frozenset(f"{what}_{part}" for what in ("input", "output") for part in _PARTS)
_CACHE = frozenset(f"{what}_{part}" for what in "kv" for part in _PARTS)


class CompressedTensors(SafetensorsFormat):
    """See `coded.Format` and `safetensors_format.SafetensorsFormat`."""

    name = "compressed-tensors"
    codes = PACKED
    aside = (SHAPE, GROUP_INDEX, fp4.GLOBAL)

    def claims(self, config: Mapping[str, Any]) -> bool:
        """By quant_method."""
        said = stated_quantization(config)
        return isinstance(said, dict) and said.get("quant_method") == self.name

    def layers(self, checkpoint: Checkpoint) -> Iterator[StoredLayer]:
        """Modules with a `weight_packed`."""
        said = _said(checkpoint)
        scheme_of = parse_config(said, f"{checkpoint.path}/config.json")
        ordered = act_order(said)
        suffixes = (PACKED, SCALE, SHAPE, ZERO, GROUP_INDEX, fp4.GLOBAL)
        for name, tensors in grouped(checkpoint, PACKED, suffixes):
            scheme = scheme_of(name)
            if scheme.kind != "int":
                yield fp4.stored_layer(name, tensors, scheme)
                continue
            expect(name, tensors, SHAPE, "I64 I32", (2,))
            rows, columns = (int(number) for number in read_tensor(tensors[SHAPE]).tolist())
            packed = expect_matrix(name, tensors, PACKED, "I32")
            # The words bound the claimed shape, so that no memory is taken on a claim alone.
            if packed[0] != rows or columns < 1 or not fits_layout(packed[1], columns, scheme.num_bits):
                raise CheckpointError(
                    f"{name}: {PACKED} {list(packed)} cannot hold {[rows, columns]} codes of {scheme.num_bits} bits"
                )
            if scheme.group_size > columns or columns % max(1, scheme.group_size):
                raise CheckpointError(f"{name}: {columns} columns are no multiple of {scheme.group_size}")
            expect(name, tensors, SCALE, _FLOATS, (rows, scheme.groups(columns)))
            if GROUP_INDEX in tensors or ordered:  # without it nobody knows which scale a column has
                expect(name, tensors, GROUP_INDEX, "I32 I64", (columns,))
            yield StoredLayer(name, (rows, columns), scheme, tensors)

    def decode(self, stored: StoredLayer) -> CodedLayer:
        """Codes and grid."""
        if stored.scheme.kind != "int":
            return fp4.decode(stored)

        def read(suffix: str) -> Tensor | None:
            return stored.read(suffix) if suffix in stored.tensors else None

        layer = decode(stored.name, read, stored.scheme)
        index = read(GROUP_INDEX)
        if index is None or torch.equal(index, torch.arange(len(index)) // max(1, layer.columns_per_group)):
            return CodedLayer.of(layer)
        grid = UniformGrid(
            layer.num_bits, layer.group_size, layer.symmetric, layer.scale, layer.zero_point, g_idx=index
        )
        return CodedLayer(stored.name, layer.q, grid)

    def passive(self, checkpoint: Checkpoint, coded: Collection[str]) -> set[str]:
        """Scales of quantized activations."""
        cache = bool(_said(checkpoint).get("kv_cache_scheme"))
        split = {key: key.rpartition(".") for key in checkpoint.tensors}
        return {
            key
            for key, (name, _, suffix) in split.items()
            if (name in coded and suffix in _ACTIVATIONS) or (cache and suffix in _CACHE)
        }

    def beyond_weights(self, checkpoint: Checkpoint) -> str:
        """Quantized activations."""
        said = _said(checkpoint)
        parse_config(said, f"{checkpoint.path}/config.json")  # else its groups may be anything
        return activations(said)

    def repack(self, stored: StoredLayer, q: Tensor) -> Tensor:
        """Dense or 10 per word, as the file has it."""
        if stored.scheme.kind != "int":
            return fp4.pack_nibbles(q)
        return repack_like(stored.tensors[PACKED].shape[1], q, stored.scheme.num_bits)

    def check_scheme(self, name: str, shape: tuple[int, int], scheme: Scheme) -> None:
        """Refuse unserved tables, widths outside 2..8 and shorter last groups."""
        if scheme.kind not in LAYOUTS:
            raise UnrepresentableError(
                f"compressed-tensors serves no {scheme.words}: {name}; besides integers with scales and zero points "
                "it has nvfp4 and mxfp4"
            )
        if scheme.kind != "int":
            fp4.check_shape(name, shape, scheme)
        check_representable(name, shape, scheme)

    def encode(self, layer: CodedLayer, served: torch.dtype) -> dict[str, Tensor]:
        """Tensors by suffix; scales in the dtype that the engine runs in."""
        if Scheme.of_grid(layer.grid).kind != "int":
            return fp4.encode(layer)
        scale_dtype = torch.float16 if served == torch.float16 else torch.bfloat16
        found = encode(layer.linear(self.name), scale_dtype)
        return {key.rpartition(".")[2]: tensor for key, tensor in found.items()}

    def encoded_bytes(self, shape: tuple[int, int], scheme: Scheme) -> int:
        """Bytes that `encode` will need."""
        return encoded_bytes(shape, scheme) if scheme.kind == "int" else fp4.encoded_bytes(shape, scheme)

    def configure(
        self, config: dict[str, Any], schemes: Mapping[str, Scheme], ignored: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        """The quantization_config entry."""
        config["quantization_config"] = quantization_config(schemes, ignored)
        return {}

    def requires(self, schemes: Mapping[str, Scheme]) -> dict[str, str | None]:
        """The library version that reads it."""
        needed = [
            MINIMUM_LIBRARY[scheme.num_bits] if scheme.kind == "int" else fp4.MINIMUM_LIBRARY[scheme.kind]
            for scheme in schemes.values()
        ]
        return {"compressed-tensors": max(needed, key=_version, default=None)}

    def notes(self, checkpoint: Checkpoint) -> Iterator[str]:
        """Act-order, and the layout before 0.18."""
        yield from super().notes(checkpoint)
        if any(key.endswith(f".{GROUP_INDEX}") for key in checkpoint.tensors):
            yield "act-order (weight_g_idx): Humming and current vLLM refuse it"
        for stored in self.layers(checkpoint):
            bits, words = stored.scheme.num_bits, stored.tensors[PACKED].shape[1]
            if stored.scheme.kind == "int" and words != -(-stored.shape[1] * bits // 32):
                yield f"{bits}-bit codes lie {32 // bits} to a word, as compressed-tensors wrote them before 0.18"
                break

    def problems(self, checkpoint: Checkpoint) -> Iterator[str]:
        """NVFP4's global scales that differ where engines keep only one."""
        yield from super().problems(checkpoint)
        stored = {layer.name: layer for layer in self.layers(checkpoint) if fp4.GLOBAL in layer.tensors}
        for name in stored:
            parent, _, last = name.rpartition(".")
            for members in FUSED:
                names = [f"{parent}.{member}" for member in members if f"{parent}.{member}" in stored]
                if last not in members or name != names[0]:
                    continue
                fused = [stored[key] for key in names]
                if len({float(layer.read(fp4.GLOBAL)) for layer in fused}) > 1:
                    yield (
                        f"{parent}: engines fuse {', '.join(members)} and keep one global scale, but the file's differ"
                    )


def _said(checkpoint: Checkpoint) -> dict[str, Any]:
    said = stated_quantization(checkpoint.config())
    if not isinstance(said, dict):
        raise CheckpointError(f"{checkpoint.path} is not quantized: config.json has no quantization_config")
    return said


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


FORMAT: Format = CompressedTensors()
