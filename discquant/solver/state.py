# SPDX-License-Identifier: Apache-2.0
"""Per-weight state of the solver: lower code, `anchor`, `frac`, moments; float32, bfloat16 or the 8-bit layout.

`anchor` is the position that the linear term prefers, in the format of `frac_ref`: usually `frac_ref` itself. Where
the teacher is computed from the state, `frac_ref` is kept uncut (memory.md, traps 1 to 3).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from discquant.config import OptimizerName, StateFormat
from discquant.grids import Grid, UniformGrid
from discquant.ops import StepOptions, decode_frac, decode_frac_ref, encode_frac_ref, unpack_nibbles
from discquant.ops.anchor_codes import anchor_codes
from discquant.ops.place_outliers import place_outliers_
from discquant.ops.reference.place_outliers import OUTLIER_PIECE
from discquant.ops.reference.projected_step import FRAC_REF_RANGE, FRAC_REF_ZERO, store_frac_
from discquant.solver.kronecker import curvature_gradient, triangle_shape, unpack_triangles

FRAC_REF_LOW, FRAC_REF_HIGH = -0.5, 1.5
# An anchored weight is drawn to the point half-way between its own position and the chosen neighbour.
ANCHOR_SHARE = 0.5
# Weights that their position does not give back are kept apart, 3 to 5 B each; above this share all are kept.
OUTLIER_SHARE = 0.125
# What moves the scales (`scale_step`), float32, [out_features, num_groups] each.
SCALES = ("scale_change", "scale_momentum", "scale_second_moment")

# What the state holds of the original weight: nothing, the weight, or what the weight can be computed from.
Kept = Literal["none", "weights", "state"]


def pack_nibbles(q: Tensor) -> Tensor:
    """Pack codes below 16 two per byte, low nibble first; an odd row is padded with 0."""
    padded = torch.nn.functional.pad(q, (0, q.shape[1] % 2))
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def pack_bits(flags: Tensor) -> Tensor:
    """Pack booleans eight per byte along the rows, lowest bit first; a row is padded with 0."""
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -flags.shape[1] % 8))
    places = torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (padded.view(flags.shape[0], -1, 8) << places).sum(dim=-1, dtype=torch.uint8)


def pack_places(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Return where booleans are set, in a byte for each and one for every `OUTLIER_PIECE` of them.

    Args:
        flags: bool, any shape.

    Returns:
        Places within their pieces, uint8, [number set], and how many each piece has, uint8, [pieces].
    """
    flat = flags.flatten()
    low = flat.nonzero().flatten().remainder_(OUTLIER_PIECE).to(torch.uint8)
    pieces = torch.nn.functional.pad(flat, (0, -flat.numel() % OUTLIER_PIECE)).view(-1, OUTLIER_PIECE)
    return low, pieces.sum(dim=1, dtype=torch.uint8)


def pack_frac_ref(frac_ref: Tensor) -> Tensor:
    """Encode `frac_ref` in 8 bits, keeping "on the grid" (exactly 0 or 1) apart from "very near to it".

    Beyond [-0.5, 1.5] it is cut: the step only needs clamp(frac_ref, 0, 1), and a teacher made from this code keeps
    what was cut beside it.
    """
    code = encode_frac_ref(frac_ref.clamp(FRAC_REF_LOW, FRAC_REF_HIGH))
    for exact, neighbour in ((63, 1), (189, -1)):
        on_grid = frac_ref == (exact - 63) / 126
        # Moved inwards by one code (0.008): a weight near a grid point stays free.
        code = torch.where((code == exact) & ~on_grid, torch.full_like(code, exact + neighbour), code)
    return code


def narrow_anchor(anchor: Tensor) -> Tensor:
    """Round an anchor to bfloat16 without putting one on the grid (exactly 0 or 1) that is not there."""
    narrow = anchor.bfloat16()
    off = (anchor != 0) & (anchor != 1)
    narrow = torch.where(off & (narrow == 1), torch.full_like(narrow, 1 - 2.0**-8), narrow)
    return torch.where(off & (narrow == 0), torch.full_like(narrow, 2.0**-8), narrow)


def _outward(position: Tensor) -> Tensor:
    """Move a position that is exactly 0 or 1 by chance off the grid, which those two values mean."""
    return torch.where(position == 0, position - 1e-6, torch.where(position == 1, position + 1e-6, position))


@functools.lru_cache
def _anchor_table(device: torch.device, frozen: bool) -> Tensor:
    """Anchor code by 256 * side + code of `frac_ref`, uint8, [512]; codes on the grid stay, frozen ones lie there."""
    code = torch.arange(256, device=device)
    if frozen:
        ends = (FRAC_REF_ZERO, FRAC_REF_ZERO + FRAC_REF_RANGE)
        return torch.cat([torch.full_like(code, end, dtype=torch.uint8) for end in ends])
    own = (code - FRAC_REF_ZERO).double() / FRAC_REF_RANGE
    rows = []
    for side in (0.0, 1.0):
        position = (1 - ANCHOR_SHARE) * own.clamp(0, 1) + ANCHOR_SHARE * side
        drawn = pack_frac_ref(_outward(position))
        rows.append(torch.where((own == 0) | (own == 1), code.to(torch.uint8), drawn))
    return torch.cat(rows)


def _smallest(weight: Tensor) -> Tensor:
    """Return the weight in the narrowest dtype that holds every value exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = weight.to(dtype)
        if torch.equal(narrow.to(weight.dtype), weight):
            return narrow
    return weight.clone()


class WeightState:
    """State of one weight matrix [out_features, in_features].

    float32: 1 B code + 4 B each for anchor, frac and the moments. bf16: 2 B each, as the paper ran it. u8: code (two
    per byte up to 4 bits), anchor u8, frac u8 with stochastic rounding, momentum int8, root of the second moment u8
    (memory.md section 2). With a teacher from the state the anchor is `frac_ref` itself, or, where the linear term
    prefers another point, in u8 one more bit per weight, else a tensor of its own.
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
        kept: Kept = "none",
        curvature_width: int = 0,
        scales: bool = False,
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
            kept: What is kept for `teacher_weight`: nothing, the weight, or `frac_ref` in the state's own width.
            curvature_width: Channels per block of the curvature's factors, which begin as zeros; 0 has none.
            scales: The scales are to move once the codes are chosen.
        """
        q_down, own = grid.neighbours(weight)
        # Frozen: as if every weight lay on the grid, at its nearest point.
        frac_ref = (own > 0.5).to(own.dtype) if frozen else own
        self.name = name
        self.grid = grid
        self.shape = tuple(weight.shape)
        self.state: StateFormat = state
        self.optimizer: OptimizerName = optimizer
        self.frozen = frozen
        small = state == "u8"
        wide = torch.bfloat16 if state == "bf16" else wide

        def stored(position: Tensor) -> Tensor:
            if small:
                return pack_frac_ref(position)
            return narrow_anchor(position) if state == "bf16" else position.to(wide)

        live = (frac_ref != 0) & (frac_ref != 1)
        begin = frac_ref if start is None else torch.where(live, start.to(frac_ref.dtype), frac_ref)
        anchor = torch.where(live, _outward(begin), frac_ref) if anchored else frac_ref
        self.num_live = int(live.sum())
        self.q_down = pack_nibbles(q_down) if small and grid.num_bits <= 4 else q_down
        self.weight: Tensor | None = _smallest(weight) if kept == "weights" else None
        self.outlier_low: Tensor | None = None
        self.outlier_count: Tensor | None = None
        self.outlier_value: Tensor | None = None
        self.side: Tensor | None = None
        self._anchor: Tensor | None = None
        self.frac_ref = self._reference(weight, q_down, own, stored(own)) if kept == "state" else None
        if self.frac_ref is None:
            self._anchor = stored(anchor)
        elif anchored or frozen:
            if small:
                # At 1 and beyond, the start equals the position where the upper side was chosen.
                cut = own.clamp(0, 1)
                upper = torch.where(cut == 1, begin >= cut, begin > cut)
                self.side = pack_bits(own > 0.5 if frozen else upper)
            else:
                self._anchor = stored(anchor)
        self.frac = torch.empty(self.shape, dtype=torch.uint8 if small else wide, device=weight.device)
        store_frac_(self.frac, begin.clamp(0, 1), StepOptions(step=0))
        self.momentum: Tensor | None = None
        self.second_moment: Tensor | None = None
        if optimizer != "sgd":
            self.momentum = torch.zeros_like(self.frac, dtype=torch.int8 if small else wide)
        if optimizer == "adamw":
            self.second_moment = torch.zeros_like(self.frac, dtype=torch.uint8 if small else wide)
        self.curvature_in: Tensor | None = None
        self.curvature_out: Tensor | None = None
        if curvature_width:
            # Factors are averages over samples: what bfloat16 cuts off is far below their own noise.
            dtype = torch.float32 if state == "fp32" else torch.bfloat16
            out_features, in_features = self.shape
            for key, size in (("curvature_in", in_features), ("curvature_out", out_features)):
                blocks = torch.zeros(triangle_shape(size, curvature_width), dtype=dtype, device=weight.device)
                setattr(self, key, blocks)

        self.scale_change: Tensor | None = None
        self.scale_momentum: Tensor | None = None
        self.scale_second_moment: Tensor | None = None
        if scales:
            for key in SCALES:
                setattr(self, key, torch.zeros_like(grid.scale, dtype=torch.float32))

    def _reference(self, weight: Tensor, q_down: Tensor, own: Tensor, code: Tensor) -> Tensor | None:
        """Return `frac_ref` to keep, beside it the weights that it would move; None where those are many.

        It would move what counts as on the grid without lying there (in a group of one level), and what lies beyond
        the range of an 8-bit code.
        """
        apart = torch.zeros(0, dtype=torch.bool)
        if bool((self.grid.scale == 0).any()):
            level = self.grid.dequantize(q_down + (own == 1).to(torch.uint8), torch.float32)
            apart = ((own == 0) | (own == 1)) & (level != weight.float())
        if self.state == "u8":
            beyond = (own < FRAC_REF_LOW) | (own > FRAC_REF_HIGH)
            apart = beyond | apart if apart.numel() else beyond
        found = int(apart.sum())
        if found > OUTLIER_SHARE * weight.numel():
            self.weight = _smallest(weight)
            return None
        if found:
            self.outlier_low, self.outlier_count = pack_places(apart)
            self.outlier_value = _smallest(weight[apart])
        return code

    @property
    def anchor(self) -> Tensor:
        """Position that the linear term prefers, in the format of `frac_ref`, [out_features, in_features]."""
        if self._anchor is not None:
            return self._anchor
        assert self.frac_ref is not None
        if self.side is None:
            return self.frac_ref
        return anchor_codes(self.frac_ref, self.side, _anchor_table(self.frac_ref.device, self.frozen))

    @property
    def student_grid(self) -> Grid:
        """The grid that codes are served on: `grid`, as it was laid, with its scales where they have moved to."""
        if self.scale_change is None:
            return self.grid
        assert isinstance(self.grid, UniformGrid), "other grids have no scales that move (config.FREE_SCALES)"
        return self.grid.rescaled(self.scale_change)

    @property
    def holds_teacher(self) -> bool:
        """Whether the original weight can be had from this state."""
        return self.weight is not None or self.frac_ref is not None

    def teacher_weight(self, dtype: torch.dtype) -> Tensor | None:
        """Return the original weight as the state holds it, [out_features, in_features]; None where it does not."""
        if self.weight is not None:
            return self.weight.to(dtype)
        if self.frac_ref is None:
            return None
        value = self.grid.soft_weight(self.q_down, self.frac_ref, dtype, is_reference=True)
        if self.outlier_low is not None and self.outlier_count is not None and self.outlier_value is not None:
            place_outliers_(value, self.outlier_low, self.outlier_count, self.outlier_value)
        return value

    def _error(self, original: Tensor | None, dtype: torch.dtype, narrow: torch.dtype) -> Tensor:
        """Return W(frac) - W, computed in `dtype` and rounded to `narrow` once."""
        known = self.teacher_weight(dtype)
        weight = original if known is None else known
        assert weight is not None, "the original is the caller's where the state does not hold it"
        soft = self.soft_weight(dtype)
        error = soft if narrow == dtype else torch.empty_like(soft, dtype=narrow)
        return torch.sub(soft, weight.to(dtype), out=error)

    def curvature_gradient(self, original: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return G (W(frac) - W) H, [out_features, in_features]; None where there are no factors.

        Args:
            original: Original weight, where the state does not hold it.
            dtype: Computed in; of float32 on a GPU the operands are as the factors are kept. What bfloat16 cuts off of
                the error is then as far below the factors' noise as what it cut off of them.
        """
        if self.curvature_in is None or self.curvature_out is None:
            return None
        tensor_cores = self.frac.is_cuda and dtype == torch.float32
        kept = self.curvature_in.dtype if tensor_cores else dtype
        error = self._error(original, dtype, kept)
        # Widened first: torch gathers float32 three times as fast as 16 bits on a CPU.
        inputs = unpack_triangles(self.curvature_in.to(kept))
        outputs = unpack_triangles(self.curvature_out.to(kept))
        return curvature_gradient(error, inputs, outputs)

    def codes_down(self) -> Tensor:
        """Return the lower codes, uint8, [out_features, in_features]."""
        if self.q_down.shape[1] == self.shape[1]:
            return self.q_down
        return unpack_nibbles(self.q_down, self.shape[1])

    def gap(self) -> tuple[Tensor, int]:
        """Return Delta of each coordinate and its group size; see `Grid.gap`."""
        # Only a look-up grid reads the codes; to unpack them is four bytes of traffic per weight.
        read = self.grid.table is not None
        return self.student_grid.gap(
            self.codes_down() if read else self.q_down.new_empty((1, 1)).expand(self.shape)
        )

    def live(self) -> Tensor:
        """Return which coordinates may move, bool."""
        reference = decode_frac_ref(self.anchor, torch.float32)
        return (reference != 0) & (reference != 1)

    def position(self) -> Tensor:
        """Return `frac` as float32."""
        return decode_frac(self.frac, torch.float32)

    def soft_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the student's weight, [out_features, in_features]."""
        return self.student_grid.soft_weight(self.q_down, self.frac, dtype)

    def snap_(self, distance: float) -> None:
        """Set coordinates within `distance` of 0 or 1 to it (ties at 1/2 go down), in place."""
        position = self.position()
        low, high = position <= distance, position >= 1 - distance
        top = 255 if self.frac.dtype == torch.uint8 else 1
        self.frac.masked_fill_(high & ~low, top)
        self.frac.masked_fill_(low, 0)

    def count_fractional(self) -> Tensor:
        """Return how many coordinates are further than 0.01 from both ends, int64, [], not read from the device."""
        position = self.position()
        return ((position > 0.01) & (position < 0.99)).sum()

    def codes(self) -> Tensor:
        """Return final codes q_down + round(frac), ties down, uint8."""
        return self.codes_down() + (self.position() > 0.5).to(torch.uint8)

    def hard_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the served weight of the final codes."""
        return self.student_grid.dequantize(self.codes(), dtype)

    def nearest_weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the served weight of `weight` rounded to nearest on this grid."""
        return self.grid.dequantize(self.grid.nearest(weight), dtype)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a checkpoint must hold to continue (codes and anchor are recomputed)."""
        yield "frac", self.frac
        if self.momentum is not None:
            yield "momentum", self.momentum
        if self.second_moment is not None:
            yield "second_moment", self.second_moment
        if self.scale_change is not None:
            yield from ((key, getattr(self, key)) for key in SCALES)

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor by attribute, `grid.` before those of the grid."""
        for key, value in vars(self.grid).items():
            if isinstance(value, Tensor):
                yield f"grid.{key}", value
        for key in (
            "q_down", "weight", "frac_ref", "outlier_low", "outlier_count", "outlier_value", "side", "_anchor",
            "curvature_in", "curvature_out",
        ):  # fmt: skip
            value = getattr(self, key)
            if value is not None:
                yield key, value
        yield from self.tensors()

    @property
    def nbytes(self) -> int:
        """Bytes of this state, grid parameters included."""
        return sum(t.numel() * t.element_size() for _, t in self.held())
