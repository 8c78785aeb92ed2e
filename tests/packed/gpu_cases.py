# SPDX-License-Identifier: Apache-2.0
"""Packed weights on a GPU with what they stand for; as a script, small launches of every kernel.

`conftest.py` loads this file by its path for the tests; `compute-sanitizer` runs it in a process of its own.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from discquant.ops import pack as packing
from discquant.ops import packed_linear_table as table
from discquant.ops.packed_linear import packed_linear


class Case:
    """A packed weight on the GPU and what it stands for on the CPU."""

    def __init__(
        self, n: int, k: int, bits: int = 3, group: int = 64, symmetric: bool = True,
        dtype: torch.dtype = torch.float16,
    ) -> None:  # fmt: skip
        groups = 1 if group == -1 else -(-k // group)
        self.q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        self.step = (torch.rand(n, groups) * 0.1 - 0.03).to(dtype)
        self.zero = None if symmetric else torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8)
        words = packing.pack(self.q, self.zero, num_bits=bits, group_size=group, layout="mma")
        zero = None if self.zero is None else packing.pack_groups(self.zero, layout="mma").cuda()
        self.tensors = (words.cuda(), packing.pack_groups(self.step, layout="mma").cuda(), zero)
        self.sizes: dict[str, Any] = {
            "out_features": n, "in_features": k, "num_bits": bits, "group_size": group, "layout": "mma",
        }  # fmt: skip
        index = torch.arange(k) // (k if group == -1 else group)
        centre = 2.0 ** (bits - 1) if self.zero is None else self.zero.double()[:, index]
        self.weight = self.step.double()[:, index] * (self.q.double() - centre)

    def __call__(self, x: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        return packed_linear(x, *self.tensors, bias, **self.sizes, impl="cpp", **options)

    def served(self, dtype: torch.dtype) -> Tensor:
        """The weight as training produced it: one float32 product, which is exact here, and one rounding."""
        return self.weight.float().to(dtype)


def allowed(x: Tensor, weight: Tensor, oracle: Tensor) -> Tensor:
    """sqrt(K) roundings of a float32 sum (tensor cores cut instead of rounding: twice that), and the output's own."""
    magnitude = x.double().abs() @ weight.abs().t()
    error = 2 * (x.shape[1] ** 0.5 + 8) * 2.0**-23 * magnitude
    return error + torch.finfo(x.dtype).eps * (oracle.abs() + error)


def is_dense(tokens: int, bits: int, scale_is_x: bool = True) -> bool:
    """Whether that many tokens are dequantise + cuBLAS: torch's own linear on the rounded weight."""
    device = torch.device("cuda", 0)
    many = scale_is_x and table.prefills(device, bits, tokens)
    return tokens >= table.dense_tokens(device, bits) and not many


def prefill(case: Case, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The kernel for many tokens, whatever the table says; in-features a multiple of 8."""
    sizes = tuple(case.sizes[name] for name in ("out_features", "in_features", "num_bits", "group_size"))
    y: Tensor = torch.ops.discquant.packed_linear_prefill(x, *case.tensors, bias, *sizes)
    return y


def sanitized() -> None:
    """Small launches of every kernel, odd sizes, for compute-sanitizer."""
    for bits, symmetric in itertools.product([3, 4], [True, False]):
        case = Case(97, 328, bits, 32, symmetric)
        for tokens in (1, 9, 20):
            x = torch.randn(tokens, 328, device="cuda", dtype=torch.float16)
            for options in ({}, {"mode": "exact"}, {"batch_invariant": True}):
                case(x, **options)
        for tokens in (20, 130):
            prefill(case, torch.randn(tokens, 328, device="cuda", dtype=torch.float16))
        zero = None if case.zero is None else case.zero.cuda()
        words = packing.pack(case.q.cuda(), zero, num_bits=bits, group_size=32, layout="cpu")
        sizes: dict[str, Any] = {"out_features": 97, "in_features": 328, "num_bits": bits}
        packing.repack(words, **sizes, layout="cpu", new_layout="mma")
        packing.unpack(words, **sizes, layout="cpu")
    # Sums that thread blocks share: clusters that split K, and row blocks that end in the middle of a run.
    for bits in (3, 4):
        case = Case(1040, 4104, bits, 128, True)
        prefill(case, torch.randn(20, 4104, device="cuda", dtype=torch.float16))
        case = Case(8192, 1024, bits, 128, True)
        for tokens in (1, 16):
            case(torch.randn(tokens, 1024, device="cuda", dtype=torch.float16))
    torch.cuda.synchronize()
    print("sanitized: done")


if __name__ == "__main__":
    sanitized()
