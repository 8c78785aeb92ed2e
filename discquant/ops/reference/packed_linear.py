# SPDX-License-Identifier: Apache-2.0
"""Linear layer over a packed weight in eager PyTorch: unpack, dequantise, multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from discquant.ops.reference import pack as packing
from discquant.ops.reference.settled import settled


def dequantize_packed(
    words: Tensor, scale: Tensor, zero_point: Tensor | None, *,
    out_features: int, in_features: int, num_bits: int, group_size: int, layout: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The served weight: scale * (q - zero_point) in float32 (float64 for a float64 dtype), then one cast.

    Args:
        words: Packed codes, int32, one dimension.
        scale: Packed grid step, floating, [padded rows / R, num_groups, R].
        zero_point: Packed codes of weight zero, uint8, same shape; None is 2 ** (num_bits - 1).
        out_features: Logical rows.
        in_features: Logical columns.
        num_bits: 3 or 4.
        group_size: Columns that share a scale; -1 is the row.
        layout: "mma" or "cpu".
        dtype: Result dtype.

    Returns:
        Weight, [out_features, in_features].
    """
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    q = packing.unpack(
        words, out_features=out_features, in_features=in_features, num_bits=num_bits, layout=layout
    )
    size = in_features if group_size == -1 else group_size
    group = torch.arange(in_features, device=words.device) // size
    step = packing.unpack_groups(scale, out_features).to(acc)[:, group]
    if zero_point is None:
        centred = q.to(acc) - 2 ** (num_bits - 1)
    else:
        centred = q.to(acc) - packing.unpack_groups(zero_point, out_features).to(acc)[:, group]
    weight: Tensor = step * centred
    return weight.to(dtype)


@settled
def packed_linear(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None = None, bias: Tensor | None = None, *,
    out_features: int, in_features: int, num_bits: int, group_size: int, layout: str, exact: bool = False,
) -> Tensor:  # fmt: skip
    """y = x W^T + bias with W = scale * (q - zero_point); sums in float32 (float64 for float64 x).

    Args:
        x: Activations, floating, [num_tokens, in_features].
        words: Packed codes, int32.
        scale: Packed grid step, floating.
        zero_point: Packed codes of weight zero, uint8, or None.
        bias: [out_features] or None.
        out_features: Logical rows.
        in_features: Logical columns.
        num_bits: 3 or 4.
        group_size: Columns that share a scale; -1 is the row.
        layout: "mma" or "cpu".
        exact: Round the weight to the dtype of x first, as a dense layer would have it.

    Returns:
        x.dtype, [num_tokens, out_features].
    """
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = dequantize_packed(
        words, scale, zero_point, out_features=out_features, in_features=in_features, num_bits=num_bits,
        group_size=group_size, layout=layout, dtype=x.dtype if exact else acc,
    )  # fmt: skip
    y = x.to(acc) @ weight.to(acc).t()
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)
