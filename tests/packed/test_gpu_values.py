# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a GPU: exact weights, float64 bounds, other dtypes, strides and values, a whole model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from discquant.ops import pack as packing
from discquant.ops import packed_linear_table as table
from discquant.ops.packed_linear import dequantize_packed, packed_linear

pytestmark = pytest.mark.gpu

Make = Callable[..., Any]
TOKENS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129, 257, 1000]
HALF = [torch.float16, torch.bfloat16]
GRIDS = list(itertools.product([3, 4], [32, 64, 128, 256, -1], [True, False]))
SHAPES = [(1, 8), (64, 128), (97, 321), (200, 1000), (1040, 4104)]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
def test_dequantisation_is_bit_exact(
    bits: int, group: int, symmetric: bool, dtype: torch.dtype, make_case: Make
) -> None:
    """By the kernel that writes weights, and by an identity matrix through the tensor cores, split and tiled."""
    case = make_case(200, 328, bits, group, symmetric, dtype)
    for target in (torch.float32, *HALF):
        actual = dequantize_packed(*case.tensors, **case.sizes, dtype=target)
        assert torch.equal(actual.cpu(), case.served(target))
        panel = dequantize_packed(*case.tensors, **case.sizes, dtype=target, rows=(16, 199))
        assert torch.equal(panel.cpu(), case.served(target)[16:199])
    one = torch.eye(328, dtype=dtype, device="cuda")
    expected = case.served(dtype).t()
    for rows in (one.split(16), one.split(9), one.split(64), (one,)):
        for mode in ("exact", "auto"):
            y = torch.cat([case(part, mode=mode) for part in rows]).cpu()
            assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS[::3])
def test_matches_float64(
    bits: int,
    group: int,
    symmetric: bool,
    shape: tuple[int, int],
    dtype: torch.dtype,
    make_case: Make,
    allowed: Make,
    is_dense: Make,
) -> None:
    case = make_case(*shape, bits, group, symmetric, dtype)
    rounded = case.served(dtype).double()
    for tokens in TOKENS:
        x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
        for mode in ("auto", "exact"):
            y = case(x.cuda(), bias.cuda(), mode=mode, settled=tokens % 2 == 0).cpu()
            if is_dense(tokens, bits):
                # The same call of the library on the same weight: its own rounding is not ours to bound.
                plain = torch.nn.functional.linear(x.cuda(), case.served(dtype).cuda(), bias.cuda())
                assert torch.equal(y, plain.cpu()), (tokens, mode)
                continue
            # The scale multiplies float32 sums; in exact mode and in the kernel for many tokens, weights are rounded.
            many = table.prefills(torch.device("cuda", 0), bits, tokens)
            weight = rounded if mode == "exact" or many else case.weight
            oracle = x.double() @ weight.t() + bias.double()
            y = y.double()
            limit = allowed(x, weight, oracle) + 2.0**-23 * bias.double().abs()
            assert ((y - oracle).abs() <= limit).all(), (tokens, mode, ((y - oracle).abs() / limit).max())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_of_another_dtype(
    scale_dtype: torch.dtype, make_case: Make, allowed: Make, is_dense: Make
) -> None:
    case = make_case(130, 264, 4, 64, False, scale_dtype)
    for dtype, tokens in itertools.product(HALF, (1, 16, 40)):
        x = torch.randn(tokens, 264).to(dtype)
        same = dtype == scale_dtype
        many = same and table.prefills(torch.device("cuda", 0), 4, tokens)
        weight = case.served(dtype).double() if many or is_dense(tokens, 4, same) else case.weight
        oracle = x.double() @ weight.t()
        assert ((case(x.cuda()).double().cpu() - oracle).abs() <= allowed(x, weight, oracle)).all()


def test_float32_activations_use_the_dense_path(make_case: Make) -> None:
    case = make_case(70, 200, 3, 64, False, torch.float16)
    x = torch.randn(5, 200, device="cuda")
    weight = dequantize_packed(*case.tensors, **case.sizes, dtype=torch.float32)
    assert torch.equal(case(x), torch.nn.functional.linear(x, weight))


def test_strides(make_case: Make) -> None:
    case = make_case(70, 136, 4, 32, True)
    wide = torch.randn(40, 400, device="cuda", dtype=torch.float16)
    for x in (
        wide[:, 5:141], wide[:, 8:144], wide[::2, :136], torch.randn(136, 4, device="cuda").half().t(),
        torch.randn(1, 136, device="cuda").half().expand(3, 136), wide[:6, :136].reshape(2, 3, 136),
    ):  # fmt: skip
        assert torch.equal(case(x), case(x.clone(memory_format=torch.contiguous_format)))


def test_pack_unpack_repack_equal_the_cpus(make_case: Make) -> None:
    for bits, group, symmetric in GRIDS:
        case = make_case(97, 321, bits, group, symmetric)
        zero = None if case.zero is None else case.zero.cuda()
        for layout in ("mma", "cpu"):
            keys: dict[str, Any] = {"num_bits": bits, "layout": layout}
            words = packing.pack(case.q.cuda(), zero, group_size=group, **keys)
            assert torch.equal(words.cpu(), packing.pack(case.q, case.zero, group_size=group, **keys))
            assert torch.equal(packing.unpack(words, out_features=97, in_features=321, **keys).cpu(), case.q)
            new: Any = "cpu" if layout == "mma" else "mma"
            moved = packing.repack(words, out_features=97, in_features=321, new_layout=new, **keys)
            assert torch.equal(
                moved.cpu(), packing.pack(case.q, case.zero, num_bits=bits, group_size=group, layout=new)
            )


def test_special_activations(make_case: Make) -> None:
    """A NaN or infinity shows in its own row only; empty batches and weights are fine."""
    case = make_case(40, 256, 4, 64, True)
    for tokens in (5, 40):
        x = torch.randn(tokens, 256, device="cuda").half()
        x[0], x[2, 100], x[3, 7] = 0, float("nan"), float("inf")
        y = case(x)
        assert not y[0].any() and y[1].isfinite().all() and y[4:].isfinite().all()
        assert y[2].isnan().all() and not y[3].isfinite().any()
    assert case(torch.zeros(0, 256, device="cuda").half()).shape == (0, 40)
    assert make_case(0, 64)(torch.zeros(2, 64, device="cuda").half()).shape == (2, 0)


def test_triton_fallback_agrees(make_case: Make, allowed: Make) -> None:
    case = make_case(200, 328, 3, 64, False)
    for tokens in (1, 16, 70):
        x = torch.randn(tokens, 328).half()
        oracle = x.double() @ case.served(torch.float16).double().t()
        y = packed_linear(x.cuda(), *case.tensors, **case.sizes, impl="triton").double().cpu()
        assert ((y - oracle).abs() <= allowed(x, case.served(torch.float16).double(), oracle)).all()


@torch.no_grad()
def test_module_moves_between_devices(tiny_llama_dir: Path) -> None:
    """A packed model moved to the GPU writes the text of plain weights there, in the exact mode."""
    from transformers import AutoModelForCausalLM

    from discquant.formats.codes import QuantizedLinear
    from discquant.modules import load_packed

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16).eval()
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16).eval()
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            q = torch.randint(0, 8, module.weight.shape, dtype=torch.uint8)
            step = torch.full((q.shape[0], q.shape[1] // 64), 0.01).bfloat16()
            layers.append(QuantizedLinear(name, q, step, None, 3, 64))
            plain.get_submodule(name).weight.data = layers[-1].dequantize(torch.bfloat16)
    load_packed(model, layers, mode="exact", fuse=False)
    prompt = torch.randint(3, 1000, (1, 9), device="cuda")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.cuda().generate(prompt, **settings), plain.cuda().generate(prompt, **settings))
    assert torch.equal(model.cpu()(prompt.cpu()).logits, plain.cpu()(prompt.cpu()).logits)
