# SPDX-License-Identifier: Apache-2.0
"""transformers with the compressed-tensors library loads a checkpoint and runs it."""

from __future__ import annotations

import numpy as np
import torch
from exchange import serve, versions
from torch_models import logits_of, weights_of
from transformers import AutoModelForCausalLM


def consume(request, tokens):
    """Load, run the tokens, probe each layer."""
    dtype = getattr(torch, request["dtype"])
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=dtype).eval()
    # The library unpacks every layer before the model's first forward pass, so there is one also where nobody asks.
    logits = logits_of(model, np.zeros((1, 1), np.int64) if tokens is None else tokens)
    arrays = {} if tokens is None else {"logits": logits}
    arrays |= weights_of(model, request["layers"], dtype)
    kinds = sorted({type(model.get_submodule(name)).__name__ for name, _ in request["layers"]})
    return arrays, {"versions": versions("transformers", "compressed-tensors", "torch"), "modules": kinds}


serve(consume)
