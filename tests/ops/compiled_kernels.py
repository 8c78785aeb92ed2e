# SPDX-License-Identifier: Apache-2.0
"""Run by test_compiled_kernels.py in a fresh process: machine-independent code of kernels against their references.

`JITFunction.run` compiles for sm_90 and runs the PTX on the arguments of the call, which lie in CPU memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
import sys
from typing import Any

import ptx
import torch
import triton
from discquant.triton_kernels import aot
from discquant.triton_kernels.anchor_codes import anchor_codes_fwd
from discquant.triton_kernels.place_outliers import place_outliers
from discquant.triton_kernels.projected_step import projected_step_fwd
from discquant.triton_kernels.soft_weight import soft_weight_fwd
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from discquant.ops import StepOptions, anchor_codes, soft_weight
from discquant.ops._steps import flatten_options, launch_arguments
from discquant.ops.reference import projected_step as reference
from discquant.solver.state import pack_places


def _bits(value: Any, kind: str) -> int:
    return struct.unpack("I", struct.pack("f", value))[0] if kind == "fp32" else int(value)


def _run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    launch = aot._describe(self, args, dict(kwargs))
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)
    memory, addresses, parameters = ptx.Memory(), {}, []
    for (name, kind), value in zip(launch.signature.items(), args, strict=False):
        if isinstance(value, Tensor):
            raw = value.view(torch.uint8).reshape(-1)
            if value.data_ptr() not in addresses:
                addresses[value.data_ptr()] = (memory.add(raw.numpy()), raw)
            parameters.append(addresses[value.data_ptr()][0])
        elif kind != "constexpr":
            assert name in launch.signature
            parameters.append(_bits(value, kind))
    ptx.launch(compiled.asm["ptx"], memory, parameters, (*grid, 1)[:2])
    for address, raw in addresses.values():
        raw.copy_(torch.from_numpy(memory.bytes[address : address + raw.numel()]))


def _state(rows: int, cols: int, group_size: int) -> dict[str, Tensor]:
    """Every code, frozen coordinates, gradients that clamp, vanish, overflow and are NaN."""
    frac, ref, second = torch.randint(0, 256, (3, rows, cols), dtype=torch.uint8)
    ref[:, ::7], ref[:, 3::11] = 63, 189
    for tensor in (frac, ref):
        tensor[:, -256:] = torch.arange(256, dtype=torch.uint8)[:cols]
    grad = torch.randn(rows, cols) * 10.0 ** torch.randint(-3, 3, (rows, cols))
    grad.view(-1)[torch.randint(0, grad.numel(), (grad.numel() // 8,))] = 0.0
    for value in (float("nan"), float("inf"), -float("inf"), -0.0, 1e-38):
        grad.view(-1)[torch.randint(0, grad.numel(), (9,))] = value
    second[:, ::5] = 0
    return {
        "frac": frac, "frac_ref": ref, "weight_grad": grad,
        "scale": torch.rand(rows, -(-cols // group_size)).bfloat16(),
        "momentum": torch.randint(-128, 128, (rows, cols), dtype=torch.int8), "second_moment": second,
    }  # fmt: skip


def weights() -> None:
    """Soft weights bit for bit in float32 and bfloat16: every code and place, tiles with and without masks."""
    grids = itertools.product(
        ((8, 512), (9, 300)), (True, False), (None, "zeros", "levels"),
        (torch.uint8, torch.uint16, torch.float32, "reference"), (torch.float32, torch.bfloat16),
    )  # fmt: skip
    for number, ((rows, cols), packed, kind, places, dtype) in enumerate(grids):
        # Levels are looked up by plain operations, and one code a byte differs in how it is loaded.
        if (number % 3 and kind == "levels") or (not packed and dtype == torch.bfloat16):
            continue
        torch.manual_seed(number)
        codes = torch.arange(rows * cols, dtype=torch.int32).view(rows, cols)
        q = (codes % 15).to(torch.uint8)
        q_down = (q[:, ::2] | q[:, 1::2] << 4).contiguous() if packed else q
        if isinstance(places, str):
            frac = (codes % 256).to(torch.uint8)
        elif places == torch.float32:
            frac = torch.rand(rows, cols)
        else:
            frac = (codes * 7919 % (256 if places == torch.uint8 else 65536)).to(torch.int32).to(places)
        groups = -(-cols // 64)
        grid = {
            "scale": torch.randn(rows, groups).bfloat16(),
            "zero_point": torch.randint(0, 16, (rows, groups), dtype=torch.uint8)
            if kind == "zeros"
            else None,
            "table": torch.randn(16).sort().values if kind == "levels" else None,
        }
        is_reference = isinstance(places, str)
        for transpose in (False, True) if number % 4 == 0 else (False,):
            found = soft_weight_fwd(q_down, frac, *grid.values(), 4, 64, dtype, is_reference, transpose)
            wanted = soft_weight(
                q_down, frac, **grid, num_bits=4, group_size=64, dtype=dtype, is_reference=is_reference,
                transpose=transpose, impl="reference",
            )  # fmt: skip
            differ = (found != wanted).nonzero()
            where = (
                f"weight {rows} x {cols}, packed {packed}, {kind}, {places}, {dtype}, transposed {transpose}"
            )
            assert not len(differ), f"{where}: {len(differ)} differ, first at {differ[0].tolist()}"
            print(where)


def other_weights() -> None:
    """Floating minimums, levels rounded to each dtype, and indexed groups, entries that name none included."""
    grids = itertools.product(
        ((8, 512), (9, 300)), (True, False), (torch.float32, torch.bfloat16, torch.float16, None)
    )
    for number, ((rows, cols), packed, minimum) in enumerate(grids):
        torch.manual_seed(number)
        codes = torch.arange(rows * cols, dtype=torch.int32).view(rows, cols)
        q = (codes % 15).to(torch.uint8)
        q_down = (q[:, ::2] | q[:, 1::2] << 4).contiguous() if packed else q
        frac = (codes * 7919 % 256).to(torch.uint8)
        groups = -(-cols // 64)
        scale = torch.randn(rows, groups).to(minimum or torch.float32)
        indexed = minimum is None or number % 2 == 0
        further = {
            "minimum": None if minimum is None else torch.randn(rows, groups).to(minimum),
            "g_idx": torch.randint(-2, groups + 2, (cols,), dtype=torch.int32) if indexed else None,
        }
        for dtype in (torch.float32, torch.bfloat16):
            found = soft_weight_fwd(
                q_down, frac, scale, None, None, 4, 64, dtype, False, False, *further.values()
            )
            inside = None if further["g_idx"] is None else further["g_idx"].clamp(0, groups - 1)
            wanted = soft_weight(
                q_down, frac, scale, num_bits=4, group_size=64, minimum=further["minimum"], g_idx=inside, dtype=dtype,
                impl="reference",
            )  # fmt: skip
            differ = (found != wanted).nonzero()
            where = f"weight {rows} x {cols}, packed {packed}, minimum {minimum}, indexed {indexed}, {dtype}"
            assert not len(differ), f"{where}: {len(differ)} differ, first at {differ[0].tolist()}"
            print(where)


def anchors() -> None:
    """Every code with either side, tiles with and without masks, columns that end within a byte of sides."""
    for rows, cols in ((3, 2048), (16, 256), (5, 300), (70, 13)):
        torch.manual_seed(cols)
        codes = torch.arange(rows * cols, dtype=torch.int32).view(rows, cols)
        side = torch.randint(0, 256, (rows, -(-cols // 8)), dtype=torch.uint8)
        table = torch.randint(0, 256, (512,), dtype=torch.uint8)
        code = (codes * 7919 % 256).to(torch.uint8)
        differ = (
            anchor_codes_fwd(code, side, table) != anchor_codes(code, side, table, impl="reference")
        ).nonzero()
        assert not len(differ), f"anchor {rows} x {cols}: {len(differ)} differ, first at {differ[0].tolist()}"
        print(f"anchor {rows} x {cols}")


def outliers() -> None:
    """Few to a piece, more than a pass takes, and pieces full of them."""
    for rows, cols, share in ((40, 333, 0.07), (9, 100, 0.5), (3, 85, 1.0)):
        torch.manual_seed(cols)
        flags = torch.rand(rows, cols) < share
        low, count = pack_places(flags)
        value, weight = torch.randn(low.numel()).bfloat16(), torch.randn(rows, cols)
        expected = weight.masked_scatter(flags, value.float())
        place_outliers(weight, low, count, value)
        assert torch.equal(weight, expected), f"outlier {rows} x {cols}, {share}"
        print(f"outlier {rows} x {cols}, {share}")


def main() -> None:
    """All kernels."""
    JITFunction.run = _run
    anchors()
    outliers()
    weights()
    other_weights()
    steps()
    far_steps()


def steps() -> None:
    """Compare state and counts bit for bit; block sizes with and without masks."""
    usual = StepOptions(lr=0.03, kl_weight=1.5, grad_clamp=0.5, step=7, moment_bound=0.6, seed=3, tensor_id=5)
    extremes = dataclasses.replace(
        usual, linear_weight=0.3, hardening=0.2, weight_decay=0.1, lr=0.4, first_index=2**32 - 4096, step=900
    )
    # Wide rows in tiles given here, with and without masks; narrow ones as the launcher tiles them.
    shapes: Any = (
        ((2, 512), (1, 256, 2), 1), ((3, 400), (1, 256, 2), 1), ((7, 9), None, None), ((9, 27), None, None),
        ((8, 32), None, None), ((10, 50), None, None), ((16, 100), None, None),
        # The last tile lies past the last group: nothing of it may be read.
        ((2, 768), (1, 256, 2), 1),
    )  # fmt: skip
    for optimizer, base, (shape, block, warps) in itertools.product(
        ("momentum", "lion", "adamw", "sgd"), (usual, extremes), shapes
    ):
        if (block is None or shape[1] == 768) and (optimizer in ("lion", "sgd") or base is extremes):
            continue  # two optimizers show what narrow rows and masks change
        torch.manual_seed(len(optimizer))
        options = dataclasses.replace(
            base, optimizer=optimizer, linear_weight=0.0 if optimizer == "sgd" else base.linear_weight
        )
        group_size = 256 if shape[1] == 768 else 64
        state = _state(*shape, group_size)
        expected = {name: tensor.clone() for name, tensor in state.items()}
        unused = {"sgd": ("momentum", "second_moment"), "adamw": ()}.get(optimizer, ("second_moment",))
        given = {name: None if name in unused else tensor for name, tensor in expected.items()}
        wanted = reference.projected_step_(**given, group_size=group_size, options=options)
        counts = projected_step_fwd(
            state["frac"], state["frac_ref"], state["weight_grad"], state["scale"],
            *(None if name in unused else state[name] for name in ("momentum", "second_moment")),
            None, None, group_size, *launch_arguments(*flatten_options(options)), block=block, num_warps=warps,
        )  # fmt: skip
        where = f"{optimizer} {shape} step {options.step}"
        for name, tensor in state.items():
            if name in ("frac", "momentum", "second_moment"):
                differ = (tensor != expected[name]).nonzero()
                assert not len(differ), (
                    f"{where}: {len(differ)} of {name} differ, first at {differ[0].tolist()}: "
                    + (f"{tensor[tuple(differ[0])]} for {expected[name][tuple(differ[0])]}")
                )
        assert torch.equal(counts, wanted), f"{where}: counts {counts.tolist()} for {wanted.tolist()}"
        print(where, wanted.tolist())


def far_steps() -> None:
    """8-bit AdamW where squares leave float32's normal numbers, which the Newton steps do not cover."""
    for value, further in (
        (1e22, {"grad_clamp": 1e30}),
        (1e22, {"grad_clamp": 1e30, "moment_bound": 1e25}),
        (1e-19, {"eps": 1e-30, "linear_weight": 0.0}),
        (1e-19, {"eps": 1e-10, "linear_weight": 0.0}),
    ):
        options = StepOptions(optimizer="adamw", kl_weight=1.0, **further)
        frac, ref = (torch.full((8, 128), code, dtype=torch.uint8) for code in (128, 100))
        found = {
            "frac": frac, "momentum": torch.zeros(8, 128, dtype=torch.int8),
            "second_moment": torch.zeros(8, 128, dtype=torch.uint8),
        }  # fmt: skip
        expected = {name: tensor.clone() for name, tensor in found.items()}
        read = {"frac_ref": ref, "weight_grad": torch.full((8, 128), value), "scale": torch.ones(8, 1)}
        wanted = reference.projected_step_(**expected, **read, group_size=-1, options=options)
        counts = projected_step_fwd(
            found["frac"], *read.values(), found["momentum"], found["second_moment"], None, None, -1,
            *launch_arguments(*flatten_options(options)),
        )  # fmt: skip
        where = f"gradients of {value}, {further}"
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), f"{where}: {name}"
        assert torch.equal(counts, wanted), where
        print(where)


if __name__ == "__main__":
    sys.exit(main())
