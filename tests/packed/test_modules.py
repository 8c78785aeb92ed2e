# SPDX-License-Identifier: Apache-2.0
"""PackedLinear and load_packed: no full-precision copy survives, fused projections, the same greedy text."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from discquant import _extension
from discquant.formats.codes import QuantizedLinear
from discquant.modules import FusedProjection, PackedLinear, load_packed

CPP = pytest.mark.skipif(not _extension.available(), reason="discquant._C is not built")


def coded(
    name: str, weight: Tensor, bits: int = 3, group: int = 64, symmetric: bool = True
) -> QuantizedLinear:
    """Round to nearest on an abs-max grid."""
    n, k = weight.shape
    groups = 1 if group == -1 else -(-k // group)
    size = k if group == -1 else group
    padded = torch.nn.functional.pad(weight, (0, groups * size - k)).view(n, groups, size)
    scale = (padded.abs().amax(-1) / (2 ** (bits - 1) - 0.5)).clamp(min=1e-4).bfloat16()
    zero = None if symmetric else torch.full((n, groups), 2 ** (bits - 1) - 1, dtype=torch.uint8)
    centre = 2 ** (bits - 1) - (0 if symmetric else 1)
    q = (padded / scale.float()[..., None]).round() + centre
    q = q.clamp(0, 2**bits - 1).to(torch.uint8).view(n, -1)[:, :k].contiguous()
    return QuantizedLinear(name, q, scale, zero, bits, group)


def tiny_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def block_layers(model: nn.Module, bits: int = 3) -> list[QuantizedLinear]:
    return [
        coded(name, module.weight.detach(), bits)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def rounded(model: nn.Module, layers: list[QuantizedLinear]) -> nn.Module:
    """The same model with the codes' weights in nn.Linear: what the solver has in memory."""
    twin = copy.deepcopy(model)
    for layer in layers:
        weight = twin.get_submodule(layer.name).weight
        weight.data = layer.dequantize(weight.dtype)
    return twin


@CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_mode_generates_the_same_text(dtype: torch.dtype) -> None:
    model = tiny_llama(dtype)
    layers = block_layers(model)
    dense = rounded(model, layers)
    report = load_packed(model, iter(layers), mode="exact")
    assert (report.layers, report.fused) == (14, 4)
    prompt = torch.randint(0, 96, (2, 7))
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **settings), dense.generate(prompt, **settings))
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, dense(prompt).logits)


@CPP
def test_default_mode_is_close_and_fused_equals_unfused() -> None:
    model = tiny_llama()
    layers = block_layers(model, bits=4)
    dense = rounded(model, layers)
    alone = copy.deepcopy(model)
    load_packed(model, layers)
    report = load_packed(alone, layers, fuse=False)
    assert report.fused == 0
    prompt = torch.randint(0, 96, (3, 9))
    with torch.inference_mode():
        fused, single, full = model(prompt).logits, alone(prompt).logits, dense(prompt).logits
    assert torch.equal(fused, single)
    # 15-bit activations: 14 layers deep the logits still agree to a few 1e-4 of their size.
    assert (fused - full).abs().max() < 1e-3 * full.abs().max()


def live_bytes() -> int:
    """Bytes of all CPU tensors that Python can reach."""
    gc.collect()
    sizes: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type == "cpu":
            sizes[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(sizes.values())


@CPP
def test_no_full_precision_copy_survives() -> None:
    """The peak of live tensors stays near the packed size while layers come one by one into a meta model."""
    n, k, count = 512, 512, 8
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(k, n, bias=False) for _ in range(count)))
    live: list[int] = []

    def layers() -> Iterator[QuantizedLinear]:
        for i in range(count):
            live.append(live_bytes())
            q = torch.randint(0, 8, (n, k), dtype=torch.uint8)
            yield QuantizedLinear(str(i), q, torch.ones(n, k // 128, dtype=torch.bfloat16), None, 3, 128)

    report = load_packed(model, layers())
    weights = n * k * count
    assert report.packed_bytes == weights * 3 // 8 + weights // 128 * 2
    # Before the last layer is made, the others are there in packed form and one layer's codes are not yet dropped.
    assert live[-1] - live[0] <= report.packed_bytes + 2 * n * k
    # And the measure does see the packed layers.
    assert live[-1] - live[0] >= report.packed_bytes * (count - 1) // count
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert sum(b.numel() * b.element_size() for b in model.buffers()) == report.packed_bytes
    assert not list(model.parameters())


@CPP
def test_casts_leave_the_scales_alone() -> None:
    layer = coded("x", torch.randn(40, 100))
    module = PackedLinear.from_codes(
        layer.q, layer.scale.float(), bias=torch.randn(40), num_bits=3, group_size=64
    )
    expected = module.dequantize(torch.float32)
    module.half()
    assert (
        module.scale.dtype == torch.float32 and module.bias is not None and module.bias.dtype == torch.float16
    )
    assert torch.equal(module.dequantize(torch.float32), expected)
    assert "num_bits=3" in repr(module) and "float" not in repr(module)


@CPP
def test_fused_projections_follow_their_input() -> None:
    """A changed or new input is computed again; threads do not see each other's results."""
    parent = nn.Module()
    for name, rows in (("q_proj", 20), ("k_proj", 12), ("v_proj", 12)):
        setattr(parent, name, nn.Linear(64, rows, bias=False))
    layers = [coded(name, getattr(parent, name).weight.detach()) for name in ("q_proj", "k_proj", "v_proj")]
    alone = copy.deepcopy(parent)
    load_packed(parent, reversed(layers))
    load_packed(alone, layers, fuse=False)
    assert isinstance(parent.k_proj, FusedProjection)
    x = torch.randn(2, 64)
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            assert torch.equal(getattr(parent, name)(x), getattr(alone, name)(x))
        x.add_(1.0)
        for name in ("v_proj", "v_proj", "q_proj"):
            assert torch.equal(getattr(parent, name)(x), getattr(alone, name)(x))

    def agrees(seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randn(2, 64, generator=generator) for _ in range(30)]
        names = ("q_proj", "k_proj", "v_proj")
        return all(torch.equal(getattr(parent, n)(y), getattr(alone, n)(y)) for y in rows for n in names)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(agrees, range(4)))


def gate_and_up(rows: int = 128) -> tuple[nn.Module, nn.Module]:
    """The same two projections fused and alone."""
    parent = nn.Module()
    for name in ("gate_proj", "up_proj"):
        setattr(parent, name, nn.Linear(64, rows))
    layers = [coded(name, getattr(parent, name).weight.detach()) for name in ("gate_proj", "up_proj")]
    alone = copy.deepcopy(parent)
    assert load_packed(parent, layers).fused == 1
    load_packed(alone, layers, fuse=False)
    return parent, alone


@CPP
def test_a_call_that_failed_leaves_no_outputs_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, alone = gate_and_up()
    first, second = torch.randn(2, 2, 64)
    fused.gate_proj(first)  # the other's outputs for `first` wait
    with pytest.raises(ValueError, match="x must have a dtype"):
        fused.gate_proj(second.double())
    with monkeypatch.context() as patch:
        patch.setattr(PackedLinear, "forward", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            fused.gate_proj(second)
    assert torch.equal(fused.up_proj(second), alone.up_proj(second))
    with pytest.raises(ValueError, match="x must have a dtype"):
        fused.up_proj(second.double())


@CPP
def test_inference_tensors_are_shared_by_identity() -> None:
    """torch counts no changes of theirs: another tensor is computed again, a write into the same one is not seen."""
    fused, alone = gate_and_up()
    with torch.inference_mode():
        x = torch.randn(2, 64)
        expected = alone.up_proj(x)
        fused.gate_proj(x)
        assert torch.equal(fused.up_proj(x.clone()), expected)
        fused.gate_proj(x)
        x.mul_(2)
        assert torch.equal(fused.up_proj(x), expected)
        assert torch.equal(fused.up_proj(x), alone.up_proj(x))


@CPP
@pytest.mark.parametrize("rows", [128, 40])
def test_fused_projections_compile_whole(rows: int) -> None:
    """Inside a graph each takes its own rows; 40 begin in the middle of a block of 64, so all are multiplied."""
    fused, alone = gate_and_up(rows)
    seen: list[list[int]] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        seen.append([n.args[5] for n in graph.graph.nodes if "packed_linear" in str(n.target)])
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def block(x: Tensor) -> Tensor:
        return fused.gate_proj(x) * fused.up_proj(x)

    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(block(x), alone.gate_proj(x) * alone.up_proj(x))
        assert torch.equal(fused.gate_proj(x), alone.gate_proj(x))
    assert seen == [[128, 128] if rows == 128 else [40, 80]]


@CPP
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_autocast_is_that_of_a_dense_layer(dtype: torch.dtype, bias: bool) -> None:
    """x, weight and bias in the dtype of autocast, as nn.Linear takes them: whole, by rows and compiled."""
    dense = nn.Linear(100, 130, bias=bias)
    layer = coded("x", dense.weight.detach())
    packed = PackedLinear.from_codes(
        layer.q, layer.scale, layer.zero_point, dense.bias, num_bits=3, group_size=64, mode="exact"
    )
    dense.weight.data = packed.dequantize(torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=False)
    for x in (torch.randn(3, 100), torch.randn(3, 100).bfloat16(), torch.randn(3, 100).half()):
        with torch.no_grad(), torch.autocast("cpu", dtype):
            expected = dense(x)
            assert expected.dtype == dtype
            assert torch.equal(packed(x), expected)
            assert torch.equal(packed.forward_rows(x, 64, 130), expected[:, 64:])
            packed.mode = "auto"
            assert packed(x).dtype == dtype
            packed.mode = "exact"
            with pytest.raises(ValueError, match="x must have a dtype"):
                packed(x.double())  # autocast leaves it alone
    x = torch.randn(3, 100)
    with torch.no_grad():
        assert torch.equal(compiled(x), dense(x))
        with torch.autocast("cpu", dtype):
            assert torch.equal(compiled(x), dense(x))


@CPP
def test_fused_projections_in_and_out_of_autocast() -> None:
    fused, alone = gate_and_up()
    x = torch.randn(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        gate = fused.gate_proj(x)
        assert gate.dtype == torch.bfloat16 and torch.equal(gate, alone.gate_proj(x))
    assert torch.equal(fused.up_proj(x), alone.up_proj(x))


@CPP
def test_mixed_grids_are_not_fused() -> None:
    parent = nn.Module()
    parent.gate_proj, parent.up_proj = nn.Linear(64, 16), nn.Linear(64, 16)
    layers = [
        coded("gate_proj", parent.gate_proj.weight.detach(), bits=3),
        coded("up_proj", parent.up_proj.weight.detach(), bits=4),
    ]
    assert load_packed(parent, layers).fused == 0
    assert parent.gate_proj.num_bits == 3 and parent.up_proj.num_bits == 4


@CPP
def test_load_packed_rejects_bad_input() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU())
    with pytest.raises(ValueError, match=r"load_packed: 1 must be an nn\.Linear"):
        load_packed(model, [coded("1", torch.randn(8, 64))])
    with pytest.raises(ValueError, match=r"load_packed: nowhere must be an nn\.Linear"):
        load_packed(model, [coded("nowhere", torch.randn(8, 64))])
    with pytest.raises(ValueError, match=r"codes of 0 must have shape = \[8, 64\], got \[8, 65\]"):
        load_packed(model, [coded("0", torch.randn(8, 65))])
    with pytest.raises(ValueError, match="num_bits must be one of"):
        load_packed(model, [coded("0", torch.randn(8, 64), bits=2)])
    with torch.device("meta"):
        hollow = nn.Sequential(nn.Linear(64, 8))
    with pytest.raises(ValueError, match="the bias of 0 must be loaded before its weight"):
        load_packed(hollow, [coded("0", torch.randn(8, 64))])
    with pytest.raises(ValueError, match="PackedLinear: scale must have shape"):
        PackedLinear.from_codes(
            torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 2), num_bits=3, group_size=64
        )
    with pytest.raises(ValueError, match="per_group must be = finite"):
        PackedLinear.from_codes(
            torch.zeros(1, 64, dtype=torch.uint8), torch.full((1, 1), torch.inf), num_bits=3, group_size=64
        )
    with pytest.raises(ValueError, match="PackedLinear: mode must be one of"):
        PackedLinear.from_codes(
            torch.zeros(1, 64, dtype=torch.uint8), torch.ones(1, 1), num_bits=3, group_size=64, mode="int8"
        )
