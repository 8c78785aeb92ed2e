# SPDX-License-Identifier: Apache-2.0
"""Rotary positions as config.json states them, wherever the version of transformers that wrote it put them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from discquant.errors import CheckpointError
from discquant.formats.config_numbers import integer, number, table


def rope_of(config: Mapping[str, Any], layer_type: str | None = None) -> dict[str, Any]:
    """Rotary settings of a model, `rope_theta` among them where it is stated.

    Args:
        config: config.json.
        layer_type: Whose settings to take where layers of several types have their own (`full_attention`).

    Raises:
        CheckpointError: They are no objects.
    """
    rope = table(config, "rope_scaling") | table(config, "rope_parameters")
    if layer_type is not None and isinstance(rope.get(layer_type), dict):
        rope = dict(rope[layer_type])
    if "rope_theta" in config:
        rope.setdefault("rope_theta", config["rope_theta"])
    return rope


def rope_kind(rope: Mapping[str, Any]) -> str:
    """Name of the scaling of rotary settings, `default` where there is none; the first Phi-3 called longrope `su`."""
    named = str(rope.get("rope_type") or rope.get("type") or "default")
    return "longrope" if named == "su" else named


def head_size(config: Mapping[str, Any]) -> int:
    """Entries of an attention head.

    Raises:
        CheckpointError: A count is missing or no positive integer.
    """
    shared = integer(config, "hidden_size") // integer(config, "num_attention_heads")
    return integer(config, "head_dim", shared, most=1 << 16)


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """Divisors of the rotary frequencies of Llama 3.1 models, float32, [head_dim / 2]; None for other models.

    Wavelengths above the original context over low_freq_factor are divided by `factor`, those below it over
    high_freq_factor are kept, and between the two the frequency is interpolated.

    Raises:
        CheckpointError: A setting is missing or no number.
    """
    rope = rope_of(config)
    if rope_kind(rope) != "llama3":
        return None
    head_dim = head_size(config)
    factor, low, high = (number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = number(rope, "original_max_position_embeddings")
    if low == high:
        raise CheckpointError(f"config.json: low_freq_factor and high_freq_factor are both {low}")
    powers = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelength = 2 * math.pi * number(rope, "rope_theta", 10000.0) ** powers
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
