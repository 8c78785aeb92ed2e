# SPDX-License-Identifier: Apache-2.0
"""A model that its owner gets back as it was, whatever becomes of the work on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from discquant.solver.experts import kept_kernels


@contextlib.contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """Let a chain freeze a model and put it in evaluation mode meanwhile; what its owner has set around does not count.

    Within, autocast and inference mode are off: the model's dtype is the compute dtype, and the solver needs gradients.
    Afterwards every submodule has its `training` again, every parameter its `requires_grad`; experts compute as before.

    Raises:
        ValueError: Parameters were made in inference mode, which autograd never takes.
    """
    training = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    name = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if name is not None:
        raise ValueError(
            f"quantize: parameters must be made outside of torch.inference_mode, got {name} made within; load the "
            "model outside"
        )
    kinds = {"cpu", *(parameter.device.type for parameter, _ in trained)}
    with contextlib.ExitStack() as held:
        held.enter_context(torch.inference_mode(False))
        for kind in filter(torch.amp.is_autocast_available, sorted(kinds)):
            held.enter_context(torch.autocast(kind, enabled=False))
        held.enter_context(kept_kernels(model))
        try:
            yield
        finally:
            for module, mode in training:
                module.training = mode
            for parameter, wanted in trained:
                parameter.requires_grad_(wanted)
