# SPDX-License-Identifier: Apache-2.0
"""What a solver hands to a format: the integer codes of one linear layer with the grid they lie on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """Codes of one linear layer; its bias stays among the untouched tensors of the checkpoint.

    Attributes:
        name: Module path in the checkpoint, e.g. `model.layers.0.mlp.up_proj`.
        q: Codes, uint8, below 2^num_bits, [out_features, in_features].
        scale: Grid step in weight units, floating and exactly representable in bfloat16 or float16,
            [out_features, num_groups] with num_groups = ceil(in_features / group_size).
        zero_point: Code that stands for zero, uint8, [out_features, num_groups]; None is 2^(num_bits-1) everywhere.
        num_bits: Width of a code, 2 to 8.
        group_size: Columns that share a scale, contiguous; -1 is the whole row. The last group may be shorter.

    Raises:
        TypeError: q, scale or zero_point is not a Tensor.
        ValueError: Shapes, dtypes or ranges disagree; the message names the module.
    """

    name: str
    q: Tensor
    scale: Tensor
    zero_point: Tensor | None
    num_bits: int
    group_size: int

    def __post_init__(self) -> None:
        """Validate."""
        tensors = {"q": self.q, "scale": self.scale} | (
            {} if self.zero_point is None else {"zero_point": self.zero_point}
        )
        for label, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{self.name}: {label} must be a Tensor, got {type(tensor).__name__}")
        self._check("num_bits", "an integer from 2 to 8", 2 <= self.num_bits <= 8, self.num_bits)
        self._check(
            "group_size", "-1 or positive", self.group_size == -1 or self.group_size > 0, self.group_size
        )
        self._check(
            "q", "uint8 of 2 dimensions", self.q.dtype == torch.uint8 and self.q.dim() == 2, _kind(self.q)
        )
        groups = (self.q.shape[0], -(-self.q.shape[1] // self.columns_per_group))
        shaped = self.scale.is_floating_point() and self.scale.shape == groups
        self._check(
            "scale", f"floating with [out_features, num_groups] = {list(groups)}", shaped, _kind(self.scale)
        )
        if not bool(torch.isfinite(self.scale).all()):
            raise ValueError(f"{self.name}: scale must be finite")
        limit = 1 << self.num_bits
        if self.q.numel():
            self._check("q", f"below 2^num_bits = {limit}", int(self.q.max()) < limit, int(self.q.max()))
        if self.zero_point is not None:
            zero = self.zero_point
            shaped = zero.dtype == torch.uint8 and zero.shape == groups
            self._check("zero_point", f"uint8 with the shape of scale = {list(groups)}", shaped, _kind(zero))
            if zero.numel():
                self._check(
                    "zero_point", f"below 2^num_bits = {limit}", int(zero.max()) < limit, int(zero.max())
                )

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is 2^(num_bits-1) everywhere by definition."""
        return self.zero_point is None

    @property
    def columns_per_group(self) -> int:
        """Columns that share a scale, with the whole row spelled out."""
        return max(1, self.q.shape[1]) if self.group_size == -1 else self.group_size

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The served weight: scale * (q - zero_point) in float32, then one cast.

        With a bfloat16 or float16 scale the float32 product is exact, so only the cast rounds.

        Returns:
            Weight in dtype, [out_features, in_features].
        """
        columns = self.q.shape[1]
        zero: Tensor | float = float(1 << (self.num_bits - 1))
        if self.zero_point is not None:
            zero = _spread(self.zero_point.float(), self.columns_per_group, columns)
        weight = self.q.float().sub_(zero)
        return weight.mul_(_spread(self.scale.float(), self.columns_per_group, columns)).to(dtype)

    def _check(self, argument: str, contract: str, ok: bool, actual: object) -> None:
        if not ok:
            raise ValueError(f"{self.name}: {argument} must be {contract}, got {actual}")


def _spread(per_group: Tensor, size: int, columns: int) -> Tensor:
    """[rows, groups] -> [rows, columns]; one group per row is left to broadcasting."""
    if per_group.shape[1] <= 1:
        return per_group
    return per_group.repeat_interleave(size, dim=1)[:, :columns]


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)}"
