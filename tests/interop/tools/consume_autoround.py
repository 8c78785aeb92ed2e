# SPDX-License-Identifier: Apache-2.0
"""auto-round's loader (its quantizer inside transformers) loads a checkpoint and runs it."""

from __future__ import annotations

import torch
from exchange import serve, versions
from torch_models import logits_of, weights_of
from transformers import AutoModelForCausalLM, AutoRoundConfig


def consume(request, tokens):
    """Load, run the tokens, probe each layer."""
    dtype = getattr(torch, request["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        request["model"],
        dtype=dtype,
        device_map="cpu",
        quantization_config=AutoRoundConfig(backend=request.get("backend", "auto")),
    ).eval()
    arrays = {"logits": logits_of(model, tokens)} if tokens is not None else {}
    arrays |= weights_of(model, request["layers"], dtype)
    kinds = sorted({type(model.get_submodule(name)).__name__ for name, _ in request["layers"]})
    return arrays, {"versions": versions("auto-round", "transformers", "torch"), "modules": kinds}


serve(consume)
