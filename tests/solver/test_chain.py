# SPDX-License-Identifier: Apache-2.0
"""A model taken apart into a chain computes what the model computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from discquant.solver.chain import DecoderChain
from discquant.solver.module_chain import ModuleChain
from discquant.solver.norms import rms_norms


@pytest.mark.parametrize(
    "architecture",
    [
        "llama", "llama-tied-bias", "qwen2-bias", "qwen3-qk-norm", "mistral-sliding", "phi3-fused", "gemma-tied",
        "gemma2-softcap", "gemma3-two-ropes", "cohere-logit-scale", "granite-scaling",
    ],
)  # fmt: skip
def test_logits_equal_the_models(
    architecture: str, make_model: Callable[..., Any], token_ids: Tensor
) -> None:
    model = make_model(architecture)
    chain = DecoderChain(model)
    with torch.no_grad():
        expected = model(input_ids=token_ids, use_cache=False).logits
    error = (chain.logits(token_ids) - expected).abs().max()
    assert error <= 8 * torch.finfo(torch.float64).eps * expected.abs().max()
    assert len(chain.blocks) == 3
    assert not any(name.endswith(("lm_head", "embed_tokens")) for name in _names(chain))


def test_fused_layers_are_found(make_model: Callable[..., Any]) -> None:
    names = _names(DecoderChain(make_model("phi3-fused")))
    assert {name.rpartition(".")[2] for name in names} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_ignore_by_name_part_and_pattern(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    everything = _names(DecoderChain(model))
    assert len(everything) == 3 * 7
    assert _names(DecoderChain(model, ["down_proj"])) == [
        n for n in everything if not n.endswith("down_proj")
    ]
    assert _names(DecoderChain(model, ["model.layers.0.*"])) == [
        n for n in everything if ".layers.0." not in n
    ]
    assert _names(DecoderChain(model, ["model.layers.0", "mlp", "*.layers.2"])) == [
        n for n in everything if ".layers.1.self_attn." in n
    ]
    with pytest.raises(ValueError, match="no linear layer left"):
        DecoderChain(model, ["*"])


def test_padding_does_not_reach_what_counts(make_model: Callable[..., Any], token_ids: Tensor) -> None:
    chain = DecoderChain(make_model("mistral-sliding"))
    other = token_ids.clone()
    other[:, 9:] = 0
    assert torch.equal(chain.logits(token_ids)[:, :9], chain.logits(other)[:, :9])


def test_forward_is_restored(make_model: Callable[..., Any], token_ids: Tensor) -> None:
    model = make_model("llama")
    chain = DecoderChain(model)
    before = model(input_ids=token_ids, use_cache=False).logits
    with pytest.raises(IndexError):
        chain.prepare(token_ids + 100)  # an id beyond the vocabulary fails inside the model
    assert torch.equal(model(input_ids=token_ids, use_cache=False).logits, before)


def test_a_model_that_is_no_chain_is_refused(make_model: Callable[..., Any], token_ids: Tensor) -> None:
    model = make_model("llama")
    chain = DecoderChain(model)

    class Shifted(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.weight = inner.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 1.0

    model.lm_head = Shifted(model.lm_head)
    with pytest.raises(NotImplementedError, match="not a plain chain"):
        chain.verify(token_ids)
    with pytest.raises(NotImplementedError, match="no linear output head"):
        DecoderChain(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_verify_in_every_dtype(dtype: torch.dtype, make_model: Callable[..., Any], token_ids: Tensor) -> None:
    """Also in 16 bits it tells another head, and no logits that are NaN pass."""
    for architecture in ("llama", "gemma2-softcap", "cohere-logit-scale"):
        model = make_model(architecture, dtype)
        chain = DecoderChain(model)
        chain.verify(token_ids)
        assert chain.head is not None
        for wrong in (0.0, 0.9):
            broken = DecoderChain(model)
            broken.head = dataclasses.replace(chain.head, weight=chain.head.weight * wrong)
            with pytest.raises(NotImplementedError, match="not a plain chain"):
                broken.verify(token_ids)
        model.model.norm.weight.data.fill_(torch.nan)
        with pytest.raises(NotImplementedError, match="not finite"):
            chain.verify(token_ids)


def test_verify_runs_the_models_blocks_with_the_chains_norms(
    make_model: Callable[..., Any], token_ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: in bfloat16 norms of another kernel alone would move the logits by percents of the largest."""
    model = make_model("llama-six-blocks", torch.bfloat16)
    for norm in (module for name, module in model.named_modules() if name.endswith("norm")):
        norm.weight.data.uniform_(0.5, 1.5)
    chain = DecoderChain(model)
    monkeypatch.setattr(chain, "_fast_norms", lambda index, where: rms_norms(chain.blocks[index]))
    plain = model(input_ids=token_ids, use_cache=False).logits
    assert not torch.equal(chain.logits(token_ids), plain)
    monkeypatch.setattr("discquant.solver.chain.LOGIT_SHARE", 0.0)
    chain.verify(token_ids)


def test_module_chain_finds_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5))
    chain = ModuleChain(net)
    refs = chain.weights[0]
    assert [ref.name for ref in refs] == ["0", "3"]
    assert refs[0].matrix().shape == (8, 27)
    assert torch.equal(refs[0].shaped(refs[0].matrix()), net[0].weight)


def _names(chain: DecoderChain) -> list[str]:
    return [ref.name for refs in chain.weights for ref in refs]


def test_a_module_s_gate_is_any_layer() -> None:
    """What decides in a language model's experts by that name is an ordinary layer elsewhere."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.gate = nn.Linear(32, 32), nn.Linear(32, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gate(torch.relu(self.proj(x)))

    chain = ModuleChain(Net())
    assert [ref.name for refs in chain.weights for ref in refs] == ["proj", "gate"] and not chain.routers
