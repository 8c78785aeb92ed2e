# SPDX-License-Identifier: Apache-2.0
"""hadamard: the seven properties, the matrices themselves, and round trips for the sizes that models have."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from discquant.ops import hadamard
from discquant.ops.hadamard_tables import factor, hadamard_matrix

OP = torch.ops.discquant.hadamard.default
SIZES = (1, 2, 64, 12, 20 * 4, 28 * 8, 36, 172)
# Hidden and intermediate sizes of Llama, Qwen, Mistral, Gemma, Phi: (K, 2^m).
MODEL_SIZES = {
    2048: (1, 2048), 3072: (12, 256), 4096: (1, 4096), 5120: (20, 256), 8192: (1, 8192), 11008: (172, 64),
    13824: (108, 128), 14336: (28, 512), 18944: (148, 128), 28672: (28, 1024), 27648: (108, 256), 29568: (924, 32),
    9216: (36, 256), 8960: (140, 64), 6912: (108, 64),
}  # fmt: skip


def _signs(size: int, device: torch.device) -> torch.Tensor:
    return (torch.randint(0, 2, (size,)) * 2 - 1).to(torch.int8).to(device)


@pytest.mark.parametrize("order", [12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 92, 100, 108, 140, 148, 172])
def test_matrices(order):
    """Entries +1 and -1, rows orthogonal: exact in integers."""
    matrix = hadamard_matrix(order)
    assert matrix is not None
    assert matrix.dtype == torch.int8
    wide = matrix.to(torch.int64)
    assert torch.equal(wide.abs(), torch.ones_like(wide))
    assert torch.equal(wide @ wide.t(), order * torch.eye(order, dtype=torch.int64))


def test_factors():
    for size, expected in MODEL_SIZES.items():
        assert factor(size) == expected
    for size in (0, 3, 7, 14, 13):
        assert factor(size) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_matches_oracle(size, inverse, dtype, assert_close, device):
    """Against the dense matrix product in float64."""
    x = torch.randn(3, size, dtype=torch.float64).to(device, dtype)
    signs = _signs(size, device)
    order, run = factor(size)
    dense = torch.ones(1, 1, dtype=torch.float64)
    while dense.shape[0] < run:
        dense = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), dense)
    dense = (torch.kron(hadamard_matrix(order).double(), dense) / size**0.5).to(device)
    oracle = (x.double() @ dense) * signs if inverse else (x.double() * signs) @ dense.t()
    actual = hadamard(x, signs, inverse=inverse, impl="triton")
    baseline = hadamard(x, signs, inverse=inverse, impl="reference")
    if dtype == torch.float64:
        assert (actual - oracle).abs().max() <= size * torch.finfo(dtype).eps * (1 + oracle.abs().max())
    else:
        assert_close(actual, oracle, baseline)


@pytest.mark.parametrize(
    ("size", "dtype"), [(32768, torch.float64), (65536, torch.float32), (12 * 16384, torch.float64)]
)
@pytest.mark.parametrize("inverse", [False, True])
def test_long_runs(size, dtype, inverse, device):
    """What shared memory does not hold goes to the matrix across runs: the same rotation."""
    x, signs = torch.randn(2, size, dtype=dtype, device=device), _signs(size, device)
    actual = hadamard(x, signs, inverse=inverse, impl="triton")
    expected = hadamard(x.double(), signs, inverse=inverse, impl="reference")
    assert (actual - expected).abs().max() <= 100 * torch.finfo(dtype).eps


def test_matrix_is_kept(monkeypatch, device):
    """Copied to the device once: a copy at every launch would stop the stream and cannot be captured in a graph."""
    x = torch.randn(1, 12 * 16384, dtype=torch.float64, device=device)
    first = hadamard(x, impl="triton")

    def none(*_):
        raise AssertionError("the matrix was made again")

    monkeypatch.setattr(importlib.import_module("discquant.ops.hadamard"), "hadamard_matrix", none)
    monkeypatch.setattr(torch, "kron", none)
    assert torch.equal(hadamard(x, impl="triton"), first)


def test_default_device(device):
    """Tables are made on the CPU, whatever device is the default."""
    x = torch.randn(2, 12, device=device)
    with torch.device("meta"):
        out = hadamard(x)
    assert torch.equal(out, hadamard(x)) and hadamard_matrix(12).device.type == "cpu"


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("mode", ["fake", "functionalize", "inference", "export"])
def test_modes_leave_nothing(mode, impl, device):
    """A first call under a mode leaves no tensor of that mode to later calls."""
    x = torch.randn(2, 24, device=device, requires_grad=True)
    expected = hadamard(x, impl=impl)

    class Rotation(torch.nn.Module):
        def forward(self, x):
            return hadamard(x, impl=impl)

    for name in ("hadamard", "hadamard_tables"):
        for kept in vars(importlib.import_module(f"discquant.ops.{name}")).values():
            getattr(kept, "cache_clear", lambda: None)()
    if mode == "fake":
        with FakeTensorMode():
            assert type(hadamard(torch.empty(2, 24, device=device), impl=impl)) is FakeTensor
    elif mode == "functionalize":
        turned = torch.func.functionalize(lambda x: OP(x, None, False) * hadamard_matrix(12)[0, 0])
        assert type(turned(x.detach())) is torch.Tensor
    elif mode == "inference":
        with torch.inference_mode():
            hadamard(x.detach(), impl=impl)
    else:
        torch.export.export(Rotation(), (x.detach(),))
    found = hadamard(x, impl=impl)
    assert type(found) is torch.Tensor and torch.equal(found, expected)
    found.sum().backward()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("size", [4, 12])
def test_gradcheck(size, inverse, device):
    x = torch.randn(2, size, dtype=torch.float64, device=device, requires_grad=True)
    signs = _signs(size, device)
    assert torch.autograd.gradcheck(lambda t: hadamard(t, signs, inverse=inverse, impl="triton"), (x,))


def test_grad_subsets(device):
    """x is the one differentiable input."""
    x = torch.randn(2, 8, device=device)
    assert not hadamard(x, impl="triton").requires_grad
    leaf = x.clone().requires_grad_()
    hadamard(leaf, impl="triton").sum().backward()
    assert torch.equal(leaf.grad, hadamard(torch.ones_like(x), inverse=True, impl="triton"))


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(dtype, permuted, device):
    x = torch.randn(6, 24, dtype=torch.float64).to(device, dtype)
    if permuted:
        x = x.t().contiguous().t()
    torch.library.opcheck(OP, (x, _signs(24, device), False))
    torch.library.opcheck(OP, (x, None, True))


def test_compile(device):
    signs = _signs(24, device)

    def rotate(x):
        return hadamard(x, signs, impl="triton") * 2

    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 24, device=device)
        torch._dynamo.mark_static(x, 1)
        assert torch.equal(compiled(x), rotate(x))


def test_rejects_bad_input(device):
    x = torch.randn(2, 8, device=device)
    for error, message, args in (
        (TypeError, "hadamard: x must be of type = Tensor, got int", (1,)),
        (ValueError, "hadamard: x must have a dtype of", (x.int(),)),
        (
            ValueError,
            r"hadamard: x must have a last dimension with a known matrix = .* got \[2, 7\]",
            (x[:, :7],),
        ),
        (ValueError, r"hadamard: signs must have shape = \[8\], got \[7\]", (x, x[0, :7])),
        (ValueError, "hadamard: signs must have a dtype of", (x, x[0].int())),
        (TypeError, "hadamard: x must be of type = Tensor, got NoneType", (None,)),
        (TypeError, "hadamard: signs must be of type = Tensor, got list", (x, [1.0] * 8)),
        (ValueError, "hadamard: x must have at least dimensions = 1, got 0", (x[0, 0],)),
        (ValueError, "hadamard: signs must be on the device = .*, got meta", (x, x[0].to("meta"))),
    ):
        with pytest.raises(error, match=message):
            hadamard(*args, impl="triton")
    with pytest.raises(NotImplementedError, match="hadamard: impl must cover these arguments = cpp"):
        hadamard(x, impl="cpp")
    with pytest.raises(ValueError, match="hadamard: impl must be one of"):
        hadamard(x, impl="fast")
    with pytest.raises(NotImplementedError, match="got 4096 runs"):
        hadamard(torch.zeros(1, 4096 * 16384, device="meta"), impl="triton")


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("size", [64, 28 * 16, 172, 92])
def test_round_trip(size, impl, device):
    """The inverse undoes the rotation, norms are kept, a transposed input is read as what it is."""
    x = torch.randn(4, size, dtype=torch.float64, device=device)
    signs = _signs(size, device)
    turned = hadamard(x.t().contiguous().t(), signs, impl=impl)
    assert (turned - hadamard(x, signs, impl=impl)).abs().max() < 1e-12
    assert (turned.norm(dim=-1) - x.norm(dim=-1)).abs().max() < 1e-12
    assert (hadamard(turned, signs, inverse=True, impl=impl) - x).abs().max() < 1e-12


def test_deterministic(device):
    """Two runs, bit for bit, through both kernels."""
    x, signs = torch.randn(5, 28 * 16, device=device), _signs(28 * 16, device)
    for inverse in (False, True):
        first, second = (hadamard(x, signs, inverse=inverse, impl="triton") for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 16), (16,), (2, 3, 16)])
def test_shapes(shape, device):
    x = torch.randn(*shape, device=device)
    out = hadamard(x, impl="triton")
    assert out.shape == x.shape
    eps = torch.finfo(torch.float32).eps
    assert not x.numel() or (out - hadamard(x, impl="reference")).abs().max() <= 16 * eps * x.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("size", MODEL_SIZES)
def test_model_sizes_on_gpu(size, assert_close):
    x = torch.randn(256, size, device="cuda", dtype=torch.bfloat16)
    signs = _signs(size, x.device)
    oracle = hadamard(x.double(), signs, impl="reference")
    assert_close(hadamard(x, signs, impl="triton"), oracle, hadamard(x, signs, impl="reference"))
