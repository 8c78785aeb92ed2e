# SPDX-License-Identifier: Apache-2.0
"""AutoRound: GPTQ's tensors without g_idx, or AWQ's, as `packing_format` says.

`auto_round:auto_gptq` stores zero points less one, `auto_round` and `auto_round:gptqmodel` as they are,
`auto_round:auto_awq` is AWQ's layout. Scales may be negative. Releases of 2024 named the packer's `backend` instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import discquant
from discquant.errors import CheckpointError, UnrepresentableError
from discquant.formats import awq, gptq
from discquant.formats.checkpoint import Checkpoint, stated_quantization
from discquant.formats.coded import CodedLayer, Format
from discquant.formats.gptq import CODES, INDEX, SCALES, ZEROS, most_common, width_and_group
from discquant.formats.layout import StoredLayer
from discquant.formats.safetensors_format import SafetensorsFormat, grouped
from discquant.formats.scheme import Scheme
from discquant.formats.stated import contradictions, override, quantization
from discquant.grids.fused import experts_of

# The field names the auto-round release that made a file. Ours are not made by it: this is the release whose loader the
# interop checks run. transformers 5.22 and gptqmodel 7.6 do not read it; vLLM reads it in files of quant_method "gptq",
# to tell that MoE routers are quantized, too, so it must not enter a gptq file of ours.
AUTOROUND_VERSION = "0.16.1"
_GPTQ, _AWQ = "auto_round:auto_gptq", "auto_round:auto_awq"
# What stored zero points lack, by packing_format.
PACKINGS = {_GPTQ: 1, "auto_round": 0, "auto_round:gptqmodel": 0, _AWQ: 0}
# As auto-round reads them; the first is what transformers fills in where a file has no packing_format.
_ALIASES = {"auto_round:gptq": _GPTQ, "auto": _GPTQ, "auto_round:awq": _AWQ}


class AutoRound(SafetensorsFormat):
    """See `coded.Format`."""

    name = "autoround"
    codes = CODES
    aside = (INDEX,)

    def claims(self, config: Mapping[str, Any]) -> bool:
        """By quant_method, as newer and older releases spell it."""
        said = stated_quantization(config)
        return isinstance(said, dict) and said.get("quant_method") in (
            "auto-round",
            "auto_round",
            "intel/auto-round",
        )

    def layers(self, checkpoint: Checkpoint) -> Iterator[StoredLayer]:
        """Modules with a `qweight`."""
        said = quantization(checkpoint)
        where = f"{checkpoint.path}/config.json"
        packing = _stated_packing(said)
        if packing not in PACKINGS:
            raise NotImplementedError(f"{where}: of AutoRound {', '.join(PACKINGS)} are read, got {packing}")
        if said.get("data_type", "int") != "int":
            raise NotImplementedError(
                f"{where}: of AutoRound only integers are read, got {said['data_type']!r}"
            )
        bits, group_size = width_and_group(said, checkpoint)
        for name, tensors in grouped(checkpoint, CODES, (CODES, ZEROS, SCALES, INDEX)):
            symmetric = {**said, **(override(said, name) or {})}.get("sym", True) is True
            if packing == _AWQ:
                yield awq.stored_layer(name, tensors, group_size, symmetric)
            else:
                offset = PACKINGS[packing]
                yield gptq.stored_layer(name, tensors, bits, group_size, symmetric, offset)

    def decode(self, stored: StoredLayer) -> CodedLayer:
        """Codes and grid.

        Raises:
            CheckpointError: The configuration says symmetric and every zero point is the same other number: the file
                was packed in another way than it says, or than is concluded from what it says.
        """
        layer = awq.decode(stored) if _in_awq(stored) else gptq.decode(stored, self.name)
        zero, middle = layer.grid.zero_point, 1 << (stored.scheme.num_bits - 1)
        if stored.scheme.symmetric and zero is not None and bool((zero == zero.flatten()[0]).all()):
            raise CheckpointError(
                f"autoround: {stored.name} is stated to be symmetric, but its zero points are all "
                f"{int(zero.flatten()[0])} instead of {middle}: it is packed in another way than packing_format or "
                "backend says"
            )
        return layer

    def repack(self, stored: StoredLayer, q: Tensor) -> Tensor:
        """As the file has it."""
        return awq.pack_awq(q.T) if _in_awq(stored) else gptq.pack_codes(q, stored.scheme.num_bits)

    def check_scheme(self, name: str, shape: tuple[int, int], scheme: Scheme) -> None:
        """As GPTQ; 4 bits asymmetric is written in AWQ's layout."""
        (awq if _writes_awq(scheme) else gptq).check_scheme(self.name, name, shape, scheme)

    def encode(self, layer: CodedLayer, served: torch.dtype) -> dict[str, Tensor]:
        """Tensors by suffix."""
        scheme = Scheme.of_grid(layer.grid)
        if _writes_awq(scheme):
            return awq.encode(layer, self.name)
        return gptq.encode(layer, 1 if scheme.symmetric else 0, self.name)

    def encoded_bytes(self, shape: tuple[int, int], scheme: Scheme) -> int:
        """Bytes that `encode` will need."""
        if _writes_awq(scheme):
            return awq.encoded_bytes(shape, scheme)
        return gptq.encoded_bytes(shape, scheme)

    def configure(
        self, config: dict[str, Any], schemes: Mapping[str, Scheme], ignored: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        """The quantization_config entry, with per-layer overrides in extra_config.

        Raises:
            UnrepresentableError: Layers need different packings, which AutoRound states once.
        """
        base = most_common(schemes)
        packings = {_packing(scheme) for scheme in schemes.values()} or {_packing(base)}
        if len(packings) > 1:
            raise UnrepresentableError(
                "autoround states one packing for all layers; these need "
                f"{', '.join(sorted(packings))} (symmetric, asymmetric at 4 bits, asymmetric at other widths)"
            )
        entries: dict[str, dict[str, Any]] = {
            name: {"bits": 16, "data_type": "float"} for name in ignored if name != "lm_head"
        }
        blocks = _blocks(schemes)
        for name, scheme in schemes.items():
            # Outside the blocks (a head) only what has an entry is quantized.
            own = scheme != base or not name.startswith(tuple(blocks))
            said = {"bits": scheme.num_bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
            entries[name] = said if own else {}
        extra = {name: said for name, said in {**entries, **_of_experts(entries)}.items() if said}
        config["quantization_config"] = {
            "quant_method": "auto-round",
            "bits": base.num_bits,
            "group_size": base.group_size,
            "sym": base.symmetric,
            "data_type": "int",
            "packing_format": packings.pop(),
            "block_name_to_quantize": ",".join(blocks),
            "extra_config": extra,
            "autoround_version": AUTOROUND_VERSION,
            "meta": {"quantizer": [f"discquant:{discquant.__version__}"]},
        }
        return {}

    def notes(self, checkpoint: Checkpoint) -> Iterator[str]:
        """Act-order."""
        yield from gptq.act_order_note(self.layers(checkpoint))

    def problems(self, checkpoint: Checkpoint) -> Iterator[str]:
        """Where shapes contradict the configuration."""
        said = quantization(checkpoint)
        yield from contradictions(said, *width_and_group(said, checkpoint), self.layers(checkpoint))


def _of_experts(entries: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entry that all experts of a layer share, by the module that holds them: vLLM looks it up by that name.

    auto-round takes such a name for a pattern, which reaches no layer with an entry of its own, as these have.
    """
    layers: dict[str, list[dict[str, Any]]] = {}
    for name, said in entries.items():
        experts = experts_of(name)
        if experts is not None:
            layers.setdefault(experts, []).append(said)
    return {name: held[0] for name, held in layers.items() if all(said == held[0] for said in held)}


def _writes_awq(scheme: Scheme) -> bool:
    """4 bits asymmetric: the one layout of it that vLLM serves."""
    return scheme.num_bits == 4 and not scheme.symmetric


def _stated_packing(said: Mapping[str, Any]) -> str:
    """packing_format of a file, by its `backend` where there is none; one in PACKINGS where it is read."""
    backend = str(said.get("backend", "auto"))
    if "packing_format" in said:
        packing = str(said["packing_format"])
    elif "awq" in backend:
        packing = _AWQ
    else:  # the exporter's own packer stored zero points as they are, auto_gptq's stores them less one
        packing = _GPTQ if "gptq" in backend or backend == "auto" else "auto_round"
    return _ALIASES.get(packing, packing)


def _packing(scheme: Scheme) -> str:
    if _writes_awq(scheme):
        return _AWQ
    return _GPTQ if scheme.symmetric else "auto_round:gptqmodel"


def _in_awq(stored: StoredLayer) -> bool:
    """By shape: AWQ packs along out_features, GPTQ along in_features."""
    return stored.tensors[CODES].shape[0] == stored.shape[1]


def _blocks(names: Iterable[str]) -> list[str]:
    """Lists of decoder blocks that hold quantized layers: everything before the first number in a path."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        if numbers:
            found[".".join(parts[: numbers[0]])] = None
    return list(found)


FORMAT: Format = AutoRound()
