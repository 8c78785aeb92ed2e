# SPDX-License-Identifier: Apache-2.0
"""Operator `anchor_codes`: 8-bit codes looked up by the code of `frac_ref` and one packed bit beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from discquant.ops import _registry as registry
from discquant.ops.reference import anchor_codes as reference

_OP = "anchor_codes"


def _fake(frac_ref: Tensor, side: Tensor, table: Tensor) -> Tensor:
    return torch.empty_like(frac_ref, memory_format=torch.contiguous_format)


def _launch(*args: Any) -> Tensor:
    out: Tensor = registry.triton_module("anchor_codes").anchor_codes_fwd(*args)
    return out


_op = registry.define("anchor_codes(Tensor frac_ref, Tensor side, Tensor table) -> Tensor", _fake, _launch)


def anchor_codes(frac_ref: Tensor, side: Tensor, table: Tensor, *, impl: str = "auto") -> Tensor:
    """code = table[256 * side + frac_ref]: the anchor where a state keeps it as one bit beside `frac_ref`.

    Args:
        frac_ref: Code of the original position, uint8, [out_features, in_features].
        side: Which neighbour the anchor is drawn to, one bit each, eight per byte along the rows, lowest first, uint8,
            [out_features, ceil(in_features / 8)]; what is left of a row's last byte is not read.
        table: Codes by side and code, uint8, [512].
        impl: "auto" | "reference" | "triton".

    Returns:
        Codes, uint8, [out_features, in_features], contiguous.

    Raises:
        TypeError: An argument is not a Tensor.
        ValueError: Shapes, dtypes or devices disagree.
        NotImplementedError: impl="cpp".
        RuntimeError: The requested impl cannot run here.

    Note:
        Deterministic. The reference takes rows by slices of a million codes, whose indices are all that it holds.

    Source:
        8-bit layout of this project.
    """
    registry.require_given(_OP, frac_ref=frac_ref, side=side, table=table)
    registry.require(
        frac_ref.dim() == 2, _OP, "frac_ref", "have shape", "[out_features, in_features]", frac_ref.shape
    )
    rows, cols = frac_ref.shape
    for name, tensor, shape in (("side", side, (rows, (cols + 7) // 8)), ("table", table, (512,))):
        registry.require(tensor.shape == shape, _OP, name, "have shape", list(shape), tensor.shape)
    for name, tensor in (("frac_ref", frac_ref), ("side", side), ("table", table)):
        registry.require_dtype(_OP, name, tensor, (torch.uint8,))
    registry.require_device(_OP, frac_ref, side=side, table=table)
    if registry.choose(_OP, impl, frac_ref.device) == "reference":
        return reference.anchor_codes(frac_ref, side, table)
    out: Tensor = _op(frac_ref, side, table)
    return out
