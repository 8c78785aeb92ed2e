# SPDX-License-Identifier: Apache-2.0
"""MLX on the CPU decodes every quantized matrix, and mlx-lm runs the model where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from exchange import serve, versions


def consume(request, tokens):
    """Dequantize with mx.dequantize in the file's dtype; logits through mlx_lm's own loader."""
    mx.set_default_device(mx.cpu)
    folder = Path(request["model"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization"]
    stored = {}
    for shard in sorted(folder.glob("*.safetensors")):
        stored |= mx.load(str(shard))
    arrays = {}
    for name, _ in request["layers"]:
        own = {**config, **config.get(name, {})}  # as mlx-lm: what a layer states counts before what all have
        weight = mx.dequantize(
            stored[f"{name}.weight"],
            # float32 parameters: the value of s * q + bias itself, without the rounding of a 16-bit product
            stored[f"{name}.scales"].astype(mx.float32),
            stored[f"{name}.biases"].astype(mx.float32),
            group_size=own["group_size"],
            bits=own["bits"],
        )
        arrays[f"weight/{name}"] = np.array(weight.astype(mx.float32))
    facts = {"versions": versions("mlx", "mlx-lm")}
    if tokens is not None:
        from mlx_lm.utils import load_model

        model, _ = load_model(folder)
        model.set_dtype(mx.float32)
        rows = [np.array(model(mx.array(window[None])).astype(mx.float32))[0] for window in tokens]
        arrays["logits"] = np.stack(rows)
    return arrays, facts


serve(consume)
