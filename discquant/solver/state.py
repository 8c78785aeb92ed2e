# SPDX-License-Identifier: Apache-2.0
"""Per-weight state of the solver: lower code, `anchor`, `frac`, moments; float32 or the 8-bit layout.

`anchor` is the position that the linear term prefers, in the format of `frac_ref`: usually `frac_ref` itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from discquant.config import OptimizerName, StateFormat
from discquant.grids import Grid
from discquant.ops import StepOptions, decode_frac, decode_frac_ref, encode_frac_ref, unpack_nibbles
from discquant.ops.reference.projected_step import store_frac_

FRAC_REF_LOW, FRAC_REF_HIGH = -0.5, 1.5


def pack_nibbles(q: Tensor) -> Tensor:
    """Pack codes below 16 two per byte, low nibble first; an odd row is padded with 0."""
    padded = torch.nn.functional.pad(q, (0, q.shape[1] % 2))
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def pack_frac_ref(frac_ref: Tensor) -> Tensor:
    """Encode `frac_ref` in 8 bits, keeping "on the grid" (exactly 0 or 1) apart from "very near to it".

    Beyond [-0.5, 1.5] it is cut: it only enters the step as clamp(frac_ref, 0, 1). (The teacher reads the
    original weight; a teacher made from this code would need it uncut.)
    """
    code = encode_frac_ref(frac_ref.clamp(FRAC_REF_LOW, FRAC_REF_HIGH))
    for exact, neighbour in ((63, 1), (189, -1)):
        on_grid = frac_ref == (exact - 63) / 126
        # Moved inwards by one code (0.008): a weight near a grid point stays free.
        code = torch.where((code == exact) & ~on_grid, torch.full_like(code, exact + neighbour), code)
    return code


class WeightState:
    """State of one weight matrix [out_features, in_features].

    float32: 1 B code + 4 B each for anchor, frac and the moments. u8: code (two per byte up to 4 bits),
    anchor u8, frac u8 with stochastic rounding, momentum int8, root of the second moment u8
    (memory.md section 2).
    """

    def __init__(
        self,
        name: str,
        grid: Grid,
        weight: Tensor,
        start: Tensor | None,
        *,
        anchored: bool = False,
        frozen: bool = False,
        state: StateFormat,
        optimizer: OptimizerName,
        wide: torch.dtype = torch.float32,
    ) -> None:
        """Find the neighbours of `weight` and start from `start`.

        Args:
            name: Module name.
            grid: Grid of this weight.
            weight: Original weight, floating, [out_features, in_features].
            start: Where `frac` starts, floating, same shape, cut to [0, 1]; None is the weight's own position.
            anchored: The linear term prefers `start` instead of the weight's own position.
            frozen: Every coordinate stays at nearest (an expert that no token reaches).
            state: Width.
            optimizer: Decides which moments exist.
            wide: Dtype of the wide state.
        """
        q_down, frac_ref = grid.neighbours(weight)
        if frozen:  # as if every weight lay on the grid, at its nearest point
            frac_ref = (frac_ref > 0.5).to(frac_ref.dtype)
        self.name = name
        self.grid = grid
        self.shape = tuple(weight.shape)
        self.state: StateFormat = state
        self.optimizer: OptimizerName = optimizer
        live = (frac_ref != 0) & (frac_ref != 1)
        begin = frac_ref if start is None else torch.where(live, start.to(frac_ref.dtype), frac_ref)
        anchor = frac_ref
        if anchored:
            # Exactly 0 and 1 mean "on the grid": one that lands there by chance is moved off it.
            outward = torch.where(begin == 0, begin - 1e-6, torch.where(begin == 1, begin + 1e-6, begin))
            anchor = torch.where(live, outward, frac_ref)
        begin = begin.clamp(0, 1)
        self.num_live = int(live.sum())
        small = state == "u8"
        self.q_down = pack_nibbles(q_down) if small and grid.num_bits <= 4 else q_down
        self.anchor = pack_frac_ref(anchor) if small else anchor.to(wide)
        self.frac = torch.empty(self.shape, dtype=torch.uint8 if small else wide, device=weight.device)
        store_frac_(self.frac, begin, StepOptions(step=0))
        self.momentum: Tensor | None = None
        self.second_moment: Tensor | None = None
        if optimizer != "sgd":
            self.momentum = torch.zeros_like(self.frac, dtype=torch.int8 if small else wide)
        if optimizer == "adamw":
            self.second_moment = torch.zeros_like(self.frac, dtype=torch.uint8 if small else wide)

    def codes_down(self) -> Tensor:
        """Return the lower codes, uint8, [out_features, in_features]."""
        if self.q_down.shape[1] == self.shape[1]:
            return self.q_down
        return unpack_nibbles(self.q_down, self.shape[1])

    def live(self) -> Tensor:
        """Return which coordinates may move, bool."""
        reference = decode_frac_ref(self.anchor, torch.float32)
        return (reference != 0) & (reference != 1)

    def position(self) -> Tensor:
        """Return `frac` as float32."""
        return decode_frac(self.frac, torch.float32)

    def soft_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the student's weight, [out_features, in_features]."""
        return self.grid.soft_weight(self.q_down, self.frac, dtype)

    def snap_(self, distance: float) -> None:
        """Set coordinates within `distance` of 0 or 1 to it (ties at 1/2 go down), in place."""
        position = self.position()
        low, high = position <= distance, position >= 1 - distance
        top = 255 if self.frac.dtype == torch.uint8 else 1
        self.frac.masked_fill_(high & ~low, top)
        self.frac.masked_fill_(low, 0)

    def count_fractional(self) -> int:
        """Return how many coordinates are further than 0.01 from both ends."""
        position = self.position()
        return int(((position > 0.01) & (position < 0.99)).sum())

    def codes(self) -> Tensor:
        """Return final codes q_down + round(frac), ties down, uint8."""
        return self.codes_down() + (self.position() > 0.5).to(torch.uint8)

    def hard_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the served weight of the final codes."""
        return self.grid.dequantize(self.codes(), dtype)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a checkpoint must hold to continue (codes and anchor are recomputed)."""
        yield "frac", self.frac
        if self.momentum is not None:
            yield "momentum", self.momentum
        if self.second_moment is not None:
            yield "second_moment", self.second_moment

    @property
    def nbytes(self) -> int:
        """Bytes of this state, grid parameters included."""
        held = [self.q_down, self.anchor, *(t for _, t in self.tensors()), self.grid.scale]
        if self.grid.zero_point is not None:
            held.append(self.grid.zero_point)
        return sum(t.numel() * t.element_size() for t in held)
