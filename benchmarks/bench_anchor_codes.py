# SPDX-License-Identifier: Apache-2.0
"""anchor_codes: u8 codes and one bit each through a table of 512 bytes, GB/s against a copy.

Not among the files of run_gpu.py: 2 1/8 bytes per weight of a step that moves 24. By hand: pytest with this file.
"""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, GPU, measure, require_equal
from torch import Tensor

from discquant.ops import anchor_codes
from discquant.ops.reference.anchor_codes import unpack_bits

SHAPES = [(28672, 4096), (8192, 28672)] if GPU else [(256, 512)]


def _whole(code: Tensor, side: Tensor, table: Tensor) -> Tensor:
    # The reference's formula on the whole matrix at once, as torch.compile can fuse it.
    return table[code.int() + 256 * unpack_bits(side, code.shape[1])]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("provider", ["triton", "reference", "eager", "compiled"])
def test_anchor_codes(benchmark, provider, shape):
    rows, cols = shape
    code, side, table = (
        torch.randint(0, 256, size, dtype=torch.uint8, device=DEVICE)
        for size in ((rows, cols), (rows, cols // 8), (512,))
    )
    if provider in ("eager", "compiled"):
        function = _whole if provider == "eager" else torch.compile(_whole)
        body = lambda: function(code, side, table)  # noqa: E731
    else:
        body = lambda: anchor_codes(code, side, table, impl=provider)  # noqa: E731

    def gate():
        part = slice(0, 64)
        require_equal(body()[part], anchor_codes(code[part], side[part], table, impl="reference"))

    measure(
        benchmark, body, op="anchor_codes", provider=provider, mode="forward", shape=f"{rows}x{cols}", dtype="u8",
        gate=gate, num_bytes=rows * cols * (1 + 1 / 8 + 1),
    )  # fmt: skip
