# SPDX-License-Identifier: Apache-2.0
"""Independent decoders for the proof, one per layout: bits are spread out one by one and summed as powers of two.

Shares no code with the packers or the readers, and reads what configurations say on its own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from discquant.errors import ProofError

Array = np.ndarray[Any, Any]
Read = Callable[[str], Tensor]
_CHUNK = 1 << 20  # bytes of words whose bits are spread out at a time
# Element order of AWQ's eight nibbles, lowest nibble first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Decoded(NamedTuple):
    """A layer as a file has it.

    Attributes:
        q: Codes, uint8, [rows, columns].
        scale: float64, [rows, groups].
        zero: Zero points (int64), or minima (float64, then `affine`), [rows, groups]; None for tables.
        affine: Whether weight = scale q + zero.
    """

    q: Array
    scale: Array
    zero: Array | None
    affine: bool = False


class Claim(NamedTuple):
    """What a configuration says of a module: bits, columns per scale (-1 the row), symmetric; kind of code."""

    num_bits: int
    group_size: int
    symmetric: bool | None
    kind: str = "int"


def codes_along_rows(words: Array, num_bits: int, count: int) -> Array:
    """Rows of little-endian words to codes, by single bits; idle bits after the last code must be zero."""
    stream = np.ascontiguousarray(words).astype("<i4").view(np.uint8)
    out = np.zeros((len(stream), count), dtype=np.uint8)
    step = max(1, _CHUNK // max(1, stream.shape[1]))
    for start in range(0, len(stream), step):
        bits = np.unpackbits(stream[start : start + step], axis=1, bitorder="little")
        if bits[:, count * num_bits :].any():
            raise ProofError("proof: bits after the last code are set")
        for place in range(num_bits):
            out[start : start + step] += bits[:, place : count * num_bits : num_bits] << place
    return out


def codes_by_word(words: Array, num_bits: int, count: int) -> Array:
    """The same for whole codes in each word (compressed-tensors before 0.18)."""
    held = 32 // num_bits
    stream = np.ascontiguousarray(words).astype("<i4").view(np.uint8)
    bits = np.unpackbits(stream, axis=1, bitorder="little").reshape(len(stream), -1, 32)[
        :, :, : held * num_bits
    ]
    bits = bits.reshape(len(stream), -1, num_bits)[:, :count]
    powers = (1 << np.arange(num_bits)).astype(np.uint8)
    found: Array = (bits * powers).sum(axis=2).astype(np.uint8)
    return found


def codes_of(format_name: str, words: Tensor, num_bits: int, shape: tuple[int, int], kind: str) -> Array:
    """Codes of the tensor that a format keeps them in, whatever its layout.

    Args:
        format_name: Name in the registry.
        words: The stored tensor.
        num_bits: Width of a code.
        shape: (out_features, in_features).
        kind: `int`, `affine`, `nvfp4` or `mxfp4`.

    Returns:
        uint8, [out_features, in_features], ascending with the levels.
    """
    rows, columns = shape
    array = words.view(torch.int32).numpy() if words.dtype == torch.uint32 else words.numpy()
    if kind in ("nvfp4", "mxfp4"):
        bits = np.unpackbits(array, axis=1, bitorder="little").reshape(rows, columns, 4)
        magnitude = bits[:, :, 0] + 2 * bits[:, :, 1] + 4 * bits[:, :, 2]
        found: Array = np.where(bits[:, :, 3] == 1, 7 - magnitude, 8 + magnitude).astype(np.uint8)
        return found
    if format_name in ("gptq", "gptq-v2", "autoround", "awq"):
        if array.shape == (columns, rows // 8) and num_bits == 4:
            transposed: Array = _awq(array).T
            return transposed
        return codes_along_rows(array.T, num_bits, columns)
    if array.shape[1] == -(-columns * num_bits // 32):
        return codes_along_rows(array, num_bits, columns)
    return codes_by_word(array, num_bits, columns)


def _awq(words: Array) -> Array:
    """AWQ words along their second axis to elements in order."""
    nibbles = codes_along_rows(words, 4, 8 * words.shape[1]).reshape(len(words), -1, 8)
    out = np.empty_like(nibbles)
    for place, element in enumerate(AWQ_ORDER):
        out[:, :, element] = nibbles[:, :, place]
    return out.reshape(len(words), -1)


def decode(
    format_name: str, read: Read, claim: Claim, shape: tuple[int, int], config: Mapping[str, Any]
) -> Decoded:
    """A layer by the format's own specification.

    Raises:
        ProofError: The tensors contradict one another.
    """
    rows, columns = shape
    bits = claim.num_bits
    if format_name == "compressed-tensors":
        q = codes_of(format_name, read("weight_packed"), bits, shape, claim.kind)
        if claim.kind == "nvfp4":
            # One float32 division, as the library's decompressor computes it.
            scale = (read("weight_scale").float() / read("weight_global_scale").float()).double().numpy()
            return Decoded(q, scale, None)
        if claim.kind == "mxfp4":
            return Decoded(q, 2.0 ** (read("weight_scale").numpy().astype(np.float64) - 127), None)
        _require(read("weight_shape").tolist() == [rows, columns], f"weight_shape is not {[rows, columns]}")
        scale = read("weight_scale").double().numpy()
        if claim.symmetric:
            return Decoded(q, scale, np.full(scale.shape, 1 << (bits - 1), dtype=np.int64))
        zero = codes_along_rows(read("weight_zero_point").numpy().T, bits, rows).T
        return Decoded(q, scale, zero.astype(np.int64))
    if format_name == "mlx":
        q = codes_of(format_name, read("weight"), bits, shape, claim.kind)
        return Decoded(q, read("scales").double().numpy(), read("biases").double().numpy(), affine=True)
    q = codes_of(format_name, read("qweight"), bits, shape, claim.kind)
    scale = read("scales").double().numpy().T
    words = read("qzeros").numpy()
    if q.shape != shape:
        raise ProofError(f"proof: codes have shape {q.shape}, not {shape}")
    stored = _awq(words) if _is_awq(format_name, config) else codes_along_rows(words, bits, rows)
    minus_one = format_name == "gptq" or config.get("packing_format") == "auto_round:auto_gptq"
    zero = (stored.astype(np.int64) + int(minus_one)) % (1 << bits)
    if format_name in ("gptq", "gptq-v2"):
        size = columns if claim.group_size == -1 else claim.group_size
        _require(
            read("g_idx").tolist() == [k // size for k in range(columns)], "g_idx is not column // group"
        )
    return Decoded(q, scale, zero.T)


def _is_awq(format_name: str, config: Mapping[str, Any]) -> bool:
    return format_name == "awq" or config.get("packing_format") == "auto_round:auto_awq"


def suffixes(format_name: str, kind: str, symmetric: bool) -> set[str]:
    """Tensors that a layer has in a format."""
    if format_name == "compressed-tensors":
        if kind == "nvfp4":
            return {"weight_packed", "weight_scale", "weight_global_scale"}
        if kind == "mxfp4":
            return {"weight_packed", "weight_scale"}
        found = {"weight_packed", "weight_scale", "weight_shape"}
        return found if symmetric else found | {"weight_zero_point"}
    if format_name == "mlx":
        return {"weight", "scales", "biases"}
    found = {"qweight", "qzeros", "scales"}
    return found | {"g_idx"} if format_name in ("gptq", "gptq-v2") else found


def name_of(config: Mapping[str, Any]) -> str:
    """Which format a config.json declares.

    Raises:
        ProofError: None that is proven here.
    """
    said = config.get("quantization_config")
    said = said if isinstance(said, dict) else {}
    method = said.get("quant_method")
    if method == "gptq":
        return "gptq-v2" if said.get("checkpoint_format") == "gptq_v2" else "gptq"
    known = {"compressed-tensors": "compressed-tensors", "auto-round": "autoround", "awq": "awq"}
    if method in known:
        return known[method]
    _require(
        "quantization" in config and method is None, f"config.json declares {method}, which is not proven"
    )
    return "mlx"


def claimed(format_name: str, config: Mapping[str, Any], name: str) -> Claim:
    """What config.json says of a module.

    Raises:
        ProofError: It says that the module is not quantized, or nothing.
    """
    if format_name == "mlx":
        table = config["quantization"]
        own = table.get(name, table)
        _require(own is not False, f"config.json tells engines that {name} is not quantized")
        return Claim(own["bits"], own["group_size"], None, "affine")
    said = config["quantization_config"]
    if format_name == "compressed-tensors":
        return _claimed_by_group(said, name)
    if format_name == "awq":
        skipped = said.get("modules_to_not_convert") or []
        part = next((part for part in skipped if part in name), None)
        _require(part is None, f"config.json tells engines to ignore {name}, which contains {part}")
        return Claim(said["bits"], said["group_size"], None)
    if format_name == "autoround":
        own = {**said, **_claimed_by_extra(said, name)}
        return Claim(own["bits"], own["group_size"], own["sym"])
    _require(name != "lm_head" or said["lm_head"], "config.json does not tell engines to quantize lm_head")
    own = dict(said)
    for pattern, override in said.get("dynamic", {}).items():
        if _compiled(pattern[2:]).match(name):  # the first one counts
            _require(pattern[:2] == "+:", f"config.json tells engines to ignore {name}")
            own |= override
            break
    return Claim(own["bits"], own["group_size"], own["sym"])


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as cause:
        raise ProofError(f"proof: config.json holds {pattern!r}, which is no regular expression") from cause


def _claimed_by_extra(said: Mapping[str, Any], name: str) -> dict[str, Any]:
    """AutoRound's entry for a module; without one it must lie in a block, and no other entry's name may be in it.

    auto-round searches names that are none of its linear layers' (a router's) as patterns in those that are.
    """
    extra: Mapping[str, dict[str, Any]] = said.get("extra_config", {})
    if name in extra:
        return extra[name]
    blocks = said["block_name_to_quantize"].split(",")
    _require(
        any(name.startswith(block) for block in blocks),
        f"config.json does not tell engines to quantize {name}",
    )
    plain = next((key for key, row in extra.items() if key in name and row["bits"] >= 16), None)
    _require(plain is None, f"config.json tells engines to ignore {name}, which contains {plain}")
    return {}


def _claimed_by_group(said: Mapping[str, Any], name: str) -> Claim:
    matches = any(_matches(rule, name) or rule == name for rule in said.get("ignore", []))
    _require(not matches, f"config.json tells engines to ignore {name}")
    # Exact names come first, then patterns, then the class.
    for asked in (name.__eq__, functools.partial(_matches, name=name), "Linear".__eq__):
        for group in said.get("config_groups", {}).values():
            if not any(asked(target) for target in group["targets"]):
                continue
            weights = group["weights"]
            kind = "int"
            if weights["type"] == "float":
                kind = {"tensor_group": "nvfp4", "group": "mxfp4"}[weights["strategy"]]
            size = -1 if weights["strategy"] == "channel" else weights["group_size"]
            return Claim(weights["num_bits"], size, weights["symmetric"], kind)
    raise ProofError(f"proof: config.json has no group for {name}")


def _matches(rule: str, name: str) -> bool:
    return rule.startswith("re:") and _compiled(rule[3:]).match(name) is not None


def levels(kind: str) -> Array:
    """Levels of a table, ascending, float64."""
    assert kind in ("nvfp4", "mxfp4")
    upper = np.array(E2M1)
    return np.concatenate([-upper[::-1], upper])


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ProofError(f"proof: {message}")
