# SPDX-License-Identifier: Apache-2.0
"""GPTQ, `gptq` (v1: zero points stored less one) and `gptq_v2` (stored as they are); 2, 3, 4 and 8 bits.

Codes are packed along in_features, zero points along out_features, both as the dense bit stream D_b.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import discquant
from discquant.errors import CheckpointError, UnrepresentableError
from discquant.formats.bitstream import pack, unpack, words_for
from discquant.formats.checkpoint import Checkpoint, stated_quantization
from discquant.formats.coded import CodedLayer, Format
from discquant.formats.layout import StoredLayer
from discquant.formats.safetensors_file import TensorInfo, read_tensor
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
from discquant.formats.stated import contradictions, old_quantization, override, quantization, stated_in
from discquant.grids import UniformGrid
from discquant.grids.fused import JOINED, experts_of

CODES, ZEROS, SCALES, INDEX = "qweight", "qzeros", "scales", "g_idx"
WIDTHS = (2, 3, 4, 8)
FLOATS = "F16 BF16 F32"
_JOINED = {member: whole for whole, members in JOINED for member in members}


class Gptq(SafetensorsFormat):
    """See `coded.Format`; `offset` is what the file's zero points lack."""

    codes = CODES
    aside = (INDEX,)

    def __init__(self, name: str, checkpoint_format: str, offset: int) -> None:
        self.name, self.checkpoint_format, self.offset = name, checkpoint_format, offset

    def claims(self, config: Mapping[str, Any]) -> bool:
        """By quant_method and checkpoint_format; files that name none are v1."""
        said = stated_quantization(config)
        if not isinstance(said, dict) or said.get("quant_method") != "gptq":
            return False
        return self._is_mine(said)

    def _is_mine(self, said: Mapping[str, Any]) -> bool:
        named = said.get("checkpoint_format") or said.get("format") or "gptq"
        return bool(named == self.checkpoint_format)

    def detects(self, path: Path) -> bool:
        """By config.json; AutoGPTQ once wrote quantize_config.json alone, which often names no method."""
        if super().detects(path):
            return True
        said = old_quantization(path, "quantize_config.json", CODES)
        return said is not None and said.get("quant_method", "gptq") == "gptq" and self._is_mine(said)

    def layers(self, checkpoint: Checkpoint) -> Iterator[StoredLayer]:
        """Modules with a `qweight`."""
        said = quantization(checkpoint)
        bits, group_size = width_and_group(said, checkpoint)
        for name, tensors in grouped(checkpoint, CODES, (CODES, ZEROS, SCALES, INDEX)):
            symmetric = {**said, **(override(said, name) or {})}.get("sym", True) is True
            yield stored_layer(name, tensors, bits, group_size, symmetric, self.offset)

    def decode(self, stored: StoredLayer) -> CodedLayer:
        """Codes and grid."""
        return decode(stored, self.name)

    def repack(self, stored: StoredLayer, q: Tensor) -> Tensor:
        """Along in_features."""
        return pack_codes(q, stored.scheme.num_bits)

    def check_scheme(self, name: str, shape: tuple[int, int], scheme: Scheme) -> None:
        """Refuse widths, kinds and shapes without a place."""
        check_scheme(self.name, name, shape, scheme)

    def encode(self, layer: CodedLayer, served: torch.dtype) -> dict[str, Tensor]:
        """Tensors by suffix, with the trivial g_idx."""
        columns = layer.q.shape[1]
        size = columns if layer.grid.group_size == -1 else layer.grid.group_size
        index = torch.arange(columns, dtype=torch.int32) // max(1, size)
        return {**encode(layer, self.offset, self.name), INDEX: index}

    def encoded_bytes(self, shape: tuple[int, int], scheme: Scheme) -> int:
        """Bytes that `encode` will need."""
        return encoded_bytes(shape, scheme) + 4 * shape[1]

    def configure(
        self, config: dict[str, Any], schemes: Mapping[str, Scheme], ignored: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        """quantize_config.json and the same in config.json."""
        base = most_common(schemes)
        # `lm_head` has an entry of its own.
        rules: dict[str, dict[str, Any] | None] = {name: None for name in ignored if name != "lm_head"}
        for name, scheme in schemes.items():
            entries = {"bits": scheme.num_bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
            rules[name] = {} if scheme == base else entries
        said = {
            "bits": base.num_bits,
            "group_size": base.group_size,
            "desc_act": False,
            "sym": base.symmetric,
            "lm_head": "lm_head" in schemes,
            "quant_method": "gptq",
            "checkpoint_format": self.checkpoint_format,
            "format": self.checkpoint_format,
            "pack_dtype": "int32",
            "dynamic": _dynamic(rules),
            "true_sequential": True,
            "damp_percent": 0.01,
            "meta": {"quantizer": [f"discquant:{discquant.__version__}"]},
        }
        config["quantization_config"] = said
        return {"quantize_config.json": said}

    def notes(self, checkpoint: Checkpoint) -> Iterator[str]:
        """Act-order."""
        yield from act_order_note(self.layers(checkpoint))

    def problems(self, checkpoint: Checkpoint) -> Iterator[str]:
        """Where shapes contradict the configuration."""
        said = quantization(checkpoint)
        yield from contradictions(said, *width_and_group(said, checkpoint), self.layers(checkpoint))


def width_and_group(said: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[int, int]:
    """Bits and group size that a configuration says of all modules.

    Raises:
        CheckpointError: One is missing or impossible.
    """
    where = f"{checkpoint.path}/{stated_in(checkpoint)}"
    return integer(said, "bits", where, 2, 8), integer(said, "group_size", where, -1, 1 << 24)


def stored_layer(
    name: str,
    tensors: Mapping[str, TensorInfo],
    bits: int,
    group_size: int,
    symmetric: bool,
    zero_offset: int,
) -> StoredLayer:
    """A layer of a file; its width and group are what its own shapes say, the configuration's where both fit.

    Per-layer overrides (`dynamic`, `extra_config`) so need no interpretation.

    Raises:
        CheckpointError: The shapes contradict one another.
    """
    packed, rows = expect_matrix(name, tensors, CODES, "I32")
    groups, zero_words = expect_matrix(name, tensors, ZEROS, "I32")
    expect(name, tensors, SCALES, FLOATS, (groups, rows))
    columns = None
    if INDEX in tensors:
        info = tensors[INDEX]
        columns = info.shape[0] if len(info.shape) == 1 else 0
        expect(name, tensors, INDEX, "I32 I64", (columns,))
    for width in dict.fromkeys((bits, *WIDTHS)):
        count = packed * 32 // width if columns is None else columns
        if width in WIDTHS and words_for(rows, width) == zero_words and words_for(count, width) == packed:
            size = group_of(name, count, groups, group_size)
            return StoredLayer(name, (rows, count), Scheme(width, size, symmetric), tensors, zero_offset)
    raise CheckpointError(
        f"{name}: {CODES} {[packed, rows]} and {ZEROS} {[groups, zero_words]} fit no width of {list(WIDTHS)} bits"
    )


def group_of(name: str, columns: int, groups: int, said: int) -> int:
    """Columns per group: what the configuration says if that gives so many groups, else columns / groups.

    Raises:
        CheckpointError: Neither fits.
    """
    if groups == 1 and (said == -1 or said >= columns):
        return -1
    if said > 0 and -(-columns // said) == groups:
        return said
    if columns % groups:
        raise CheckpointError(f"{name}: {columns} columns make no {groups} groups")
    return -1 if groups == 1 else columns // groups


def decode(stored: StoredLayer, format_name: str) -> CodedLayer:
    """Codes and grid of a layer.

    Raises:
        UnrepresentableError: A zero point of 0 in v1, which engines read differently.
    """
    (rows, columns), bits = stored.shape, stored.scheme.num_bits
    q = unpack(stored.read(CODES), bits, columns, dim=0).T.contiguous()
    zero = unpack(stored.read(ZEROS), bits, rows)
    if stored.zero_offset and bool((zero == (1 << bits) - 1).any()):
        raise UnrepresentableError(
            f"{format_name}: {stored.name} stores zero points of 0, which in v1 some engines read as {1 << bits} and "
            "some let spill into the next; convert the file to gptq_v2 first"
        )
    zero = (zero + stored.zero_offset).T.contiguous()
    scale = stored.read(SCALES).T.contiguous()
    symmetric = bool((zero == 1 << (bits - 1)).all())
    index = stored.read(INDEX) if INDEX in stored.tensors else None
    size = columns if stored.scheme.group_size == -1 else stored.scheme.group_size
    if index is not None and torch.equal(index.long(), torch.arange(columns) // size):
        index = None
    grid = UniformGrid(
        bits, stored.scheme.group_size, symmetric, scale, None if symmetric else zero, g_idx=index
    )
    return CodedLayer(stored.name, q, grid)


def pack_codes(q: Tensor, bits: int) -> Tensor:
    """qweight, int32 [ceil(in_features * b / 32), out_features]."""
    return pack(q, bits).T.contiguous()


def encode(layer: CodedLayer, offset: int, format_name: str) -> dict[str, Tensor]:
    """qweight, qzeros and scales of a layer.

    Raises:
        UnrepresentableError: The grid is not uniform, a scale is no float16, or a zero point is 0 in v1.
    """
    scale, zero = uniform(layer, format_name)
    if offset and bool((zero == 0).any()):
        raise UnrepresentableError(
            f"{format_name}: {layer.name} has a zero point of 0, which v1 cannot hold safely; write gptq-v2, or use "
            "a symmetric grid"
        )
    stored = exact(layer.name, "scale", scale.cpu(), torch.float16, format_name).T.contiguous()
    zeros = pack((zero.cpu() - offset).T.contiguous(), layer.grid.num_bits)
    return {CODES: pack_codes(layer.q, layer.grid.num_bits), ZEROS: zeros, SCALES: stored}


def encoded_bytes(shape: tuple[int, int], scheme: Scheme) -> int:
    """Bytes that `encode` needs."""
    (rows, columns), bits = shape, scheme.num_bits
    groups = scheme.groups(columns)
    return 4 * words_for(columns, bits) * rows + groups * (4 * words_for(rows, bits) + 2 * rows)


def check_scheme(format_name: str, name: str, shape: tuple[int, int], scheme: Scheme) -> None:
    """Refuse widths, kinds and shapes that GPTQ's layout has no place for.

    Raises:
        UnrepresentableError: The message names the module.
    """
    if scheme.kind != "int" or scheme.num_bits not in WIDTHS:
        raise UnrepresentableError(f"{format_name} holds integers of 2, 3, 4 and 8 bits; {name} is {scheme}")
    unit = 32 if scheme.num_bits == 3 else 32 // scheme.num_bits
    if shape[0] % unit or shape[1] % unit:
        raise UnrepresentableError(
            f"{format_name} needs rows and columns in multiples of {unit} at {scheme.num_bits} bits; {name} is "
            f"{shape[0]} x {shape[1]}: ignore it"
        )
    if scheme.group_size != -1 and shape[1] % scheme.group_size:
        raise UnrepresentableError(
            f"{format_name}: the {shape[1]} columns of {name} are no multiple of the group size {scheme.group_size}"
        )


def most_common(schemes: Mapping[str, Scheme]) -> Scheme:
    """The scheme of most layers, which the configuration states once; groups rather than rows where both occur."""
    found = list(schemes.values())
    if not found:
        return Scheme(4, 128, True)
    return max(dict.fromkeys(found), key=lambda scheme: (found.count(scheme), scheme.group_size))


def act_order_note(layers: Iterable[StoredLayer]) -> Iterator[str]:
    """A sentence where the first layer's groups are not contiguous."""
    for stored in layers:
        if INDEX in stored.tensors:
            size = stored.shape[1] if stored.scheme.group_size == -1 else stored.scheme.group_size
            index = read_tensor(stored.tensors[INDEX]).long()
            if not torch.equal(index, torch.arange(stored.shape[1]) // size):
                yield "act-order (g_idx): Humming and current vLLM refuse it"
        break


def _dynamic(rules: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    """Regular expressions of full names, `-:` for what is not quantized, `+:` for what differs from the rest.

    An engine that joins modules (vLLM: q, k and v, a block's experts) asks for the joined name alone, so where all
    parts agree, the expression is of that name, too.

    Args:
        rules: By module, its entries; none where it is as all, None where it is not quantized.
    """
    joined: dict[str, list[str]] = {}
    for name in rules:
        joined.setdefault(_joined(name), []).append(name)
    found: dict[str, Any] = {}
    for whole, parts in joined.items():
        agree = all(rules[part] == rules[parts[0]] for part in parts)
        for names in [parts] if agree else [[part] for part in parts]:
            own = rules[names[0]]
            if own != {}:
                found[f"{'-' if own is None else '+'}:{_pattern(whole, names)}"] = own or {}
    return found


def _joined(name: str) -> str:
    """Name of the module that vLLM makes of this one and others: itself where it stays alone."""
    parent, dot, last = name.rpartition(".")
    return experts_of(name) or parent + dot + _JOINED.get(last, last)


def _pattern(whole: str, names: Sequence[str]) -> str:
    """An expression that matches these names, and where they are several the module `whole` that they make."""
    if whole.endswith(".experts") and (len(names) > 1 or names[0] == whole):
        return f"^{re.escape(whole)}(?:\\.|$)"  # there are hundreds
    if len(names) == 1:
        return f"^{re.escape(names[0])}$"
    parent, dot, last = whole.rpartition(".")
    lasts = [*(name.rpartition(".")[2] for name in names), last]
    return f"^{re.escape(parent + dot)}(?:{'|'.join(map(re.escape, lasts))})$"


GPTQ: Format = Gptq("gptq", "gptq", 1)
GPTQ_V2: Format = Gptq("gptq-v2", "gptq_v2", 0)
