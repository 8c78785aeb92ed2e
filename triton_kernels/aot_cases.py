# SPDX-License-Identifier: Apache-2.0
"""Configurations of every kernel that can be chosen at run time, for ahead-of-time compilation.

Default cases are what the presets and the dispatch tables choose; the others vary one thing at a time from them
(storage of frac, way of reading groups, tile), which covers every branch that a constant of the kernels takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import (
    anchor_codes,
    hadamard,
    linear_kl,
    packed_linear,
    place_outliers,
    projected_step,
    soft_linear,
    soft_weight,
)
from .soft_linear_tiles import CONFIGS, STEP_CONFIGS, fitting_step_tile, fitting_tile
from .step_tile import KEYS, SCALARS

ROWS, COLS, TOKENS, VOCAB = 14336, 4096, 8192, 128256


class Case(NamedTuple):
    """One launcher call on meta tensors; `targets` are the compute capabilities it is meant for, empty for all."""

    name: str
    default: bool
    launcher: Callable[..., Any]
    arguments: tuple[Any, ...]
    targets: tuple[int, ...] = ()


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _grid(
    frac: torch.dtype = torch.uint8, group: int = 64, packed: bool = True, zero: bool = False, table: bool = False,
    cols: int = COLS, scale: torch.dtype = torch.bfloat16, **further: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    groups = 1 if group == -1 else -(-cols // group)
    return (
        _meta(ROWS, (cols + 1) // 2 if packed else cols, dtype=torch.uint8),
        _meta(ROWS, cols, dtype=frac),
        _meta(ROWS, groups, dtype=scale),
        _meta(ROWS, groups, dtype=torch.uint8) if zero else None,
        _meta(16, dtype=torch.float32) if table else None,
    )


def _further(
    like: Tensor, minimum: bool = False, index: bool = False, cols: int = COLS, **_: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Minimum and g_idx of a grid whose scale is `like`."""
    return torch.empty_like(like) if minimum else None, _meta(cols, dtype=torch.int32) if index else None


# What varies in the weight-making kernels: name, default, arguments of _grid.
_WEIGHTS: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    ("u8-g64", True, {}),
    ("u8-g32-zero", True, {"group": 32, "zero": True}),
    ("u8-g128-zero", True, {"group": 128, "zero": True}),
    ("u8-row", False, {"group": -1}),
    ("u8-g96-gather", False, {"group": 96}),
    ("u8-plain-codes", False, {"packed": False}),
    ("u16-g64", False, {"frac": torch.uint16}),
    ("f32-g64", True, {"frac": torch.float32}),
    ("bf16-g64", False, {"frac": torch.bfloat16}),
    ("u8-g64-table", True, {"table": True}),
    ("u8-ragged", False, {"cols": 4095, "packed": False}),
    ("u8-ragged-table", False, {"cols": 4095, "packed": False, "table": True}),
    ("u8-ragged-table-packed", False, {"cols": 4095, "table": True}),
    ("u8-g32-min", True, {"group": 32, "minimum": True, "scale": torch.float32}),
    ("u8-g64-min-bf16", True, {"minimum": True}),
    ("u8-g64-min-f16", True, {"minimum": True, "scale": torch.float16}),
    ("u8-index", True, {"group": 128, "index": True, "scale": torch.float32}),
    ("u8-index-zero", True, {"group": 128, "index": True, "zero": True, "scale": torch.float32}),
    ("u8-ragged-min", False, {"cols": 4095, "group": 32, "minimum": True, "scale": torch.float32}),
    ("u8-ragged-min-bf16", False, {"cols": 4095, "minimum": True}),
    ("u8-ragged-min-f16", False, {"cols": 4095, "minimum": True, "scale": torch.float16}),
    ("u8-ragged-index", False, {"cols": 4095, "group": 128, "index": True, "scale": torch.float32}),
    ("u8-ragged-index-zero", False,
     {"cols": 4095, "group": 128, "index": True, "zero": True, "scale": torch.float32}),
)  # fmt: skip


def _soft_weight_cases() -> Iterator[Case]:
    for name, default, kwargs in _WEIGHTS:
        tail = (4, kwargs.get("group", 64), torch.bfloat16)
        grid = _grid(**kwargs)
        yield Case(
            f"soft_weight/{name}",
            default,
            soft_weight.soft_weight_fwd,
            (*grid, *tail, False, False, *_further(grid[2], **kwargs)),
        )
    tail = (4, 64, torch.bfloat16)
    yield Case("soft_weight/reference", True, soft_weight.soft_weight_fwd, (*_grid(), *tail, True, False))
    yield Case("soft_weight/transpose", False, soft_weight.soft_weight_fwd, (*_grid(), *tail, False, True))
    yield Case(
        "soft_weight/f16", False, soft_weight.soft_weight_fwd, (*_grid(), 4, 64, torch.float16, False, False)
    )
    yield Case(
        "soft_weight/f32", False, soft_weight.soft_weight_fwd, (*_grid(), 4, 64, torch.float32, False, False)
    )
    double = (
        _grid()[0],
        _meta(ROWS, COLS, dtype=torch.float64),
        *_grid()[2:],
        4,
        64,
        torch.float64,
        False,
        False,
    )
    yield Case("soft_weight/f64", False, soft_weight.soft_weight_fwd, double)
    for name, kwargs in (("uniform", {}), ("table", {"table": True}), ("index", {"index": True})):
        q_down, _, scale, _, levels = _grid(**kwargs)
        gradient = (_meta(ROWS, COLS, dtype=torch.float32), q_down, scale, levels, 4, 64, torch.float32)
        yield Case(f"soft_weight_bwd/{name}", name != "table", soft_weight.soft_weight_bwd,
                   (*gradient, _further(scale, **kwargs)[1]))  # fmt: skip


_STORAGE = {  # frac, frac_ref, gradient, first moment, second moment
    "8bit": (torch.uint8, torch.uint8, torch.bfloat16, torch.int8, torch.uint8),
    "8bit-f32grad": (torch.uint8, torch.uint8, torch.float32, torch.int8, torch.uint8),
    "u16": (torch.uint16, torch.uint8, torch.float32, torch.int8, torch.uint8),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "f32": (torch.float32, torch.float32, torch.float32, torch.float32, torch.float32),
}
_MOMENTS = {"adamw": 2, "momentum": 1, "lion": 1, "sgd": 0}


def _state(
    storage: str, optimizer: str, cols: int = COLS
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    tensors = [_meta(ROWS, cols, dtype=dtype) for dtype in _STORAGE[storage]]
    first = tensors[3] if _MOMENTS[optimizer] >= 1 else None
    return tensors[0], tensors[1], tensors[2], first, tensors[4] if _MOMENTS[optimizer] == 2 else None


def _projected_step_cases() -> Iterator[Case]:
    # Terms as in most steps of a run: the linear one with weight 1, no hardening; `-all-terms` has both.
    weighted, keys = dict.fromkeys(SCALARS, 0.5), dict.fromkeys(KEYS, 12345)
    scalars = {**weighted, "linear_weight": 1.0, "hardening": 0.0}
    codes, levels = _grid()[0], _meta(16, dtype=torch.float32)
    for optimizer in _MOMENTS:
        for storage in _STORAGE:
            for group in (64, 32, 96, -1) if (optimizer, storage) == ("momentum", "8bit") else (64,):
                frac, ref, grad, first, second = _state(storage, optimizer)
                default = storage in ("8bit", "8bit-f32grad", "f32") and optimizer != "sgd" and group != 96
                scale = _meta(ROWS, 1 if group == -1 else -(-COLS // group), dtype=torch.bfloat16)
                arguments = (
                    frac,
                    ref,
                    grad,
                    scale,
                    first,
                    second,
                    None,
                    None,
                    group,
                    optimizer,
                    scalars,
                    keys,
                )
                yield Case(f"projected_step/{optimizer}-{storage}-g{group}", default,
                           projected_step.projected_step_fwd, arguments)  # fmt: skip
        frac, ref, grad, first, second = _state("8bit-f32grad", optimizer)
        scale = _meta(ROWS, COLS // 64, dtype=torch.bfloat16)
        yield Case(f"projected_step/{optimizer}-8bit-all-terms", optimizer != "sgd", projected_step.projected_step_fwd,
                   (frac, ref, grad, scale, first, second, None, None, 64, optimizer, weighted, keys))  # fmt: skip
        scale = _meta(ROWS, COLS // 16, dtype=torch.float32)
        arguments = (frac, ref, grad, scale, first, second, codes, levels, 16, optimizer, scalars, keys)
        yield Case(f"projected_step/{optimizer}-8bit-table", optimizer != "sgd", projected_step.projected_step_fwd,
                   arguments)  # fmt: skip


def _step_cases() -> Iterator[Case]:
    """The epilogue step, in the tiles that soft_linear_table may name and those that stand in for them."""
    scalars, keys = dict.fromkeys(SCALARS, 0.5), dict.fromkeys(KEYS, 12345)
    y, levels = _meta(TOKENS, ROWS, dtype=torch.bfloat16), _meta(16, dtype=torch.float32)
    variants: tuple[tuple[str, str, int, bool], ...] = (
        ("", "8bit", COLS, False), ("-table", "8bit", COLS, True), ("-f32state", "f32", COLS, False),
        ("-bf16state", "bf16", COLS, False), ("-u16state", "u16", COLS, False), ("-ragged", "8bit", COLS - 1, False),
        ("-ragged-table", "8bit", COLS - 1, True), ("-ragged-f32state", "f32", COLS - 1, False),
    )  # fmt: skip
    for optimizer in _MOMENTS:
        for name, storage, cols, table in variants:
            plain = storage == "8bit" and not table
            tiles = {fitting_step_tile(tile, cols, optimizer, plain) for tile in ("compact", "square")}
            for tile in sorted(tiles):
                frac, ref, _, first, second = _state(storage, optimizer, cols)
                x, group = _meta(TOKENS, cols, dtype=torch.bfloat16), 16 if table else 64
                scale = _meta(ROWS, -(-cols // group), dtype=torch.bfloat16)
                grid = (_grid(cols=cols)[0], levels) if table else (None, None)
                arguments = (
                    y,
                    x,
                    frac,
                    ref,
                    scale,
                    first,
                    second,
                    *grid,
                    group,
                    optimizer,
                    scalars,
                    keys,
                    STEP_CONFIGS[tile],
                )
                yield Case(f"soft_linear_step/{optimizer}-{tile}{name}", optimizer != "sgd",
                           soft_linear.soft_linear_step, arguments)  # fmt: skip


# Tile -> capabilities for which soft_linear_table chooses it, or that need it for odd widths and look-up tables; empty
# for all. Tuning may choose any other tile too (those of LARGE on sm_90 only): they are compiled with --all.
_CHOSEN: dict[str, tuple[int, ...]] = {
    "compact": (), "ragged": (), "narrow": (), "square": (80,), "deep": (90,)
}  # fmt: skip
_USUAL = (
    "u8-g64", "u8-g32-zero", "u8-g128-zero", "u8-g64-table", "u8-ragged", "u8-ragged-table", "u8-ragged-table-packed",
    "u8-g32-min", "u8-g64-min-bf16", "u8-g64-min-f16", "u8-index-zero",
    "u8-ragged-min", "u8-ragged-min-bf16", "u8-ragged-min-f16", "u8-ragged-index-zero",
)  # fmt: skip
# `compact` is every other device's tile and small: one grid of a kind stands for the usual ones by default.
_USUAL_COMPACT = ("u8-g64", "u8-g64-table", "u8-g64-min-bf16", "u8-index-zero")
# What decides how the gradient of frac is made: offsets do not.
_SLOPES = ("u8-g64", "u8-g64-table", "u8-index", "u8-ragged", "u8-ragged-table", "u8-ragged-index")


def _fits(tile: str, name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a grid may meet this tile; those of odd widths are worth a look on one even width only."""
    cols = kwargs.get("cols", COLS)
    even = tile in ("ragged", "narrow") and cols % 16 == 0
    return fitting_tile(tile, cols, "table" in kwargs, "index" in kwargs) == tile and (
        not even or name == "u8-g64"
    )


def _pair(
    name: str, tile: str, kwargs: dict[str, Any], default: bool, targets: tuple[int, ...]
) -> Iterator[Case]:
    """Forward and dX on one grid with one tile."""
    q_down, frac, scale, zero, table = _grid(**kwargs)
    group, cols, config = kwargs.get("group", 64), kwargs.get("cols", COLS), CONFIGS[tile]
    weight, further = (q_down, frac, scale, zero, table), _further(scale, **kwargs)
    x, y = (_meta(TOKENS, size, dtype=torch.bfloat16) for size in (cols, ROWS))
    yield Case(f"soft_linear_fwd/{name}-{tile}", default, soft_linear.soft_linear_fwd,
               (x, *weight, None, 4, group, False, config, *further), targets)  # fmt: skip
    yield Case(f"soft_linear_dx/{name}-{tile}", default, soft_linear.soft_linear_dx,
               (y, *weight, 4, group, False, config, *further), targets)  # fmt: skip


def _soft_linear_cases() -> Iterator[Case]:
    y = _meta(TOKENS, ROWS, dtype=torch.bfloat16)
    for tile, config in CONFIGS.items():
        for name, _, kwargs in _WEIGHTS:
            if not _fits(tile, name, kwargs):
                continue
            # An index takes `square` in place of the larger ones too.
            index = "index" in kwargs
            targets = () if index else _CHOSEN.get(tile, (90,))
            usual = name in (_USUAL_COMPACT if tile == "compact" else _USUAL)
            default = tile in _CHOSEN and usual and (tile not in ("ragged", "narrow") or name != "u8-g64")
            yield from _pair(name, tile, kwargs, default, targets)
            if name not in _SLOPES:
                continue
            q_down, frac, scale, _, levels = _grid(**kwargs)
            x = _meta(TOKENS, frac.shape[1], dtype=torch.bfloat16)
            default = tile in ("compact", "deep") or "ragged" in name or index
            arguments = (y, x, q_down, scale, levels, 4, kwargs.get("group", 64), torch.float32, config)
            yield Case(f"soft_linear_dfrac/{name.removeprefix('u8-')}-{tile}", default, soft_linear.soft_linear_dfrac,
                       (*arguments, _further(scale, **kwargs)[1]), targets)  # fmt: skip
    # What tuning may choose on sm_90 beside its first guess.
    yield from _pair("u8-g64-tuned", "square", {}, False, (90,))
    deep, weight = CONFIGS["deep"], _grid()
    x = _meta(TOKENS, COLS, dtype=torch.bfloat16)
    bias = _meta(ROWS, dtype=torch.bfloat16)
    yield Case("soft_linear_fwd/reference-bias-deep", False, soft_linear.soft_linear_fwd,
               (x, *weight, bias, 4, 64, True, deep))  # fmt: skip
    half = _meta(TOKENS, COLS, dtype=torch.float16)
    yield Case("soft_linear_fwd/f16-deep", False, soft_linear.soft_linear_fwd,
               (half, *weight, None, 4, 64, False, deep))  # fmt: skip
    single = _meta(TOKENS, COLS, dtype=torch.float32)
    yield Case("soft_linear_fwd/f32-compact", False, soft_linear.soft_linear_fwd,
               (single, *weight, None, 4, 64, False, CONFIGS["compact"]))  # fmt: skip


def _linear_kl_cases() -> Iterator[Case]:
    for name, default, dtype, mask, bias, scale, cap in (
        ("bf16", True, torch.bfloat16, False, False, 1.0, None),
        ("bf16-mask", True, torch.bfloat16, True, False, 1.0, None),
        ("f16-softcap-bias", False, torch.float16, True, True, 0.5, 30.0),
        ("f32", False, torch.float32, False, False, 1.0, None),
        ("f64", False, torch.float64, False, False, 1.0, None),
    ):
        hidden = _meta(1024, COLS, dtype=dtype)
        arguments = (
            hidden, hidden, _meta(VOCAB, COLS, dtype=dtype), _meta(VOCAB, dtype=dtype) if bias else None,
            _meta(1024, dtype=torch.bool) if mask else None, None if mask else 1024.0, scale, cap, 1024,
        )  # fmt: skip
        yield Case(f"linear_kl/{name}", default, linear_kl.linear_kl_fwd, arguments)
        if name == "bf16":  # what benchmarks time beside it
            yield Case("linear_kl/bf16-8192", False, linear_kl.linear_kl_fwd, (*arguments, 8192))


def _packed_linear_cases() -> Iterator[Case]:
    """The portable fallback over the "mma" layout; its words are those of discquant.ops.pack."""
    for bits in (3, 4):
        words = _meta(ROWS // 64 * (COLS // 128) * 4 * 64 * bits, dtype=torch.int32)
        scale = _meta(ROWS // 64, COLS // 64, 64, dtype=torch.bfloat16)
        for tokens in (1, 256):
            for name, dtype, zero in (("bf16", torch.bfloat16, False), ("f16-zero", torch.float16, True),
                                      ("f32", torch.float32, False)):  # fmt: skip
                x, z = (
                    _meta(tokens, COLS, dtype=dtype),
                    _meta(*scale.shape, dtype=torch.uint8) if zero else None,
                )
                arguments = (x, words, scale, z, None, ROWS, COLS, bits, 64)
                yield Case(f"packed_linear/{name}-{bits}bit-m{tokens}", name == "bf16",
                           packed_linear.packed_linear_fwd, arguments)  # fmt: skip


def _hadamard_cases() -> Iterator[Case]:
    for size, order in ((4096, 1), (14336, 28), (28672, 28), (11008, 172), (16384, 1), (32768, 2)):
        x = _meta(64, size, dtype=torch.bfloat16)
        signs, matrix = _meta(size, dtype=torch.int8), _meta(order, order, dtype=torch.int8)
        for inverse in (False, True):
            name = f"hadamard/{size}{'-inverse' if inverse else ''}"
            yield Case(name, not inverse, hadamard.hadamard_fwd, (x, signs, matrix, inverse))


def _anchor_codes_cases() -> Iterator[Case]:
    for name, cols in (("even", COLS), ("ragged", COLS - 1)):
        codes, side = (_meta(ROWS, size, dtype=torch.uint8) for size in (cols, (cols + 7) // 8))
        yield Case(f"anchor_codes/{name}", True, anchor_codes.anchor_codes_fwd,
                   (codes, side, _meta(512, dtype=torch.uint8)))  # fmt: skip


def _place_outliers_cases() -> Iterator[Case]:
    pieces, number = -(-ROWS * COLS // 255), ROWS * COLS // 64
    for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        weight, value = _meta(ROWS, COLS, dtype=dtype), _meta(number, dtype=torch.bfloat16)
        arguments = (weight, _meta(number, dtype=torch.uint8), _meta(pieces, dtype=torch.uint8), value)
        yield Case(f"place_outliers/{name}", True, place_outliers.place_outliers, arguments)


def cases() -> Iterator[Case]:
    """All cases, op by op."""
    yield from _soft_weight_cases()
    yield from _projected_step_cases()
    yield from _step_cases()
    yield from _soft_linear_cases()
    yield from _linear_kl_cases()
    yield from _packed_linear_cases()
    yield from _hadamard_cases()
    yield from _anchor_codes_cases()
    yield from _place_outliers_cases()
