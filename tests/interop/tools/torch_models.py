# SPDX-License-Identifier: Apache-2.0
"""What the torch-based tools share: logits of a causal model, and the weight that a linear module computes with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn


@torch.inference_mode()
def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits, float32, [windows, tokens, vocab_size], two windows at a time."""
    ids = torch.from_numpy(tokens)
    parts = [model(input_ids=ids[i : i + 2], use_cache=False).logits.float() for i in range(0, len(ids), 2)]
    return torch.cat(parts).numpy()


@torch.inference_mode()
def weight_of(module: nn.Module, in_features: int, dtype: torch.dtype) -> np.ndarray:
    """The weight, float32, [out_features, in_features], found by running the module on the unit vectors.

    Each output is one product with 1 and zeros, so it is the weight itself in the dtype the module computes in.
    """
    out = module(torch.eye(in_features, dtype=dtype))
    out = out[0] if isinstance(out, tuple) else out
    return out.float().T.contiguous().numpy()


def weights_of(model: nn.Module, layers: Iterable[list[Any]], dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Weights of [name, in_features] pairs, keyed for the exchange."""
    return {f"weight/{name}": weight_of(model.get_submodule(name), width, dtype) for name, width in layers}
