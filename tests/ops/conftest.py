# SPDX-License-Identifier: Apache-2.0
"""Shared by the op tests: the device, the tolerance rule, and random grids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor


class GridTensors(NamedTuple):
    """Arguments of the weight-making ops, and the plain codes behind a packed q_down."""

    q_down: Tensor
    frac: Tensor
    scale: Tensor
    zero_point: Tensor | None
    table: Tensor | None
    codes: Tensor


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """max|actual - oracle| <= 2 (max|baseline - oracle| + eps(dtype) max|oracle|); oracle in float64."""

    def check(actual: Tensor, oracle: Tensor, baseline: Tensor, what: str = "") -> None:
        assert oracle.dtype == torch.float64
        assert actual.shape == oracle.shape
        assert actual.dtype == baseline.dtype
        if oracle.numel() == 0:
            return
        error = (actual.double() - oracle).abs().max().item()
        allowed = (baseline.double() - oracle).abs().max().item()
        allowed = 2 * (allowed + torch.finfo(actual.dtype).eps * oracle.abs().max().item())
        assert error <= allowed, f"{what} {actual.dtype}: error {error:.3e} above {allowed:.3e}"

    return check


@pytest.fixture(scope="session")
def assert_equal() -> Callable[..., None]:
    """Bitwise equality; prints the first difference."""

    def check(actual: Tensor, expected: Tensor, what: str = "") -> None:
        assert actual.dtype == expected.dtype, what
        assert actual.shape == expected.shape, what
        # uint16 has few operators on CPU.
        left, right = (t.to(torch.int64) if t.dtype == torch.uint16 else t for t in (actual, expected))
        different = (left != right) & ~((left != left) & (right != right))
        if bool(different.any()):
            where = tuple(int(i) for i in different.nonzero()[0])
            raise AssertionError(
                f"{what}: {int(different.sum())} differ, first at {where}: {left[where]} != {right[where]}"
            )

    return check


@pytest.fixture(scope="session")
def make_grid(device: torch.device) -> Callable[..., GridTensors]:
    """Random grid and positions for a weight of `shape`."""

    def make(
        shape: tuple[int, int],
        *,
        frac: torch.dtype = torch.float32,
        scale: torch.dtype = torch.float32,
        num_bits: int = 4,
        group_size: int = 32,
        packed: bool = False,
        zero: bool = False,
        table: bool = False,
    ) -> GridTensors:
        rows, cols = shape
        groups = 1 if group_size == -1 else max(1, -(-cols // group_size))
        codes = torch.randint(0, 2**num_bits - 1, shape, dtype=torch.uint8)
        q_down = codes
        if packed:
            even = torch.nn.functional.pad(codes, (0, cols % 2))
            q_down = even[:, ::2] | (even[:, 1::2] << 4)
        if frac in (torch.uint8, torch.uint16):
            position = torch.randint(0, 256 if frac == torch.uint8 else 65536, shape).to(frac)
        else:
            position = torch.rand(shape, dtype=torch.float64).to(frac)
        made: list[Any] = [
            q_down,
            position,
            (torch.rand(rows, groups, dtype=torch.float64) + 0.1).to(scale),
            torch.randint(0, 2**num_bits, (rows, groups), dtype=torch.uint8) if zero else None,
            torch.sort(torch.randn(2**num_bits, dtype=torch.float64)).values.to(scale) if table else None,
            codes,
        ]
        return GridTensors(*(None if t is None else t.to(device) for t in made))

    return make
