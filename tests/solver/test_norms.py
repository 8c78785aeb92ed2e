# SPDX-License-Identifier: Apache-2.0
"""Norms in one pass: which modules are taken, that they compute the same, and that they are themselves afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from discquant.solver.norms import fused, is_rms_norm, rms_norms

SIZES = {
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def block_of(kind: str, device: str = "cpu") -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES))
    block: nn.Module = model.model.layers[0]
    return block


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("llama", 2),
        ("phi3", 2),
        ("qwen3", 4),
        ("mixtral", 2),
        ("gemma", 0),
        ("gemma3_text", 0),
        ("cohere", 0),
        ("granitemoehybrid", 2),
    ],
)
def test_which_are_taken(kind: str, count: int, device: str) -> None:
    """Gemma scales by 1 + weight, Cohere subtracts the mean, the norm in a state-space mixer takes a gate."""
    assert len(rms_norms(block_of(kind, device))) == count


class Scaled(nn.Module):
    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(32)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class AnotherEpsilon(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 2 * self.eps)


class AnotherFactor(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.001


class Gated(Scaled):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate


class GatedWhereAsked(Scaled):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * gate)


def test_what_only_looks_like_one() -> None:
    assert is_rms_norm(Scaled()) and is_rms_norm(Scaled(1e-5))
    for kind in (AnotherEpsilon, AnotherFactor, Gated, GatedWhereAsked):
        assert not is_rms_norm(kind())
    patched = Scaled()
    patched.forward = lambda x: 3 * x  # type: ignore[method-assign]
    assert not is_rms_norm(patched)
    with torch.device("meta"):  # whoever builds a model there
        assert is_rms_norm(Scaled())
    assert not is_rms_norm(nn.RMSNorm(32)) and not is_rms_norm(nn.LayerNorm(32))
    unnamed = Scaled()
    del unnamed.eps
    assert not is_rms_norm(unnamed)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_values_and_gradients(dtype: torch.dtype, device: str) -> None:
    block = block_of("qwen3").to(device, dtype)
    norms = rms_norms(block)
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # type: ignore[arg-type]
        x = torch.randn(3, 5, norm.weight.numel(), device=device).to(dtype)  # type: ignore[operator]
        pull = torch.randn_like(x)
        found = []
        for inside in ((), norms):
            leaf = x.clone().requires_grad_()
            with fused(inside):
                y = norm(leaf)
                y.backward(pull)
            assert y.dtype == dtype and "forward" not in norm.__dict__
            found.append((y.detach().double(), leaf.grad.double()))  # type: ignore[union-attr]
        eps = torch.finfo(dtype).eps
        for ours, theirs in zip(found[1], found[0], strict=True):
            assert ((ours - theirs).abs() <= 4 * eps * theirs.abs() + 4 * eps).all()


def test_an_error_leaves_them_as_they_were() -> None:
    norms = rms_norms(block_of("llama"))
    with pytest.raises(RuntimeError, match="broken"), fused(norms):
        assert all("forward" in norm.__dict__ for norm in norms)
        raise RuntimeError("broken")
    assert not any("forward" in norm.__dict__ for norm in norms)


def test_a_float32_weight_does_not_widen_what_passes() -> None:
    """Of a model in bfloat16 whose norms were kept in float32."""
    norm = Scaled()
    with fused([norm]):
        assert norm(torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16
