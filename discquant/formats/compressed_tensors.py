# SPDX-License-Identifier: Apache-2.0
"""The compressed-tensors `pack-quantized` format: integer codes to stored tensors and back, and its configuration.

Written directly from codes: the library's own save path would quantize floats again. Dense codes only (library 0.18
and later); the reader also takes the older layout of 3, 5, 6 and 7 bits, told apart by shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from discquant.errors import CheckpointError, UnrepresentableError
from discquant.formats.bitstream import pack, pack_per_word, unpack, unpack_per_word, words_for
from discquant.formats.codes import QuantizedLinear
from discquant.formats.patterns import compiles, matches
from discquant.formats.scheme import Scheme
from discquant.grids.fused import experts_of

__all__ = [
    "GROUP_INDEX",
    "MINIMUM_LIBRARY",
    "PACKED",
    "SCALE",
    "SHAPE",
    "ZERO",
    "Scheme",
    "act_order",
    "activations",
    "check_representable",
    "decode",
    "encode",
    "encoded_bytes",
    "parse_config",
    "quantization_config",
    "repack_like",
]
PACKED, SCALE, SHAPE, ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
GROUP_INDEX = "weight_g_idx"
# What a configuration group calls its tensors' layout, by kind of scheme.
LAYOUTS = {"int": "pack-quantized", "nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}
# 1, 2, 4 and 8 bits lie in words alike before and since 0.18; the others do not.
MINIMUM_LIBRARY = {bits: "0.15.0" if bits in (2, 4, 8) else "0.18.0" for bits in range(2, 9)}


def check_representable(name: str, shape: tuple[int, int], scheme: Scheme) -> None:
    """Refuse what the format cannot hold.

    Args:
        name: Module path, for the message.
        shape: (out_features, in_features).
        scheme: Its grid.

    Raises:
        UnrepresentableError: A shorter last group, or num_bits outside 2..8; the message names the module.
    """
    if not 2 <= scheme.num_bits <= 8:
        raise UnrepresentableError(
            f"compressed-tensors: {name}: num_bits must be in 2..8, got {scheme.num_bits}"
        )
    if scheme.group_size != -1 and (scheme.group_size < 1 or shape[1] % scheme.group_size):
        raise UnrepresentableError(
            f"compressed-tensors cannot hold {name}: its {shape[1]} input columns are no multiple of the group size "
            f"{scheme.group_size}; choose a group size that divides it, -1 (whole rows), or ignore the module"
        )


def encoded_bytes(shape: tuple[int, int], scheme: Scheme) -> int:
    """Bytes that `encode` needs for a layer of this shape."""
    rows, columns = shape
    groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
    zero = 0 if scheme.symmetric else 4 * words_for(rows, scheme.num_bits) * groups
    return 4 * rows * words_for(columns, scheme.num_bits) + 2 * rows * groups + zero + 16


def encode(layer: QuantizedLinear, scale_dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Stored tensors of a layer, by full name.

    Args:
        layer: Codes and grid.
        scale_dtype: bfloat16 or float16, the dtype the engine runs in.

    Returns:
        `weight_packed` int32 [N, ceil(K*b/32)], `weight_scale` [N, G], `weight_shape` int64 [2], and for asymmetric
        grids `weight_zero_point` int32 [ceil(N*b/32), G].

    Raises:
        UnrepresentableError: See check_representable; or a scale is not exact in scale_dtype.

    Source:
        formats.md section 4.
    """
    rows, columns = layer.q.shape
    check_representable(layer.name, (rows, columns), Scheme.of(layer))
    scale = layer.scale.to(scale_dtype)
    if not torch.equal(scale.double(), layer.scale.double()):
        raise UnrepresentableError(
            f"compressed-tensors: {layer.name}: scale must be exact in {scale_dtype}, in which the model is served; "
            "scales of GGUF's kinds are float16: take --format gguf, or quantize on a uniform grid (no --kind)"
        )
    tensors = {
        PACKED: pack(layer.q, layer.num_bits),
        SCALE: scale.contiguous(),
        SHAPE: torch.tensor([rows, columns], dtype=torch.int64),
    }
    if layer.zero_point is not None:
        tensors[ZERO] = pack(layer.zero_point, layer.num_bits, dim=0)
    return {f"{layer.name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def decode(name: str, read: Callable[[str], Tensor | None], scheme: Scheme) -> QuantizedLinear:
    """Codes and grid of a stored layer.

    Args:
        name: Module path.
        read: Gives a stored tensor by suffix, e.g. `weight_packed`; None where there is none.
        scheme: From the configuration.

    Raises:
        CheckpointError: A tensor is missing, or its shape fits neither layout.

    Note:
        With act-order (`weight_g_idx`) the columns still lie in the original order; which scale each has is the
        caller's to look up.
    """
    stored = {suffix: _required(name, suffix, read(suffix)) for suffix in (PACKED, SCALE, SHAPE)}
    shape = stored[SHAPE].tolist()
    if len(shape) != 2 or min(shape) < 0:
        raise CheckpointError(f"{name}.{SHAPE} must hold [out_features, in_features], got {shape}")
    rows, columns = shape
    check_representable(name, (rows, columns), scheme)
    scale, bits = stored[SCALE], scheme.num_bits
    groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
    if scale.shape != (rows, groups):
        raise CheckpointError(f"{name}.{SCALE} must have shape [{rows}, {groups}], got {list(scale.shape)}")
    packed = {PACKED: (stored[PACKED], 1, (rows, columns))}
    zero = None
    if not scheme.symmetric:
        words = _required(name, ZERO, read(ZERO))
        if words.dtype == torch.int8:  # libraries before packed zero points stored the signed value as it is
            zero = (words.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
        else:
            packed[ZERO] = (words, 0, (rows, groups))
    codes = _unpacked(name, packed, bits)
    q, zero = codes[PACKED], codes.get(ZERO, zero)
    return QuantizedLinear(name, q, scale, zero, bits, scheme.group_size)


def quantization_config(schemes: Mapping[str, Scheme], ignore: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` entry of config.json.

    Args:
        schemes: Scheme of every quantized module. If all agree, one group targets `Linear`; else each group names its
            modules, and the experts of a layer by one pattern where they agree.
        ignore: Modules that stay as they are; of one that holds experts, all that engines make of it.

    Note:
        vLLM asks for experts as `gate_proj`, `up_proj` and `down_proj` whatever the file calls them, and transformers
        takes the first group whose patterns contain "experts" for those of all layers: names reach neither.
    """
    ignored = [*ignore]
    states: dict[str, set[Scheme | None]] = {}  # None is ignored
    for name, state in (*schemes.items(), *((name, None) for name in ignored)):
        experts = experts_of(name) or name
        if experts.endswith(".experts"):
            states.setdefault(experts, set()).add(state)
    patterns = {name: f"re:^{re.escape(name)}\\..*" for name, found in states.items() if len(found) == 1}
    ignored += [pattern for name, pattern in patterns.items() if None in states[name]]
    groups: dict[Scheme, dict[str, None]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, {})[patterns.get(experts_of(name) or name, name)] = None
    layouts = list(dict.fromkeys(LAYOUTS[scheme.kind] for scheme in groups)) or [LAYOUTS["int"]]
    return {
        "quant_method": "compressed-tensors",
        "format": layouts[0] if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignored,
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if len(groups) == 1 else list(names),
                "weights": _weights(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": LAYOUTS[scheme.kind],
            }
            for number, (scheme, names) in enumerate(groups.items())
        },
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    strategy = "channel" if scheme.group_size == -1 else "tensor_group" if scheme.kind == "nvfp4" else "group"
    said: dict[str, Any] = {
        "num_bits": scheme.num_bits,
        "type": "int" if scheme.kind == "int" else "float",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": None if scheme.group_size == -1 else scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "block_structure": None,
    }
    if scheme.kind != "int":
        stored = "torch.float8_e4m3fn" if scheme.kind == "nvfp4" else "torch.uint8"
        said |= {"scale_dtype": stored, "zp_dtype": stored}
    return said


def parse_config(config: Mapping[str, Any], source: str) -> Callable[[str], Scheme]:
    """From a `quantization_config`, the function that gives a module's scheme.

    Args:
        config: The entry of config.json.
        source: Where it stands, for messages.

    Raises:
        NotImplementedError: Another method or format, or weights of a kind that is not read.
        CheckpointError: The entry is malformed.

    Note:
        Of groups that quantize activations as well it is the scheme of the weights; see `activations`.
    """
    layout = config.get("format")
    if config.get("quant_method") != "compressed-tensors" or layout not in (
        *LAYOUTS.values(),
        "mixed-precision",
    ):
        raise NotImplementedError(
            f"{source}: of compressed-tensors only {', '.join(LAYOUTS.values())} are read, got "
            f"{config.get('quant_method')} {layout}"
        )
    table: list[tuple[str, Scheme]] = []
    try:
        for group in config["config_groups"].values():
            scheme = _parse_group(group, layout, source)
            table += [(str(target), scheme) for target in group["targets"]]
            for target in group["targets"]:
                if target.startswith("re:") and not compiles(target[3:]):
                    raise ValueError(f"pattern {target[3:83]!r}")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as cause:
        raise CheckpointError(
            f"{source}: quantization_config is malformed: {type(cause).__name__} {cause}"
        ) from cause

    exact: dict[str, Scheme] = {}
    for target, scheme in table:
        exact.setdefault(target, scheme)
    regular = [(target[3:], scheme) for target, scheme in exact.items() if target.startswith("re:")]

    def scheme_of(name: str) -> Scheme:
        # The library's order: the exact name, then a regular expression, then the class.
        found = exact.get(name)
        if found is None:
            found = next(
                (scheme for pattern, scheme in regular if matches(pattern, name)), exact.get("Linear")
            )
        if found is None:
            raise CheckpointError(f"{source}: no group of quantization_config covers {name}")
        return found

    return scheme_of


def _parse_group(group: Mapping[str, Any], layout: Any, source: str) -> Scheme:
    weights = group["weights"]
    for key in ("input_activations", "output_activations"):
        if not isinstance(group.get(key), (Mapping, type(None))):
            raise ValueError(f"{key} {group[key]!r}")
    bits, size, strategy = weights["num_bits"], weights.get("group_size"), weights["strategy"]
    symmetric = bool(weights["symmetric"])
    if weights["type"] == "float":
        kind = {("tensor_group", 16): "nvfp4", ("group", 32): "mxfp4"}.get((strategy, size))
        if kind is None or bits != 4 or not symmetric:
            raise NotImplementedError(f"{source}: of float weights only nvfp4 and mxfp4 are read")
        scheme = Scheme(4, size, True, kind)
    else:
        if weights["type"] != "int" or strategy not in ("group", "channel"):
            raise NotImplementedError(f"{source}: only integer weights in groups or rows are read")
        size = -1 if strategy == "channel" else size
        if type(bits) is not int or not 2 <= bits <= 8 or type(size) is not int or size < -1 or size == 0:
            raise ValueError(f"num_bits {bits!r}, group_size {size!r}")
        scheme = Scheme(bits, size, symmetric)
    said = group.get("format") or layout
    if said not in (LAYOUTS[scheme.kind], "mixed-precision"):
        raise NotImplementedError(f"{source}: {scheme} in the layout {said} is not read")
    return scheme


def activations(config: Mapping[str, Any]) -> str:
    """What a `quantization_config` that `parse_config` takes quantizes besides weights: `inputs float4`, or "".

    Such files are read for their weights alone; engines that serve them round the activations, too.
    """
    found: dict[str, None] = {}
    for group in config["config_groups"].values():
        for key, what in (("input_activations", "inputs"), ("output_activations", "outputs")):
            if group.get(key):
                found[f"{what} {group[key].get('type', 'int')}{group[key].get('num_bits', '')}"] = None
    if config.get("kv_cache_scheme"):
        found["keys and values"] = None
    return ", ".join(found)


def act_order(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` that `parse_config` takes says that groups are not contiguous columns."""
    return any(
        group["weights"].get("actorder") in ("group", "dynamic", True)  # the library's names for it
        for group in config["config_groups"].values()
    )


def _unpacked(
    name: str, packed: dict[str, tuple[Tensor, int, tuple[int, int]]], bits: int
) -> dict[str, Tensor]:
    """Codes of tensors (words, packed axis, unpacked shape) that one library wrote, and so in one layout.

    The layout is the one whose number of words fits all of them; where both do (only at widths no model has), dense.
    """
    for undo in (unpack, unpack_per_word):
        fits = True
        for words, dim, shape in packed.values():
            expected = [*shape]
            expected[dim] = _words(undo, shape[dim], bits)
            fits = fits and words.dtype == torch.int32 and list(words.shape) == expected
        if fits:
            return {
                suffix: undo(words, bits, shape[dim], dim=dim)
                for suffix, (words, dim, shape) in packed.items()
            }
    kinds = ", ".join(
        f"{suffix} {words.dtype} {list(words.shape)}" for suffix, (words, _, _) in packed.items()
    )
    raise CheckpointError(f"{name}: {kinds} cannot hold {list(packed[PACKED][2])} codes of {bits} bits")


def _words(undo: Callable[..., Tensor], count: int, bits: int) -> int:
    return words_for(count, bits) if undo is unpack else -(-count // (32 // bits))


def repack_like(words_per_row: int, q: Tensor, bits: int) -> Tensor:
    """Pack codes as the file has them: densely, or by whole words where its rows have as many words as that takes."""
    return pack(q, bits) if words_per_row == words_for(q.shape[1], bits) else pack_per_word(q, bits)


def fits_layout(words_per_row: int, columns: int, bits: int) -> bool:
    """Whether so many words can hold a row in either layout."""
    return words_per_row in (_words(unpack, columns, bits), _words(unpack_per_word, columns, bits))


def _required(name: str, suffix: str, tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise CheckpointError(f"{name}.{suffix} is missing from the checkpoint")
    return tensor
