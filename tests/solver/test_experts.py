# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts blocks: fused expert parameters are exact, named as in the checkpoint, quantized end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from discquant.api import quantize
from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import ConfigError
from discquant.formats.lazy import LazyBlock, settle
from discquant.run.checks import check_ignore
from discquant.solver import usage
from discquant.solver.chain import DecoderChain
from discquant.solver.curvature import Factors, kronecker_factors
from discquant.solver.experts import RoutedInputs, routes
from discquant.solver.gradients import block_gradients
from discquant.solver.layerwise import layerwise_codes, watch_inputs
from discquant.solver.rows import TokenRows
from discquant.solver.solve import lay_grids
from discquant.solver.weight_ref import assemble, take_matrices

COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 24},
    "Qwen3Moe": {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "mlp_only_layers": [0],
    },
    "GptOss": {
        "num_local_experts": 4,
        "intermediate_size": 24,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}
# Models whose routers are linear layers, and what those are called below a block.
ROUTERS = {
    "Afmoe": ["mlp.router.gate"],
    "JetMoe": ["mlp.router.layer", "self_attention.experts.router.layer"],
    "Qwen2Moe": ["mlp.shared_expert_gate"],
}
ROUTED: dict[str, dict[str, Any]] = {
    "Afmoe": {"num_dense_layers": 1, "num_experts": 4, "moe_intermediate_size": 16, "intermediate_size": 48},
    "JetMoe": {"num_local_experts": 4, "kv_channels": 8, "intermediate_size": 24},
    "Qwen2Moe": {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "intermediate_size": 48,
    },
}


def build(family: str, dtype: torch.dtype = torch.float32, **changed: Any) -> Any:
    """Return a random model whose router decides sharply."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**COMMON, **(FAMILIES | ROUTED)[family], **changed})
    torch.manual_seed(5)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(std=0.12)
            elif "bias" in name:
                parameter.normal_(std=0.05)
    return model


@pytest.fixture
def ids() -> Tensor:
    """Return token ids, [4, 12]."""
    return torch.randint(3, 61, (4, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_matrices_cover_the_fused_parameters(family: str) -> None:
    """Every entry of a fused parameter belongs to exactly one matrix; putting them together gives it back."""
    chain = DecoderChain(build(family))
    for refs in chain.weights:
        whole = assemble(refs, (torch.full(ref.matrix().shape, float(n + 1)) for n, ref in enumerate(refs)))
        for name, value in whole.items():
            members = [n for n, ref in enumerate(refs) if ref.param_name == name]
            numbers, counts = value.unique(return_counts=True)
            assert numbers.tolist() == [float(n + 1) for n in members]
            assert counts.tolist() == [refs[n].matrix().numel() for n in members]
        again = assemble(refs, take_matrices(refs, {ref.param_name: ref.parameter.detach() for ref in refs}))
        for ref in refs:
            assert torch.equal(again[ref.param_name], ref.parameter)
    routers = [
        ref.name
        for refs in chain.weights
        for ref in refs
        if "router" in ref.name or ref.name.endswith(".gate")
    ]
    assert not routers


@pytest.mark.parametrize("family", list(ROUTERS))
def test_routers_that_are_linear_layers_stay_as_they_are(family: str) -> None:
    """And are named; a gated product's `gate_proj` is none, and a file's own may be asked for."""
    model = build(family)
    chain = DecoderChain(model)
    names = {ref.name for refs in chain.weights for ref in refs}
    assert [name.removeprefix("model.layers.1.") for name in chain.routers if ".1." in name] == ROUTERS[
        family
    ]
    assert not names & set(chain.routers)
    assert family == "JetMoe" or any(name.endswith("gate_proj") for name in names)
    every = {ref.name for refs in DecoderChain(model, routers=True).weights for ref in refs}
    assert every == names | set(chain.routers)


def test_what_a_router_is_called() -> None:
    small, wide = torch.nn.Linear(32, 4), torch.nn.Linear(32, 64)
    for name in (
        "block_sparse_moe.gate",
        "mlp.gate.wg",
        "mlp.router.classifier",
        "mlp.router_gate",
        "ffn.router.layer",
    ):
        assert routes(name, small), name
    assert routes("mlp.router.inner", wide)
    for name in (
        "mlp.gate_proj",
        "self_attn.output_gate",
        "mlp.experts.0.w1",
        "per_layer_input_gate",
        "mlp.gateway",
    ):
        assert not routes(name, small), name
    assert not routes("mlp.gate", wide) and not routes("router", torch.nn.Conv2d(3, 4, 1))


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_names_are_the_checkpoints(family: str, tmp_path: Path) -> None:
    """Names and values of the matrices are those of the per-expert tensors that a checkpoint holds."""
    from safetensors.torch import load_file

    model = build(family)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for reopened in (model, type(model).from_pretrained(tmp_path)):
        refs = [ref for block in DecoderChain(reopened).weights for ref in block]
        for ref in refs:
            assert torch.equal(ref.matrix(), stored[f"{ref.name}.weight"]), ref.name
        assert sum(".experts." in ref.name for ref in refs) == sum(".experts." in name for name in stored) > 0


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_gradients_equal_autograd(family: str, keep_graph: bool, ids: Tensor) -> None:
    """Block by block = whole model, for every expert's matrix, also those that a micro-batch does not reach."""
    model = build(family, torch.float64)
    chain = DecoderChain(
        model
    )  # also lets the float64 experts run, which the library's grouped product cannot
    generator = torch.Generator().manual_seed(11)
    student = [
        {
            name: value * (1 + 0.2 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
            for name, value in {ref.param_name: ref.parameter.detach() for ref in refs}.items()
        }
        for refs in chain.weights
    ]
    leaves = [{key: value.clone().requires_grad_() for key, value in block.items()} for block in student]
    flat = {
        f"{prefix}.{key}": value
        for prefix, block in zip(chain.block_names, leaves, strict=True)
        for key, value in block.items()
    }
    log_p = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    log_q = functional_call(model, flat, (), {"input_ids": ids, "use_cache": False}).logits.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    expected.backward()

    found: dict[tuple[int, str], Tensor] = {}
    batches = TokenRows(chain, ids, None, 1).batches(range(4))
    value = block_gradients(
        chain,
        lambda index: student[index],
        batches,
        lambda index, grads: found.update({(index, name): grad for name, grad in grads.items()}),
        keep_graph=keep_graph,
    )
    assert abs(value - expected.item()) <= 64 * torch.finfo(torch.float64).eps * max(1.0, expected.item())
    for index, block in enumerate(leaves):
        for name, leaf in block.items():
            wanted = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            limit = 1e4 * torch.finfo(torch.float64).eps * float(wanted.abs().max())
            assert float((found[index, name] - wanted).abs().max()) <= limit, name


@pytest.mark.parametrize("family", list(FAMILIES))
def test_hessian_is_that_of_the_routed_tokens(family: str, ids: Tensor) -> None:
    """X^T X of both projections against a loop over tokens that asks the experts module itself."""
    model = build(family, torch.float64)
    chain = DecoderChain(model)
    index = len(chain.blocks) - 1
    refs = [ref for ref in chain.weights[index] if ref.part is not None]
    assert refs[0].part is not None
    module = model.get_submodule(refs[0].part.owner)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    spy = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    watch = RoutedInputs(module, refs, hessians=True)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, -3:] = False
    watch.mask = mask
    (batch,) = TokenRows(chain, ids, mask, 4).batches(range(4))
    chain.teacher_output(batch)
    spy.remove()
    watch.remove()
    hidden, chosen, weights = (value.detach() for value in seen[0])
    hidden = hidden.flatten(0, -2)
    for ref in refs:
        assert ref.part is not None
        want = torch.zeros(ref.matrix().shape[1], ref.matrix().shape[1], dtype=torch.float64)
        count = 0
        for token in mask.flatten().nonzero().flatten().tolist():
            for place in range(chosen.shape[1]):
                if int(chosen[token, place]) != ref.part.expert:
                    continue
                count += 1
                row = hidden[token]
                if ref.param_name.endswith("down_proj"):
                    gate_up = module.gate_up_proj[ref.part.expert].detach()
                    pre = row @ (gate_up if module.is_transposed else gate_up.T)
                    if module.has_bias:
                        pre = pre + module.gate_up_proj_bias[ref.part.expert].detach()
                    row = module._apply_gate(pre)
                scaled = (row * weights[token, place]).float().double()
                want += torch.outer(scaled, scaled)
        assert watch.tokens.get(ref.part.expert, 0) == count
        found = watch.gathered(ref)
        if count == 0:
            assert found is None
            continue
        assert found is not None
        limit = 64 * torch.finfo(torch.float32).eps * float(want.abs().max())
        assert float((found - want).abs().max()) <= limit, ref.name


def test_padding_reaches_no_statistic_of_a_shared_expert(ids: Tensor) -> None:
    """It is called on [windows * seqlen, channels]: what stands in the padding changes neither Hessians nor factors."""
    chain = DecoderChain(build("Qwen2Moe", torch.float64))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 4:] = False
    found: list[dict[str, Tensor]] = []
    for padding in (5, 6):
        batches = [chain.prepare(torch.where(mask, ids, padding), mask)]
        statistics: dict[str, Tensor] = {}
        hooks = watch_inputs(chain, chain.weights[1], strict=True)
        for hook in hooks.values():
            hook.mask = mask
        chain.teacher_output(batches[0])
        for name, hook in hooks.items():
            hook.remove()
            ref = next(ref for ref in chain.weights[1] if ref.name == name)
            gathered = hook.gathered(ref)
            if gathered is not None:
                statistics[name] = gathered

        def take(index: int, factors: dict[str, Factors], into: dict[str, Tensor] = statistics) -> None:
            for name, (inputs, outputs) in factors.items():
                into |= {f"{name} inputs": inputs, f"{name} outputs": outputs}

        kronecker_factors(
            chain, batches, take, total=16, width=64, generator=torch.Generator().manual_seed(0)
        )
        found.append(statistics)
    assert found[0].keys() == found[1].keys() and any(
        "shared_expert.up_proj inputs" in key for key in found[0]
    )
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=1e-7 * float(value.abs().max()))


@pytest.mark.parametrize("method", ["rtn", "greedy", "gptq", "discquant"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_method_rounds_experts(family: str, method: str, ids: Tensor) -> None:
    """Codes of every expert's matrix; applied, the model's experts hold exactly what the codes say."""
    model = build(family)
    config = QuantizeConfig(
        grid=GridConfig(bits=4, group_size=8),
        method=method,  # type: ignore[arg-type]
        solver=SolverConfig(iters=2, batch_size=2, micro_batch=2, warmup=1),
        gptq_samples=2,
    )
    done = quantize(model, config=config, calibration=ids)
    refs = {ref.name: ref for block in DecoderChain(model).weights for ref in block}
    assert refs.keys() == done.codes.keys()
    done.apply()
    for name, ref in refs.items():
        assert torch.equal(ref.matrix(), done.grids[name].dequantize(done.codes[name], done.served)), name


@pytest.mark.parametrize("start", ["gptq", "random"])
def test_unseen_experts_stay_at_nearest(start: str, ids: Tensor) -> None:
    """An expert that no token reaches is rounded to nearest whatever the start, and is named."""
    model = build("Mixtral", num_local_experts=16, num_experts_per_tok=1)
    ids = ids[:1].repeat(4, 1)  # 12 different tokens: 16 experts cannot all be reached
    config = QuantizeConfig(
        grid=GridConfig(bits=3, group_size=8),
        solver=SolverConfig(iters=3, batch_size=2, micro_batch=2, warmup=1, start=start),  # type: ignore[arg-type]
        gptq_samples=2,
    )
    chain = DecoderChain(model)
    experts = {ref.name: ref for refs in chain.weights for ref in refs if ref.part is not None}
    chosen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda _, args, out: chosen.append(set(out[2].flatten().tolist()))
        )
    model(input_ids=ids[:1], use_cache=False)
    unseen = {
        name
        for name, ref in experts.items()
        if ref.part is not None and ref.part.expert not in chosen[int(name.split(".")[2])]
    }
    assert len(unseen) >= 2 * 3 * 4
    done = quantize(model, config=config, calibration=ids)
    assert set(done.unseen) == unseen
    for name in unseen:
        assert torch.equal(done.codes[name], done.grids[name].nearest(experts[name].matrix())), name


def test_blocks_are_read_once_for_a_group_to_find_unseen_experts(
    ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that are in memory while they run only; the same experts however large a group is."""
    read = []
    enter = LazyBlock._enter

    def counted(block: LazyBlock, *args: Any) -> None:
        if block._depth == 0 and not block.paused:
            read.append(block)
        enter(block, *args)

    monkeypatch.setattr(LazyBlock, "_enter", counted)

    def streamed(**changed: int) -> DecoderChain:
        model = build("Mixtral", **changed)
        settle(model, torch.device("cpu"), stream=True)
        return DecoderChain(model)

    chain = streamed(num_local_experts=16, num_experts_per_tok=1)
    mask = torch.ones((6, 4), dtype=torch.bool)
    mask[2:4, 2:] = False
    rows = TokenRows(chain, ids[:1, :4].repeat(6, 1), mask, 2)
    known = usage.unseen_experts(chain, rows.stream())
    assert len(read) == 2 and known, "what so few tokens keep is less than a block's weights"
    one = usage._held_bytes(rows.batches([0, 1])[0])
    for most, groups in ((0, 3), (2 * one, 2), (3 * one, 1)):
        read.clear()
        monkeypatch.setattr(usage, "group_bytes", lambda chain, most=most: most)
        assert usage.unseen_experts(chain, rows.stream()) == known
        assert len(read) == 2 * groups

    # Once every expert was seen there is nothing left to find.
    chain = streamed()
    rows = TokenRows(chain, ids, None, 2)
    monkeypatch.setattr(usage, "group_bytes", lambda chain: 0)
    read.clear()
    assert not usage.unseen_experts(chain, rows.stream())
    assert len(read) == 2


def test_layerwise_leaves_unseen_experts_at_nearest(ids: Tensor) -> None:
    """GPTQ of an expert without tokens is rounding to nearest."""
    model = build("Mixtral", num_local_experts=16, num_experts_per_tok=1)
    chain = DecoderChain(model)
    grids = lay_grids(chain, GridConfig(bits=3, group_size=8))
    batches = TokenRows(chain, ids[:1, :8], None, 1).batches([0])
    codes = layerwise_codes(chain, grids, batches, "gptq")
    refs = [ref for block in chain.weights for ref in block if ref.part is not None]
    same = [torch.equal(codes[ref.name], grids[ref.name].nearest(ref.matrix())) for ref in refs]
    assert sum(same) >= 2 * 3 * 8, "8 tokens reach at most 8 of 16 experts"
    assert not all(same)


def test_experts_can_be_ignored() -> None:
    """A pattern leaves single experts, or all of them, alone; what is left is still whole."""
    model = build("Qwen3Moe")
    some = DecoderChain(model, ["lm_head", "*.experts.0.*"])
    names = [ref.name for block in some.weights for ref in block]
    assert not any(".experts.0." in name for name in names) and any(".experts.1." in name for name in names)
    refs = some.weights[1]
    own = assemble(refs, (ref.matrix() for ref in refs))
    for ref in refs:
        assert torch.equal(own[ref.param_name], ref.parameter)
    none = DecoderChain(model, ["lm_head", "experts"])
    assert not any(".experts." in ref.name for block in none.weights for ref in block)
    for pattern in (
        "experts",
        "*.experts.0",
        "*.experts.0.*",
        "gate_up_proj",
        "gate",
        "mlp",
        "norm",
    ):  # a router stays anyway, and so does a norm
        check_ignore(model, ("lm_head", pattern))
    with pytest.raises(ConfigError, match=r"'\*.experts.99'; last names here: .*down_proj"):
        check_ignore(model, ("lm_head", "*.experts.99"))


def test_undeclared_orientation_is_refused() -> None:
    """Fused experts that do not say how they are stored are not guessed at."""

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 4, 8))

    from discquant.solver.experts import expert_refs

    root = torch.nn.Module()
    root.experts = Experts()
    with pytest.raises(NotImplementedError, match=r"block\.experts\.gate_up_proj .* --ignore experts"):
        expert_refs(root, root, "block", lambda name: True)
    assert expert_refs(root, root, "block", lambda name: not name.endswith("experts")) == []
