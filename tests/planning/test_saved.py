# SPDX-License-Identifier: Apache-2.0
"""What the plan says of a block's activations, against what autograd really keeps of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from discquant.planning.shape import shape_of

HIDDEN, TOKENS = 256, 64


class Kernel(torch.autograd.Function):
    """Keeps what torch's norm on a GPU keeps: its input, the weight and a number per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, weight, rstd)
        return (x.float() * rstd * weight.float()).to(x.dtype)


@pytest.mark.parametrize("accelerator", [False, True])
def test_activations_that_autograd_keeps(accelerator: bool) -> None:
    """Of a bfloat16 Llama block whose weights take gradients, without its input, which is a hidden state of its own."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=HIDDEN, intermediate_size=896, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    planned = shape_of(model).largest
    assert planned.fused_norms
    block = model.model.layers[0]
    if accelerator:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.forward = lambda x, norm=norm: Kernel.apply(x, norm.weight)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.weight.requires_grad_()
    x = torch.randn(1, TOKENS, HIDDEN, dtype=torch.bfloat16).requires_grad_()
    places = model.model.rotary_emb(x, torch.arange(TOKENS)[None])
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), x]}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x, position_embeddings=places)
    found = sum(size for size, _ in kept.values()) / TOKENS
    assert planned.saved_bytes(2, accelerator) == pytest.approx(found, rel=0.04)
