# SPDX-License-Identifier: Apache-2.0
"""Operator `place_outliers_`: weights kept beside a state to their places in a matrix made from it, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from discquant.ops import _registry as registry
from discquant.ops.reference import place_outliers as reference
from discquant.ops.reference.place_outliers import OUTLIER_PIECE

_OP = "place_outliers_"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _fake(*args: Any) -> None: ...


def _launch(*args: Any) -> None:
    registry.triton_module("place_outliers").place_outliers(*args)


_op = registry.define(
    "place_outliers_(Tensor(a!) weight, Tensor low, Tensor count, Tensor value) -> ()", _fake, _launch
)


@torch.no_grad()
def place_outliers_(weight: Tensor, low: Tensor, count: Tensor, value: Tensor, *, impl: str = "auto") -> None:
    """Write values to places that are told in a byte each and one for every 255 weights, in place.

    weight[255 p + low[i]] = value[i] of the flat weight, where piece p has the i with
    count[0] + ... + count[p - 1] <= i < count[0] + ... + count[p].

    Args:
        weight: Floating, contiguous, [out_features, in_features]; changed in place.
        low: Places within their pieces of 255 weights, uint8, below 255, different within a piece, [number of places].
        count: How many places each piece has, uint8, their sum that number, [ceil(number of weights / 255)].
        value: Floating, [number of places]; rounded to the dtype of `weight`.
        impl: "auto" | "reference" | "triton".

    Raises:
        TypeError: An argument is not a Tensor.
        ValueError: Shapes, dtypes or devices disagree, or the weight is not contiguous. Entries are not looked at.
        NotImplementedError: impl="cpp", or impl="triton" with float64.
        RuntimeError: The requested impl cannot run here.

    Note:
        Deterministic: no two places are the same. Records no graph. Waits for no device.

    Source:
        8-bit layout of this project.
    """
    registry.require_given(_OP, weight=weight, low=low, count=count, value=value)
    registry.require(
        weight.dim() == 2, _OP, "weight", "have shape", "[out_features, in_features]", weight.shape
    )
    registry.require(
        weight.is_contiguous(), _OP, "weight", "be", "contiguous", f"strides {list(weight.stride())}"
    )
    registry.require(low.dim() == 1, _OP, "low", "have shape", "[number of places]", low.shape)
    pieces = -(-weight.numel() // OUTLIER_PIECE)
    registry.require(count.shape == (pieces,), _OP, "count", "have shape", [pieces], count.shape)
    registry.require(value.shape == low.shape, _OP, "value", "have the shape of low", low.shape, value.shape)
    for name, tensor, dtypes in (
        ("weight", weight, registry.FLOAT_DTYPES), ("value", value, registry.FLOAT_DTYPES),
        ("low", low, (torch.uint8,)), ("count", count, (torch.uint8,)),
    ):  # fmt: skip
        registry.require_dtype(_OP, name, tensor, dtypes)
    registry.require_device(_OP, weight, low=low, count=count, value=value)
    double = "float64" if torch.float64 in (weight.dtype, value.dtype) else None
    if registry.choose(_OP, impl, weight.device, triton=double) == "reference":
        reference.place_outliers_(weight, low, count, value)
    else:
        _op(weight, low, count, value)
