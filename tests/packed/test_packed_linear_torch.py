# SPDX-License-Identifier: Apache-2.0
"""packed_linear within torch: inference mode and autocast, operator checks, compiled graphs, fresh processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant import _extension
from discquant.modules import PackedLinear
from discquant.ops.packed_linear import packed_linear

CPP = pytest.mark.skipif(not _extension.available(), reason="discquant._C is not built")
Make = Callable[..., Any]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@CPP
def test_opcheck(make: Make) -> None:
    case = make(20, 100, 3, 32, False)
    words, scale, zero = case.tensors
    op = torch.ops.discquant.packed_linear.default
    for x in (torch.randn(3, 100), torch.randn(3, 120, dtype=torch.bfloat16)[:, :100]):
        torch.library.opcheck(op, (x, words, scale, zero, None, 20, 100, 3, 32, 1, -1))
    dequantize = torch.ops.discquant.dequantize_packed.default
    torch.library.opcheck(dequantize, (words, scale, zero, 20, 100, 3, 32, 2, 16, 20, torch.bfloat16))
    into = torch.ops.discquant.dequantize_packed_into.default
    torch.library.opcheck(into, (torch.empty(4, 100), words, scale, zero, 20, 100, 3, 32, 2, 16, 20))
    exact = torch.ops.discquant.packed_linear_exact.default
    torch.library.opcheck(
        exact, (torch.randn(3, 100), words, scale, zero, torch.randn(20), 20, 100, 3, 32, 2)
    )


@CPP
@pytest.mark.parametrize("mode", ["auto", "exact"])
def test_compile(mode: str, make: Make) -> None:
    case = make(20, 100, 4, 32, True)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(x: Tensor) -> Tensor:
        return packed_linear(x, *case.tensors, **case.sizes, mode=mode, impl="cpp") * 2

    for tokens in (2, 5):
        x = torch.randn(tokens, 100)
        assert torch.equal(run(x), packed_linear(x, *case.tensors, **case.sizes, mode=mode) * 2)


_UNPICKLED = """
import sys, torch
module = torch.load(sys.argv[1], weights_only=False)
compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
x, expected = torch.load(sys.argv[2])
for mode in ("auto", "exact"):
    module.mode = mode
    assert torch.equal(compiled(x), expected[mode]), mode
"""

_WITHOUT = """
import sys
sys.modules["discquant._C"] = None  # as in a build with DISCQUANT_BUILD=none
import torch
from discquant.modules import PackedLinear
q = torch.randint(0, 16, (40, 96), dtype=torch.uint8)
x = torch.randn(3, 96)
for mode in ("auto", "exact"):
    module = PackedLinear.from_codes(q, torch.rand(40, 3), num_bits=4, group_size=32, mode=mode)
    assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x)), mode
"""


@CPP
def test_a_module_compiles_before_anything_ran(tmp_path: Path) -> None:
    """In a process that unpickles it and calls nothing else: the choice of a kernel must load the kernels."""
    q = torch.randint(0, 16, (40, 96), dtype=torch.uint8)
    module = PackedLinear.from_codes(q, torch.rand(40, 3), num_bits=4, group_size=32)
    x, expected = torch.randn(3, 96), {}
    for mode in ("auto", "exact"):
        module.mode = mode
        expected[mode] = module(x)
    torch.save(module, tmp_path / "module.pt")
    torch.save((x, expected), tmp_path / "values.pt")
    command = [sys.executable, "-c", _UNPICKLED, str(tmp_path / "module.pt"), str(tmp_path / "values.pt")]
    subprocess.run(command, check=True)


def test_without_the_extension_it_compiles_as_it_runs() -> None:
    subprocess.run([sys.executable, "-c", _WITHOUT], check=True)
