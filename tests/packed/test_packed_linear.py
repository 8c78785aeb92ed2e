# SPDX-License-Identifier: Apache-2.0
"""packed_linear against float64, and between instruction sets, batch sizes and threads."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant import _extension, environment
from discquant.ops import pack as packing
from discquant.ops.packed_linear import ISAS, dequantize_packed, packed_linear

CPP = pytest.mark.skipif(not _extension.available(), reason="discquant._C is not built")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
MODES = ["a15", "a8", "fp32"]


def isas() -> list[str]:
    """Instruction sets that this processor has, worst first."""
    return environment.cpu_isas()[::-1]


@dataclass(frozen=True)
class Case:
    """A packed weight and what it stands for."""

    q: Tensor
    step: Tensor  # [out_features, num_groups]
    zero: Tensor | None
    tensors: tuple[Tensor, Tensor, Tensor | None]
    sizes: dict[str, Any]

    def weight(self) -> Tensor:
        """float64 weight from the codes, not from the packed words."""
        size = self.q.shape[1] if self.sizes["group_size"] == -1 else self.sizes["group_size"]
        group = torch.arange(self.q.shape[1]) // size
        zero = 2.0 ** (self.sizes["num_bits"] - 1) if self.zero is None else self.zero.double()[:, group]
        return self.step.double()[:, group] * (self.q.double() - zero)


def make(
    n: int,
    k: int,
    bits: int,
    group: int,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float16,
    layout: str = "cpu",
) -> Case:
    groups = 1 if group == -1 else -(-k // group)
    q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    step = (torch.rand(n, groups) * 0.1 - 0.03).to(scale_dtype)  # AutoRound writes negative scales too
    zero = None if symmetric else torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8)
    words = packing.pack(q, zero, num_bits=bits, group_size=group, layout=layout)
    packed_zero = None if zero is None else packing.pack_groups(zero, layout=layout)
    sizes = {"out_features": n, "in_features": k, "num_bits": bits, "group_size": group, "layout": layout}
    return Case(q, step, zero, (words, packing.pack_groups(step, layout=layout), packed_zero), sizes)


GRIDS = list(itertools.product([3, 4], [32, 64, 128, 256, -1], [True, False]))


@CPP
@pytest.mark.parametrize("layout", ["cpu", "mma"])
@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
def test_dequantize_is_bit_exact(bits: int, group: int, symmetric: bool, layout: str) -> None:
    """One float32 product and one cast, for every pair of dtypes, from both layouts, whole and by panels."""
    for scale_dtype, dtype in itertools.product(FLOATS, FLOATS):
        case = make(37, 300, bits, group, symmetric, scale_dtype, layout)
        size = 300 if group == -1 else group
        index = torch.arange(300) // size
        zero = 2 ** (bits - 1) if case.zero is None else case.zero.float()[:, index]
        expected = (case.step.float()[:, index] * (case.q.float() - zero)).to(dtype)
        for impl in ("cpp", "reference"):
            actual = dequantize_packed(*case.tensors, **case.sizes, dtype=dtype, impl=impl)
            assert torch.equal(actual, expected)
            panel = dequantize_packed(*case.tensors, **case.sizes, dtype=dtype, impl=impl, rows=(16, 37))
            assert torch.equal(panel, expected[16:])


@CPP
@pytest.mark.parametrize(("bits", "symmetric"), list(itertools.product([3, 4], [True, False])))
def test_identity_gives_the_weight(bits: int, symmetric: bool) -> None:
    """x = identity returns the dequantised weight bit for bit in the float32 and exact modes."""
    case = make(50, 96, bits, 32, symmetric, torch.float32)
    for mode in ("fp32", "exact"):
        y = packed_linear(torch.eye(96), *case.tensors, **case.sizes, mode=mode, impl="cpp")
        assert torch.equal(y.t(), dequantize_packed(*case.tensors, **case.sizes, dtype=torch.float32))


def bound(mode: str, x: Tensor, weight: Tensor, case: Case) -> Tensor:
    """Largest error that the arithmetic of a mode can make, [tokens, out_features]."""
    k = x.shape[1]
    size = case.sizes["group_size"]
    block = min(128 if size == -1 else size, 128)
    blocks = -(-k // block)
    magnitude = x.double().abs() @ weight.abs().t()
    # Float sums: each of at most sqrt(K) effective roundings of the running magnitude.
    error = 2 * (k**0.5 + 4) * 2.0**-24 * magnitude
    if mode in ("a15", "a8"):
        levels = 32639 if mode == "a15" else 127
        padded = torch.nn.functional.pad(x.double(), (0, blocks * block - k)).view(-1, blocks, block)
        half_step = padded.abs().amax(-1) / levels / 2  # [tokens, blocks]
        w = torch.nn.functional.pad(weight.abs(), (0, blocks * block - k)).view(-1, blocks, block).sum(-1)
        error = error + 1.0001 * half_step @ w.t()
    return error


@CPP
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 130), (64, 128), (97, 321), (130, 1000)])
@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS[::3])
def test_matches_float64(bits: int, group: int, symmetric: bool, n: int, k: int, dtype: torch.dtype) -> None:
    case = make(n, k, bits, group, symmetric, dtype)
    weight = case.weight()
    for tokens in (1, 3, 8, 17):
        x = torch.randn(tokens, k).to(dtype)
        bias = torch.randn(n).to(dtype)
        oracle = x.double() @ weight.t() + bias.double()
        for mode in MODES:
            y = packed_linear(x, *case.tensors, bias, **case.sizes, mode=mode, impl="cpp")
            error = (y.double() - oracle).abs()
            allowed = bound(mode, x, weight, case) + 2.0**-23 * (oracle.abs() + bias.double().abs())
            allowed += torch.finfo(dtype).eps / 2 * (oracle.abs() + allowed)
            assert (error <= allowed).all(), f"{mode}: {(error - allowed).max()}"


@CPP
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
def test_instruction_sets_agree(bits: int, group: int, symmetric: bool, mode: str) -> None:
    """The same bits from every instruction set that the machine has."""
    case = make(70, 400, bits, group, symmetric)
    for tokens in (1, 2, 4, 6, 7, 8, 11, 24, 25, 31, 32):
        x = torch.randn(tokens, 400) * torch.logspace(-3, 3, 400)
        first, *others = (
            packed_linear(x, *case.tensors, **case.sizes, mode=mode, isa=isa, impl="cpp") for isa in isas()
        )
        for isa, other in zip(isas()[1:], others, strict=True):
            assert torch.equal(first, other), isa


@CPP
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(3, 32, True), (4, 64, False), (3, 128, False), (4, -1, True)]
)
def test_many_rows_agree(bits: int, group: int, symmetric: bool, mode: str) -> None:
    """So many rows that kernels take several pairs of row tiles abreast, and one to three are left over."""
    case = make(2250, 290, bits, group, symmetric)
    threads = torch.get_num_threads()
    try:
        for tokens in (1, 2, 3, 5, 16, 17, 33):
            x = torch.randn(tokens, 290)
            torch.set_num_threads(1)
            first, *others = (
                packed_linear(x, *case.tensors, **case.sizes, mode=mode, isa=isa, impl="cpp")
                for isa in isas()
            )
            for isa, other in zip(isas()[1:], others, strict=True):
                assert torch.equal(first, other), (isa, tokens)
            for count in (2, 16):
                torch.set_num_threads(count)
                assert torch.equal(
                    packed_linear(x, *case.tensors, **case.sizes, mode=mode, impl="cpp"), first
                )
    finally:
        torch.set_num_threads(threads)


@CPP
def test_environment_knows_the_instruction_sets() -> None:
    """`discquant env` names the sets that the operator accepts, and no other."""
    case = make(16, 128, 4, 64, True)
    known = environment.cpu_isas()
    assert known[-1] == "scalar" and set(known) <= set(ISAS)
    for isa in ISAS:
        if isa in known:
            packed_linear(torch.zeros(1, 128), *case.tensors, **case.sizes, isa=isa)
        else:
            with pytest.raises(RuntimeError, match="lacks the instructions"):
                packed_linear(torch.zeros(1, 128), *case.tensors, **case.sizes, isa=isa)
    facts = environment.facts()
    assert facts["kernels"]["packed_linear cpu"].startswith(known[0])
    assert facts["extension"]["layout_version"] == packing.LAYOUT_VERSION


@CPP
@pytest.mark.parametrize("mode", MODES)
def test_batch_and_threads_change_nothing(mode: str) -> None:
    """Row i of a batch equals the row alone, for any number of threads, twenty times."""
    case = make(200, 700, 3, 64, False)
    x = torch.randn(1000, 700, dtype=torch.bfloat16)
    call = {**case.sizes, "mode": mode, "impl": "cpp"}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        full = packed_linear(x, *case.tensors, **call)
        for i in (0, 1, 500, 999):
            assert torch.equal(packed_linear(x[i], *case.tensors, **call), full[i])
        torch.set_num_threads(3)
        for tokens in (2, 5, 7, 9, 15, 16, 31, 33, 65, 127, 257):
            assert torch.equal(packed_linear(x[:tokens], *case.tensors, **call), full[:tokens])
        for _ in range(20):
            assert torch.equal(packed_linear(x[:16], *case.tensors, **call), full[:16])
    finally:
        torch.set_num_threads(threads)


@CPP
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("isa", isas())
def test_largest_sums(isa: str, bits: int) -> None:
    """Top codes against activations whose low byte is -128 throughout: sums of 16 bits at their limit."""
    q = torch.full((32, 256), 2**bits - 1, dtype=torch.uint8)
    x = torch.full((8, 256), 32384.0)  # 256 * 127 - 128 of 32639
    x[:, ::128] = 32639.0
    words = packing.pack(q, torch.zeros(32, 1, dtype=torch.uint8), num_bits=bits, group_size=-1, layout="cpu")
    scale, zero = torch.ones(1, 1, 32), torch.zeros(1, 1, 32, dtype=torch.uint8)
    scale, zero = scale.expand(2, 1, 32).contiguous(), zero.expand(2, 1, 32).contiguous()
    sizes = {"out_features": 32, "in_features": 256, "num_bits": bits, "group_size": -1, "layout": "cpu"}
    for tokens, sign in itertools.product((1, 2, 4, 8), (1, -1)):
        y = packed_linear(sign * x[:tokens], words, scale, zero, **sizes, mode="a15", isa=isa)
        expected = sign * (2**bits - 1) * x[:tokens].double().sum(1, keepdim=True)
        assert ((y.double() - expected).abs() <= 1e-6 * expected.abs()).all()


@CPP
def test_reference_agrees() -> None:
    case = make(33, 150, 3, 32, False, layout="mma")
    x = torch.randn(2, 3, 150, dtype=torch.float64).float()
    reference = packed_linear(x, *case.tensors, **case.sizes, impl="reference")
    exact = packed_linear(x, *case.tensors, **case.sizes, mode="exact", impl="cpp")
    assert reference.shape == exact.shape == (2, 3, 33)
    oracle = x.double() @ case.weight().t()
    limit = 2 * (
        (reference.double() - oracle).abs().max() + torch.finfo(torch.float32).eps * oracle.abs().max()
    )
    assert (exact.double() - oracle).abs().max() <= limit


@pytest.mark.parametrize(("bits", "symmetric"), list(itertools.product([3, 4], [True, False])))
def test_triton_matches_float64(bits: int, symmetric: bool) -> None:
    """The fallback over the "mma" layout, interpreted where there is no GPU."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for n, k, tokens, group in ((70, 200, 5, 64), (64, 130, 17, -1)):
        case = make(n, k, bits, group, symmetric, torch.float32, "mma")
        x, bias = torch.randn(tokens, k), torch.randn(n)
        tensors = tuple(None if t is None else t.to(device) for t in case.tensors)
        y = packed_linear(x.to(device), *tensors, bias.to(device), **case.sizes, impl="triton").cpu()
        oracle = x.double() @ case.weight().t() + bias.double()
        allowed = bound("fp32", x, case.weight(), case) + 2.0**-23 * (oracle.abs() + bias.double().abs())
        # The weight is rounded to float32 first, unlike in the CPU's fp32 mode.
        allowed += 2.0**-24 * x.double().abs() @ case.weight().abs().t()
        assert ((y.double() - oracle).abs() <= allowed).all()


@CPP
@pytest.mark.parametrize("mode", [*MODES, "exact"])
def test_special_activations(mode: str) -> None:
    """Zeros give zeros, tiny values no NaN, and a NaN or infinity shows in its own row only.

    A NaN makes its whole row NaN, in a15 and a8 an infinity too; elsewhere that gives what its products are.
    """
    case = make(40, 256, 4, 64, True)
    x = torch.randn(5, 256)
    x[0], x[1] = 0.0, 1e-38
    x[2, 100], x[3, 7] = float("nan"), float("inf")
    y = packed_linear(x, *case.tensors, **case.sizes, mode=mode, impl="cpp")
    assert not y[0].any() and y[1].isfinite().all() and y[4].isfinite().all()
    assert y[2].isnan().all()
    product = float("inf") * case.weight()[:, 7].float()
    expected = torch.full_like(product, float("nan")) if mode in ("a15", "a8") else product
    assert expected.isnan().any() and torch.equal(y[3].nan_to_num(7.0), expected.nan_to_num(7.0))


@CPP
def test_float16_in_a_thread_that_flushes_subnormals() -> None:
    """torch.set_flush_denormal reaches float32 only: small scales and activations in float16 keep their bits."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()][:, None]
    n = len(halves)
    one = packing.pack(torch.full((n, 1), 9, dtype=torch.uint8), num_bits=4, group_size=-1, layout="cpu")
    scales = packing.pack_groups(halves, layout="cpu")
    sizes = {"out_features": n, "in_features": 1, "num_bits": 4, "group_size": -1, "layout": "cpu"}
    small = make(40, 200, 4, 64, False)
    step = (small.tensors[1].float() * 1e-4).half()  # below 2^-14
    calls = [
        {"x": x, "scale": scale, "mode": mode, "isa": isa}
        for mode, isa in itertools.product(MODES, isas())
        for x, scale in (
            (torch.randn(3, 200), step),
            ((torch.randn(3, 200) * 1e-5).half(), small.tensors[1]),
        )
    ]

    def results() -> list[Tensor]:
        words, _, zero = small.tensors
        products = [packed_linear(words=words, zero_point=zero, **small.sizes, **call) for call in calls]
        return [
            *(y.view(torch.int32 if y.dtype == torch.float32 else torch.int16) for y in products),
            dequantize_packed(one, scales, **sizes, dtype=torch.float32).view(torch.int32),
            dequantize_packed(one, scales, **sizes, dtype=torch.float16).view(torch.int16),
        ]

    expected = results()
    assert torch.equal(expected[-2], halves.float().view(torch.int32))
    assert torch.equal(expected[-1], halves.view(torch.int16))
    try:
        torch.set_flush_denormal(True)
        flushed = results()
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(a, b) for a, b in zip(expected, flushed, strict=True))


@CPP
def test_strides() -> None:
    """Rows taken from a wider tensor, every second row, and a transposed x."""
    case = make(20, 128, 4, 32, True)
    wide = torch.randn(6, 300)
    for x in (wide[:, 5:133], wide[::2, :128], torch.randn(128, 4).t(), torch.randn(1, 128).expand(3, 128)):
        expected = packed_linear(x.contiguous(), *case.tensors, **case.sizes, impl="cpp")
        assert torch.equal(packed_linear(x, *case.tensors, **case.sizes, impl="cpp"), expected)


@CPP
def test_empty() -> None:
    case = make(20, 128, 4, 32, True)
    assert packed_linear(torch.zeros(0, 128), *case.tensors, **case.sizes).shape == (0, 20)
    nothing = make(0, 64, 3, 32, True)
    assert packed_linear(torch.zeros(2, 64), *nothing.tensors, **nothing.sizes).shape == (2, 0)


@CPP
def test_many_threads_at_once() -> None:
    """Eight Python threads share a weight and torch's thread pool; each gets its own answer every time."""
    case = make(300, 512, 3, 128, False)
    xs = [torch.randn(1 + i, 512) for i in range(8)]
    expected = [packed_linear(x, *case.tensors, **case.sizes) for x in xs]

    def agrees(x: Tensor, y: Tensor) -> bool:
        return all(torch.equal(packed_linear(x, *case.tensors, **case.sizes), y) for _ in range(25))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(agrees, xs, expected))
