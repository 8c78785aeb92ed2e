# SPDX-License-Identifier: Apache-2.0
"""Any module that maps a tensor to logits as a chain of one block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from discquant.solver.chain import BlockCall, Chain, Prepared
from discquant.solver.layers import quantizable_modules, refuse_transposed, transposed_modules


class ModuleChain(Chain):
    """Any module with one tensor in and logits out, as a chain of one block (a vision model, say)."""

    def __init__(self, model: nn.Module, ignore: Sequence[str] = ()) -> None:
        """Take the whole module as the only block.

        Args:
            model: Module mapping a tensor to logits [..., num_classes], in evaluation mode.
            ignore: Module names, last name parts or glob patterns that stay untouched.

        Raises:
            ValueError: Nothing is left to quantize.
            NotImplementedError: A weight is no parameter, or the only linear layers are `transformers`' Conv1D.
        """
        self.model = model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.blocks, self.block_names = [model], [""]
        self.head = None
        if not quantizable_modules(model, "", ignore):
            refuse_transposed(transposed_modules(model, "", ignore))
        self._collect(ignore, routers=True)  # names mean nothing here: a gate may be any layer

    @torch.no_grad()
    def verify(self, inputs: Tensor) -> None:
        """Check that the module gives logits for some inputs.

        Raises:
            NotImplementedError: It gives no tensor.
            ValueError: What it gives is not [samples, ..., classes].
        """
        logits = self.run_block(0, inputs.to(self.device), BlockCall((), {}))
        if logits.ndim < 2 or len(logits) != len(inputs) or not logits.is_floating_point():
            raise ValueError(
                f"ModuleChain: {type(self.model).__name__} must give logits = floating [{len(inputs)}, ..., classes] "
                f"for inputs {list(inputs.shape)}, got {logits.dtype} {list(logits.shape)}"
            )

    def prepare(self, inputs: Tensor, mask: Tensor | None = None) -> Prepared:
        """Return the inputs as the block's input."""
        return Prepared(inputs, [BlockCall((), {})], inputs, mask)

    def finish(self, hidden: Tensor, prepared: Prepared) -> Tensor:
        """Return the logits unchanged."""
        return hidden
