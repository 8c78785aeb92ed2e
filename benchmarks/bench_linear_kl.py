# SPDX-License-Identifier: Apache-2.0
"""linear_kl: loss and gradient behind a frozen head; time against its bare matmuls, peak memory."""

from __future__ import annotations

import functools

import pytest
import torch
from harness import DEVICE, GPU, measure, package, require_close
from torch import Tensor

from discquant.ops import linear_kl
from discquant.ops.reference import linear_kl as reference

# tokens, hidden, vocabulary
SHAPES = (
    [(4096, 4096, 128256), (16384, 4096, 128256), (8192, 8192, 128256), (8192, 3584, 151936)]
    if GPU
    else [(64, 64, 1000)]
)
PROVIDERS = [
    "triton", "triton-8192", "full-softmax", "liger-jsd", "liger-kl", "cut-cross-entropy", "reference", "compiled",
    "full-softmax-compiled",
]  # fmt: skip
DTYPE = torch.bfloat16 if GPU else torch.float32


def _full(student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's way: both logits whole, log-softmax in float32, autograd."""
    leaf = student.detach().requires_grad_()
    log_q = (leaf @ weight.t()).float().log_softmax(-1)
    log_p = (teacher @ weight.t()).float().log_softmax(-1)
    loss = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def _plain(student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, KL per token and gradient with the products of the units at hand (tensor cores cut their sums)."""
    wide = {"out_dtype": torch.float32} if GPU else {}
    log_q, log_p = (torch.mm(hidden, weight.t(), **wide).log_softmax(-1) for hidden in (student, teacher))
    per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
    grad = ((log_q.exp() - log_p.exp()) / len(student)).to(student.dtype) @ weight
    return per_token.mean(), per_token, grad


def _large_tile(student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Our kernel with tiles of 8192 logits: one row per multiprocessor."""
    from discquant.triton_kernels.linear_kl import linear_kl_fwd

    return linear_kl_fwd(student, teacher, weight, None, None, None, 1.0, None, 1024, block=8192)


def _bare(student: Tensor, teacher: Tensor, weight: Tensor, chunk: int = 768) -> None:
    for start in range(0, student.shape[0], chunk):
        logits = student[start : start + chunk] @ weight.t()
        _ = teacher[start : start + chunk] @ weight.t()
        _ = logits @ weight


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_linear_kl(benchmark, provider, shape):
    tokens, hidden, vocab = shape
    student, noise = torch.randn(2, tokens, hidden, device=DEVICE, dtype=DTYPE)
    teacher = student + 0.1 * noise
    weight = torch.randn(vocab, hidden, device=DEVICE, dtype=DTYPE) * hidden**-0.5
    if provider.startswith(("full", "liger-kl")) and tokens * vocab > 2**31:
        pytest.skip("tokens x vocabulary in float32 several times over does not fit")
    gate = None
    if provider in ("reference", "triton", "triton-8192"):
        ours = _large_tile if provider == "triton-8192" else functools.partial(linear_kl, impl=provider)
        body = lambda: ours(student, teacher, weight)  # noqa: E731

        def gate():
            part = slice(0, 256)
            args = (student[part], teacher[part], weight)
            oracle = linear_kl(*(t.double() for t in args), chunk_size=64, impl="reference")
            for found, exact, plain in zip(ours(*args), oracle, _plain(*args), strict=True):
                require_close(found, exact, plain)

    elif provider.startswith("full"):
        function = torch.compile(_full) if provider.endswith("compiled") else _full
        body = lambda: function(student, teacher, weight)  # noqa: E731
    elif provider == "compiled":
        compiled = torch.compile(reference.linear_kl)
        body = lambda: compiled(student, teacher, weight)  # noqa: E731
    elif provider == "liger-kl":
        liger = package("liger_kernel.transformers")
        if liger is None or not GPU:
            pytest.skip("liger-kernel is not installed here" if GPU else "liger-kernel needs a GPU")
        # Its fused divergence takes log-probabilities: the head's matmuls and the softmaxes are torch's.
        divergence = liger.LigerKLDIVLoss(reduction="batchmean", log_target=True)

        def body():
            leaf = student.detach().requires_grad_()
            log_q = (leaf @ weight.t()).float().log_softmax(-1)
            with torch.no_grad():
                log_p = (teacher @ weight.t()).float().log_softmax(-1)
            divergence(log_q, log_p).backward()

    elif provider == "liger-jsd":
        liger = package("liger_kernel.transformers.fused_linear_jsd")
        if liger is None or not GPU:
            pytest.skip("liger-kernel is not installed here" if GPU else "liger-kernel needs a GPU")
        # Another divergence (JSD with beta 0 is the forward KL) whose kernel also computes the head's gradient.
        jsd = liger.LigerFusedLinearJSD(jsd_beta=0.0)
        leaf, head = student.detach().requires_grad_(), weight.detach().requires_grad_()
        body = lambda: jsd(leaf, head, teacher, weight).backward()  # noqa: E731
    else:
        cce = package("cut_cross_entropy")
        if cce is None or not GPU:
            pytest.skip("cut-cross-entropy is not installed here" if GPU else "cut-cross-entropy needs a GPU")
        # One-hot targets only: a lower bound for anything that makes logits on the fly.
        leaf, target = student.detach().requires_grad_(), torch.randint(0, vocab, (tokens,), device=DEVICE)
        body = lambda: cce.linear_cross_entropy(leaf, weight, target).backward()  # noqa: E731
    measure(
        benchmark, body, op="linear_kl", provider=provider, mode="loss+grad", shape=f"{tokens}x{hidden}x{vocab}",
        dtype=str(DTYPE)[6:], gate=gate, flops=6.0 * tokens * hidden * vocab,
        bare=lambda: _bare(student, teacher, weight),
    )  # fmt: skip
