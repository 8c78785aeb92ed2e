# SPDX-License-Identifier: Apache-2.0
"""linear_kl: the seven properties; KL(p||p) = 0, shift invariance, masks, chunks, extreme logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from discquant.ops import linear_kl

OP = torch.ops.discquant.linear_kl.default
CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "aligned": ((8, 16, 256), {}),
    "odd": ((7, 12, 301), {"bias": True, "mask": True}),
    "prime-softcap": ((5, 7, 61), {"softcap": 3.0, "logit_scale": 2.0, "bias": True}),
    "one": ((1, 1, 1), {}),
    "empty": ((0, 8, 16), {}),
    "normalizer": ((6, 8, 33), {"normalizer": 11.0, "mask": True}),
}
DOUBLE = torch.float64


@pytest.fixture
def make_problem(device):
    def make(name: str, dtype: torch.dtype = DOUBLE) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        (tokens, hidden, vocab), case = CASES[name]
        case = dict(case)
        student, teacher = torch.randn(2, tokens, hidden, dtype=DOUBLE)
        weight = torch.randn(vocab, hidden, dtype=DOUBLE) * 0.5
        if case.pop("bias", False):
            case["bias"] = torch.randn(vocab, dtype=DOUBLE).to(device, dtype)
        if case.pop("mask", False):
            case["mask"] = (torch.arange(tokens) % 3 != 1).to(device)
        return tuple(t.to(device, dtype) for t in (student, teacher, weight)), case

    return make


def _wide(args: tuple[Tensor, ...], case: dict[str, Any]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    bias = {"bias": case["bias"].double()} if "bias" in case else {}
    return tuple(t.double() for t in args), {**case, **bias}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name, dtype, make_problem, assert_close):
    """Loss, KL per token and gradient against the reference in float64 (which has its own test below)."""
    args, case = make_problem(name, dtype)
    actual = linear_kl(*args, **case, chunk_size=3, impl="triton")
    baseline = linear_kl(*args, **case, chunk_size=3, impl="reference")
    wide_args, wide_case = _wide(args, case)
    oracle = linear_kl(*wide_args, **wide_case, impl="reference")
    for what in ("loss", "per_token"):
        assert_close(getattr(actual, what), getattr(oracle, what), getattr(baseline, what), what)
    # The differences of probabilities are rounded to the operands' dtype, also where the gradient is wider (float16).
    grads = (actual.grad_student.to(dtype), oracle.grad_student, baseline.grad_student.to(dtype))
    assert_close(*grads, "grad_student")


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "empty"])
def test_gradient_is_autograd(name, impl, make_problem):
    """The returned gradient is that of a plain, unchunked softmax KL, to rounding of float64."""
    (student, teacher, weight), case = make_problem(name)
    result = linear_kl(student, teacher, weight, **case, chunk_size=2, impl=impl)

    def logits(hidden: Tensor) -> Tensor:
        z = (hidden @ weight.t() + case.get("bias", 0)) * case.get("logit_scale", 1.0)
        cap = case.get("softcap")
        return z if cap is None else cap * torch.tanh(z / cap)

    leaf = student.clone().requires_grad_()
    log_q, log_p = logits(leaf).log_softmax(-1), logits(teacher).log_softmax(-1)
    per_token = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    mask = case.get("mask", torch.ones_like(per_token, dtype=torch.bool))
    loss = (per_token * mask).sum() / case.get("normalizer", mask.sum())
    loss.backward()
    assert abs(result.loss - loss) < 1e-13
    assert (result.grad_student - leaf.grad).abs().max() < 1e-14
    assert (result.per_token - per_token * mask).abs().max() < 1e-13


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("logit_scale", [1.0, 0.0625, 3.0])
def test_float16_keeps_small_gradients(impl, logit_scale, device):
    """A step of many tokens at a small KL: in float16 the gradient would be zero before any factor could rescue it."""
    student = torch.randn(32, 64, dtype=DOUBLE, device=device)
    teacher = student + 1e-2 * torch.randn_like(student)
    weight = torch.randn(300, 64, dtype=DOUBLE, device=device) / 8
    half = [t.half() for t in (student, teacher, weight)]
    leaf = half[0].clone().requires_grad_()
    options = {"normalizer": 131072.0, "logit_scale": logit_scale}
    result = linear_kl(leaf, *half[1:], **options, impl=impl)
    expected = linear_kl(*(t.double() for t in half), **options, impl="reference").grad_student
    assert result.grad_student.dtype == torch.float32
    assert (result.grad_student - expected).norm() < 2e-3 * expected.norm()
    (scaled,) = torch.autograd.grad(2.0**24 * result.loss, leaf)
    assert scaled.dtype == torch.float16
    assert (scaled - 2.0**24 * expected).norm() < 3e-3 * (2.0**24 * expected).norm()


@pytest.mark.parametrize("case", [{}, {"softcap": 3.0, "logit_scale": 2.0, "normalizer": 5.0}])
def test_gradcheck(case, device):
    """Small: every perturbed forward interprets one program per token."""
    student, teacher = torch.randn(2, 2, 3, dtype=DOUBLE, device=device)
    weight = torch.randn(7, 3, dtype=DOUBLE, device=device)
    student = student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda hidden: linear_kl(hidden, teacher, weight, **case, impl="triton").loss, (student,)
    )


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_grad_subsets(impl, make_problem):
    """Only the student's hidden state is differentiable; the parts that are frozen are refused by name."""
    (student, teacher, weight), _ = make_problem("aligned")
    assert not linear_kl(student, teacher, weight, impl=impl).loss.requires_grad
    leaf = student.clone().requires_grad_()
    result = linear_kl(leaf, teacher, weight, impl=impl)
    assert result.loss.requires_grad
    assert not result.per_token.requires_grad
    (grad,) = torch.autograd.grad(3 * result.loss, leaf)
    assert torch.equal(grad, 3 * result.grad_student)
    for place, name in ((1, "teacher"), (2, "weight")):
        args = [student, teacher, weight]
        args[place] = args[place].clone().requires_grad_()
        with pytest.raises(NotImplementedError, match=f"linear_kl: {name} must be frozen"):
            linear_kl(*args, impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(dtype, permuted, make_problem):
    (student, teacher, weight), case = make_problem("odd", dtype)
    if permuted:
        student, teacher, weight = (t.t().contiguous().t() for t in (student, teacher, weight))
    torch.library.opcheck(OP, (student, teacher, weight, case["bias"], case["mask"], None, 1.0, None, 4))
    torch.library.opcheck(OP, (student, teacher, weight, None, None, 5.0, 0.5, 3.0, 100))


def test_compile(make_problem, assert_equal):
    def loss(student, teacher, weight):
        return linear_kl(student, teacher, weight, impl="triton", chunk_size=4).loss * 2

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for name in ("aligned", "odd"):
        (student, teacher, weight), _ = make_problem(name)
        leaf = student.clone().requires_grad_()
        out = compiled(leaf, teacher, weight)
        assert_equal(out.detach(), loss(student, teacher, weight))
        out.backward()
        assert_equal(
            leaf.grad, 2 * linear_kl(student, teacher, weight, impl="triton", chunk_size=4).grad_student
        )


def test_rejects_bad_input(make_problem):
    (student, teacher, weight), _ = make_problem("aligned")
    good = (student, teacher, weight)
    bad: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (TypeError, "linear_kl: weight must be of type = Tensor, got int", (student, teacher, 3), {}),
        (
            ValueError,
            r"linear_kl: student must have shape = \[num_tokens, hidden_size\], got \[8\]",
            (student[:, 0], teacher, weight),
            {},
        ),
        (
            ValueError,
            r"linear_kl: teacher must have the shape of student = \[8, 16\], got \[7, 16\]",
            (student, teacher[1:], weight),
            {},
        ),
        (
            ValueError,
            "linear_kl: teacher must have the dtype of student",
            (student, teacher.float(), weight),
            {},
        ),
        (
            ValueError,
            r"linear_kl: weight must have shape \[vocab_size, hidden_size\]",
            (student, teacher, weight[:, 1:]),
            {},
        ),
        (
            ValueError,
            r"linear_kl: mask must have shape = \[8\], got \[7\]",
            good,
            {"mask": torch.ones(7, dtype=torch.bool)},
        ),
        (
            ValueError,
            "linear_kl: mask must have a dtype of",
            good,
            {"mask": torch.ones(8, device=student.device)},
        ),
        (ValueError, r"linear_kl: bias must have shape = \[256\], got \[1\]", good, {"bias": torch.ones(1)}),
        (
            ValueError,
            "linear_kl: softcap must in torch.float64 be None or finite, as .* and above = 0, got 0.0",
            good,
            {"softcap": 0.0},
        ),
        (
            ValueError,
            "linear_kl: chunk_size must be an integer of at least = 1, got 0",
            good,
            {"chunk_size": 0},
        ),
        (
            ValueError,
            "linear_kl: chunk_size must be an integer of at least = 1, got 2.5",
            good,
            {"chunk_size": 2.5},
        ),
        (TypeError, "linear_kl: teacher must be of type = Tensor, got NoneType", (student, None, weight), {}),
        (ValueError, "linear_kl: student must have a dtype of", (student.int(), teacher, weight), {}),
        (ValueError, "linear_kl: weight must have a dtype of", (student, teacher, weight.int()), {}),
        (
            ValueError,
            "linear_kl: weight must have vocab_size at least = 1, got 0",
            (student, teacher, weight[:0]),
            {},
        ),
        (ValueError, "linear_kl: bias must have a dtype of", good, {"bias": torch.ones(256).int()}),
        (
            ValueError,
            "linear_kl: teacher must be on the device = .*, got meta",
            (student, teacher.to("meta"), weight),
            {},
        ),
        (ValueError, "linear_kl: impl must be one of", good, {"impl": "cuda"}),
        (
            ValueError,
            "linear_kl: normalizer must in torch.float64 be finite, as its inverse, and at least = 0, got -1",
            good,
            {"normalizer": -1},
        ),
        (TypeError, "linear_kl: normalizer must be of type = float, got str", good, {"normalizer": "1"}),
        (TypeError, "linear_kl: softcap must be of type = float, got list", good, {"softcap": [1.0]}),
        (
            TypeError,
            "linear_kl: logit_scale must be of type = float, got NoneType",
            good,
            {"logit_scale": None},
        ),
        (ValueError, "linear_kl: logit_scale must in torch.float64 be = finite, got inf", good,
         {"logit_scale": float("inf")}),
        (
            NotImplementedError,
            "linear_kl: weight must be frozen = requires_grad False, got True",
            (student, teacher, weight.detach().clone().requires_grad_()),
            {},
        ),
        (NotImplementedError, "linear_kl: impl must cover these arguments = cpp", good, {"impl": "cpp"}),
        *(
            (ValueError, f"linear_kl: {name} must in torch.float32 be .* got", [t.float() for t in good], {name: value})
            for name, values in {
                "normalizer": (1e-40, 1e39), "softcap": (1e-46, 1e-39, 1e300), "logit_scale": (1e300, -1e39),
            }.items()
            for value in values
        ),
    ]  # fmt: skip
    for error, message, args, kwargs in bad:
        with pytest.raises(error, match=message):
            linear_kl(*args, **{"impl": "triton", **kwargs})


@pytest.mark.parametrize("impl", ["reference", "triton"])
class TestProperties:
    @pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
    @pytest.mark.parametrize("name", [name for name in CASES if name != "empty"])
    def test_zero_for_equal_states(self, impl, make_problem, name, dtype):
        """Exactly, so both models' logits must come from one way of rounding."""
        (student, _, weight), case = make_problem(name, dtype)
        result = linear_kl(student, student.clone(), weight, **case, impl=impl)
        assert result.loss == 0 and not result.per_token.any()
        assert torch.equal(result.grad_student, torch.zeros_like(student))

    def test_shift_invariance(self, impl, make_problem):
        """A constant added to all logits changes nothing beyond its own rounding."""
        (student, teacher, weight), _ = make_problem("aligned")
        plain = linear_kl(student, teacher, weight, impl=impl)
        shift = torch.full_like(weight[:, 0], 100.0)
        shifted = linear_kl(student, teacher, weight, bias=shift, impl=impl)
        eps = torch.finfo(torch.float64).eps
        assert (plain.per_token - shifted.per_token).abs().max() < 256 * 100 * eps

    def test_nonnegative(self, impl, make_problem):
        (student, teacher, weight), _ = make_problem("odd", torch.float32)
        assert linear_kl(student, teacher, weight, impl=impl).per_token.min() >= 0

    def test_masked_tokens_may_hold_anything(self, impl, make_problem):
        """Infinite and NaN hidden states behind the mask leave no trace; all masked gives exactly zero."""
        (student, teacher, weight), case = make_problem("odd", torch.float32)
        expected = linear_kl(student, teacher, weight, **case, impl=impl)
        student, teacher = student.clone(), teacher.clone()
        student[~case["mask"]], teacher[~case["mask"]] = float("inf"), float("nan")
        actual = linear_kl(student, teacher, weight, **case, impl=impl)
        for left, right in zip(actual, expected, strict=True):
            assert torch.equal(left, right)
        nothing = linear_kl(student, teacher, weight, mask=torch.zeros_like(case["mask"]), impl=impl)
        assert nothing.loss == 0
        assert not nothing.grad_student.any()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_teacher_that_is_not_finite_shows(self, impl, device, value):
        """An overflown teacher is no perfect student: NaN for its token, the others as they were."""
        student, teacher = torch.randn(3, 4, device=device), torch.randn(3, 4, device=device)
        weight = torch.randn(7, 4, device=device)
        expected = linear_kl(student, teacher, weight, impl=impl).per_token
        teacher[1] = value
        actual = linear_kl(student, teacher, weight, impl=impl)
        assert actual.loss.isnan() and actual.per_token[1].isnan()
        assert torch.equal(actual.per_token[[0, 2]], expected[[0, 2]])
        counted = torch.tensor([True, False, True], device=device)
        assert linear_kl(student, teacher, weight, mask=counted, impl=impl).loss.isfinite()

    def test_extreme_logits(self, impl, device):
        """Logits of +-1e4: probabilities 0 and 1, KL the difference of logits, nothing NaN."""
        weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], device=device)
        student = torch.tensor([[1e4, 0.0]], device=device)
        teacher = torch.tensor([[0.0, 1e4]], device=device)
        result = linear_kl(student, teacher, weight, impl=impl)
        assert result.per_token.item() == 1e4
        assert torch.equal(result.grad_student, torch.tensor([[1.0, -1.0]], device=device))

    def test_minus_infinity_in_the_bias(self, impl, device):
        """Vocabulary entries that both models exclude count for nothing."""
        student, teacher, weight = (
            torch.randn(2, 4, device=device),
            torch.randn(2, 4, device=device),
            torch.randn(9, 4, device=device),
        )
        bias = torch.zeros(9, device=device)
        bias[7:] = float("-inf")
        actual = linear_kl(student, teacher, weight, bias=bias, impl=impl)
        expected = linear_kl(student, teacher, weight[:7], impl=impl)
        assert torch.isfinite(actual.per_token).all()
        assert (actual.per_token - expected.per_token).abs().max() < 1e-6
        assert (actual.grad_student - expected.grad_student).abs().max() < 1e-6

    def test_deterministic(self, impl, make_problem):
        (student, teacher, weight), case = make_problem("odd", torch.float32)
        first, second = (linear_kl(student, teacher, weight, **case, impl=impl) for _ in range(2))
        for left, right in zip(first, second, strict=True):
            assert torch.equal(left, right)


def test_chunk_rows():
    """The scratch stays below the bound for the vocabularies of the issue, and is never cut without need."""
    from discquant.triton_kernels.linear_kl import SCRATCH_BYTES, chunk_rows

    for vocab in (128256, 151936, 32064, 262144):
        rows = chunk_rows(1024, vocab, 10)
        assert rows * vocab * 10 <= SCRATCH_BYTES
        assert rows == 1024 or (rows % 128 == 0 and (rows + 128) * vocab * 10 > SCRATCH_BYTES)
    assert chunk_rows(64, 128256, 10) == 64


def _on_tensor_cores(student: Tensor, teacher: Tensor, weight: Tensor, rows: int = 256) -> dict[str, Tensor]:
    """The plain way on a GPU: cuBLAS products of bfloat16 with float32 sums, float32 softmax, in chunks.

    Tensor cores cut their sums instead of rounding them, which shrinks every logit by about 1e-5: no float32 product
    is a fair measure of that.
    """
    parts, grads = [], []
    for s, t in zip(student.split(rows), teacher.split(rows), strict=True):
        log_q, log_p = (torch.mm(h, weight.t(), out_dtype=torch.float32).log_softmax(-1) for h in (s, t))
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
        grads.append(((log_q.exp() - log_p.exp()) / len(student)).bfloat16() @ weight)
    per_token = torch.cat(parts)
    return {"loss": per_token.mean(), "per_token": per_token, "grad_student": torch.cat(grads)}


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [128256, 151936, 32064, 50257])
def test_llama_shapes_on_gpu(vocab, assert_close):
    """bfloat16 at real sizes: within the rule of the plain way on the same units, and within the promised memory."""
    student, teacher = torch.randn(2, 2048, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, 4096, device="cuda", dtype=torch.bfloat16) * 0.02
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    actual = linear_kl(student, teacher, weight, impl="triton")
    assert torch.cuda.max_memory_allocated() - before < 1.2e9 + student.numel() * 2
    baseline = _on_tensor_cores(student, teacher, weight)
    oracle = linear_kl(student.double(), teacher.double(), weight.double(), chunk_size=128, impl="reference")
    for what in ("loss", "per_token", "grad_student"):
        assert_close(getattr(actual, what), getattr(oracle, what), baseline[what], what)
