# SPDX-License-Identifier: Apache-2.0
"""`PackedExperts`: the experts of a block, which transformers fuses into one tensor, as packed matrices again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def follows_grouped_product(experts: nn.Module) -> bool:
    """Whether `PackedExperts` computes what a module of fused experts does: transformers' `grouped_mm`, its default.

    Not with biases, norms or transposed matrices of its own, and not with a forward or hooks that would be lost.
    """
    said: Any = experts
    plain = [getattr(experts, name, None) for name in ("is_transposed", "has_bias", "has_post_expert_norm")]
    if plain != [False, False, False] or said.config._experts_implementation != "grouped_mm":
        return False
    return "forward" not in vars(experts) and not (experts._forward_hooks or experts._forward_pre_hooks)


class PackedExperts(nn.Module):
    """Each expert's matrices as layers of their own, in place of tensors that hold all experts'; inference only.

    Expert by expert it computes what transformers' grouped product computes, in the same order: with layers in exact
    mode the same bits. Of the experts only those that a token chose are read. How many tokens each has is asked of the
    device, so a graph of torch.compile ends here. `set_experts_implementation` changes nothing.
    """

    def __init__(self, experts: nn.Module, first: Sequence[nn.Module], down: Sequence[nn.Module]) -> None:
        """Take over.

        Args:
            experts: The module that is replaced; it gives the activation, and its weights are dropped.
            first: Per expert the layer that reads the block's activations: gate and up in one, or up.
            down: Per expert the layer behind the activation.
        """
        super().__init__()
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            if name in experts._parameters:
                experts.register_parameter(name, None)
        self.own: Any = experts
        self.first = nn.ModuleList(first)
        self.down = nn.ModuleList(down)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: [num_tokens, hidden_size].
            top_k_index: Numbers of the chosen experts, int64, [num_tokens, top_k]; none is computed of a number that no
                expert has.
            top_k_weights: Floating, [num_tokens, top_k].

        Returns:
            dtype of hidden_states, [num_tokens, hidden_size].
        """
        num_tokens, top_k = top_k_index.shape
        chosen, order = torch.sort(top_k_index.reshape(-1))
        rows = hidden_states[order // top_k]
        out = torch.zeros_like(rows)
        counts = torch.bincount(chosen, minlength=len(self.first)).tolist()
        begin = 0
        for first, down, count in zip(self.first, self.down, counts[: len(self.first)], strict=True):
            if count:
                inside = first(rows[begin : begin + count])
                inside = self.own._apply_gate(inside) if self.own.has_gate else self.own.act_fn(inside)
                out[begin : begin + count] = down(inside)
                begin += count
        weighted = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        summed = weighted[back].view(num_tokens, top_k, hidden_states.shape[-1]).sum(dim=1)
        return summed.to(hidden_states.dtype)
