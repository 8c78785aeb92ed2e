# SPDX-License-Identifier: Apache-2.0
"""`weight` of packed modules, for models that read it: right, made anew, and nowhere kept."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from discquant import _extension
from discquant.formats.codes import QuantizedLinear
from discquant.modules import FusedProjection, PackedLinear, load_packed

pytestmark = pytest.mark.skipif(not _extension.available(), reason="discquant._C is not built")
Coded = Callable[..., QuantizedLinear]


class Block(nn.Module):
    """Three projections of one input, of which the second's rows begin in the middle of a run of 16."""

    def __init__(self, coded: Coded, dtype: torch.dtype = torch.float32, **options: bool) -> None:
        super().__init__()
        for name, rows in (("q_proj", 40), ("k_proj", 20), ("v_proj", 30)):
            setattr(self, name, nn.Linear(96, rows, dtype=dtype))
        layers = [coded(name, module.weight) for name, module in self.named_children()]
        self.expected = {layer.name: layer.dequantize(dtype) for layer in layers}
        load_packed(self, layers, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Products with the weights that a model reads itself."""
        return torch.cat([x @ module.weight.t() for module in self.children()], -1)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_is_the_served_one_and_not_kept(coded: Coded, dtype: torch.dtype, fuse: bool) -> None:
    block = Block(coded, dtype, fuse=fuse)
    kind = FusedProjection if fuse else PackedLinear
    memory = sum(buffer.numel() * buffer.element_size() for buffer in block.buffers())
    for name, expected in block.expected.items():
        module = getattr(block, name)
        assert type(module) is kind and hasattr(module, "weight")
        assert module.weight.dtype == dtype and torch.equal(module.weight, expected)
        assert not module.weight.requires_grad and module.weight.is_contiguous()
        assert type(module.weight @ torch.ones(96, dtype=dtype)) is Tensor
    assert not list(block.parameters())
    assert not any("weight" in name for name, _ in (*block.named_buffers(), *block.state_dict().items()))
    assert memory == sum(buffer.numel() * buffer.element_size() for buffer in block.buffers())


@pytest.mark.parametrize("fuse", [True, False])
def test_weight_cannot_be_set(coded: Coded, fuse: bool) -> None:
    module = Block(coded, fuse=fuse).q_proj
    with pytest.raises(AttributeError, match="weight"):
        module.weight = torch.zeros(40, 96)
    with pytest.raises(KeyError, match="attribute 'weight' already exists"):
        module.weight = nn.Parameter(torch.zeros(40, 96))
    with pytest.raises(KeyError, match="attribute 'weight' already exists"):
        module.register_buffer("weight", torch.zeros(40, 96))
    assert not list(module.parameters()) and "weight" not in module.state_dict()


@pytest.mark.parametrize("fuse", [True, False])
def test_weight_follows_casts_moves_and_copies(coded: Coded, fuse: bool) -> None:
    block = Block(coded, fuse=fuse)
    twins = [copy.deepcopy(block), pickle.loads(pickle.dumps(block))]
    taken = Block(coded, fuse=fuse)
    taken.load_state_dict(block.state_dict())
    for twin in (*twins, taken):
        assert all(torch.equal(getattr(twin, name).weight, w) for name, w in block.expected.items())
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        block.to(dtype)
        for name, layer in block.expected.items():
            served = getattr(twins[0], name).weight
            assert getattr(block, name).weight.dtype == dtype
            assert torch.equal(getattr(block, name).weight, served.to(dtype)) and torch.equal(served, layer)
    block.float().share_memory()
    assert block.k_proj.weight.dtype == torch.float32
    hollow = block.to("meta")
    assert hollow.k_proj.weight.is_meta and hollow.k_proj.weight.shape == (20, 96)
    filled = hollow.half().to_empty(device="cpu")
    filled.load_state_dict(twins[0].state_dict())
    assert torch.equal(filled.k_proj.weight, twins[0].k_proj.weight.half())


@pytest.mark.parametrize("fuse", [True, False])
def test_weight_in_a_compiled_graph(coded: Coded, fuse: bool) -> None:
    block = Block(coded, fuse=fuse)
    x = torch.randn(3, 96)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), block(x))
    block.bfloat16()
    assert torch.equal(compiled(x.bfloat16()), block(x.bfloat16()))


def test_without_another_word_the_bias_says_the_dtype() -> None:
    q, scale = torch.randint(0, 16, (8, 64), dtype=torch.uint8), torch.rand(8, 2).half()
    sizes = {"num_bits": 4, "group_size": 32}
    assert PackedLinear.from_codes(q, scale, **sizes).weight.dtype == torch.float16
    bias = torch.zeros(8, dtype=torch.bfloat16)
    assert PackedLinear.from_codes(q, scale, None, bias, **sizes).weight.dtype == torch.bfloat16
    other = PackedLinear.from_codes(q, scale, None, bias, **sizes, compute_dtype=torch.float32)
    assert other.weight.dtype == torch.float32


def test_what_would_be_lost_is_refused(coded: Coded) -> None:
    """By any way of writing, also under torch.no_grad(); what only looks like one passes."""
    module = Block(coded).k_proj
    x = torch.ones(20, 96)

    def divided(weight: Tensor) -> None:
        weight /= 2

    def element(weight: Tensor) -> None:
        weight[0] = 1

    def replaced(weight: Tensor) -> None:
        weight.data = x

    writes: list[Callable[[Tensor], object]] = [
        divided, element, replaced, nn.init.zeros_, lambda w: w.div_(2), lambda w: w.data.normal_(),
        lambda w: torch.add(x, x, out=w), lambda w: w.copy_(x),
    ]  # fmt: skip
    for write in writes:
        with (
            torch.no_grad(),
            pytest.raises(NotImplementedError, match=r"weight must be only read, got .*mode='plain'"),
        ):
            write(module.weight)
    assert torch.equal(x.clone().copy_(module.weight), module.weight)
    assert torch.equal(module.weight.requires_grad_(False).data, module.weight)
    assert torch.equal(copy.deepcopy(module.weight), module.weight)
    assert int(module.weight.numel()) == 20 * 96 and module.weight[0].shape == (96,)
