# SPDX-License-Identifier: Apache-2.0
"""gptqmodel loads a checkpoint onto its torch backend and runs it."""

from __future__ import annotations

import torch
from exchange import serve, versions
from gptqmodel import BACKEND, GPTQModel
from torch_models import logits_of, weights_of


def consume(request, tokens):
    """Load, run the tokens, probe each layer."""
    dtype = getattr(torch, request["dtype"])
    loaded = GPTQModel.load(request["model"], backend=BACKEND.TORCH, device="cpu", dtype=dtype)
    model = loaded.model.eval()
    arrays = {"logits": logits_of(model, tokens)} if tokens is not None else {}
    arrays |= weights_of(model, request["layers"], dtype)
    kinds = sorted({type(model.get_submodule(name)).__name__ for name, _ in request["layers"]})
    return arrays, {"versions": versions("gptqmodel", "transformers", "torch"), "modules": kinds}


serve(consume)
