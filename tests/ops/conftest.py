# SPDX-License-Identifier: Apache-2.0
"""Shared by the op tests: the device, the tolerance rule, random grids, and states of the projected step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from discquant.ops import StepCounts, StepOptions, projected_step_
from discquant.ops.reference.projected_step import decode_frac_ref

# frac, frac_ref, gradient, first moment, second moment
STORAGES = {
    "8bit": (torch.uint8, torch.uint8, torch.float32, torch.int8, torch.uint8),
    "16bit": (torch.uint16, torch.uint8, torch.bfloat16, torch.int8, torch.uint8),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "f32": (torch.float32, torch.float32, torch.float32, torch.float32, torch.float32),
}
OPTIONS = StepOptions(
    lr=0.03, weight_decay=0.01, step=5, moment_bound=1.5, grad_clamp=0.5, hardening=0.1, seed=3, tensor_id=7,
    first_index=2**31 - 500,
)  # fmt: skip


class GridTensors(NamedTuple):
    """Arguments of the weight-making ops, and the plain codes behind a packed q_down."""

    q_down: Tensor
    frac: Tensor
    scale: Tensor
    zero_point: Tensor | None
    table: Tensor | None
    codes: Tensor
    minimum: Tensor | None = None
    g_idx: Tensor | None = None

    def further(self) -> dict[str, Tensor | None]:
        """Optional arguments by name, but for the table."""
        return {"minimum": self.minimum, "g_idx": self.g_idx}


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
        minimum: torch.dtype | None = None,
        index: bool = False,
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
            None,
            None,
        ]
        if minimum is not None:
            # In float64 nothing shall be rounded.
            narrow = torch.float64 if scale == torch.float64 else minimum
            made[6] = torch.randn(rows, groups, dtype=torch.float64).to(narrow)
        if index:
            made[7] = torch.randint(0, groups, (cols,), dtype=torch.int32)
        return GridTensors(*(None if t is None else t.to(device) for t in made))

    return make


@pytest.fixture
def make_state(device: torch.device) -> Callable[..., dict[str, Tensor]]:
    """Random state with frozen, clipped and ordinary coordinates."""

    def make(shape: tuple[int, int], storage: str, group_size: int = 64) -> dict[str, Tensor]:
        frac_type, ref_type, grad_type, first_type, second_type = STORAGES[storage]
        rows, cols = shape
        ref = torch.randint(0, 254, shape, dtype=torch.uint8)
        ref[:, ::7] = 63  # on the grid: frozen
        ref[:, 3::11] = 189
        frac = torch.rand(shape)
        top = {torch.uint8: 255, torch.uint16: 65535}.get(frac_type)
        groups = 1 if group_size == -1 else max(1, -(-cols // group_size))
        first = torch.randn(shape) * 0.3
        second = torch.rand(shape)
        state = {
            "frac": frac.to(frac_type) if top is None else (frac * top).round().to(torch.int32).to(frac_type),
            "frac_ref": ref if ref_type == torch.uint8 else decode_frac_ref(ref, torch.float32).to(ref_type),
            "weight_grad": (torch.randn(shape) * 0.05).to(grad_type),
            "scale": torch.rand(rows, groups) * 0.1,
            "momentum": (first * 60).clamp(-127, 127).to(torch.int8)
            if first_type == torch.int8
            else first.to(first_type),
            "second_moment": (second * 255).to(torch.uint8)
            if second_type == torch.uint8
            else second.to(second_type),
        }
        return {name: tensor.to(device) for name, tensor in state.items()}

    return make


@pytest.fixture(scope="session")
def take_step() -> Callable[..., tuple[dict[str, Tensor], StepCounts]]:
    """Step on copies; moments that the optimizer does not have are left out."""

    def take(
        state: dict[str, Tensor], group_size: int, options: StepOptions, **kwargs: Any
    ) -> tuple[dict[str, Tensor], StepCounts]:
        copy = {name: tensor.clone(memory_format=torch.preserve_format) for name, tensor in state.items()}
        unused = {"sgd": ("momentum", "second_moment"), "adamw": ()}.get(
            options.optimizer, ("second_moment",)
        )
        passed = {name: None if name in unused else tensor for name, tensor in copy.items()}
        counts = projected_step_(**passed, group_size=group_size, options=options, **kwargs)
        return copy, counts

    return take


@pytest.fixture(scope="session")
def step_options() -> StepOptions:
    """A step in which every term has a share."""
    return OPTIONS
