# SPDX-License-Identifier: Apache-2.0
"""The gguf package dequantizes a model file: every matrix, rows back in transformers' order."""

from __future__ import annotations

import gguf
import numpy as np
from exchange import serve, versions
from gguf_names import deinterleave, to_transformers


def consume(request, tokens):
    """Decode every matrix with the package's own dequantizer."""
    reader = gguf.GGUFReader(request["model"])
    heads, kv_heads = (
        int(reader.get_field(f"llama.attention.{key}").contents()) for key in ("head_count", "head_count_kv")
    )
    arrays, types = {}, {}
    for tensor in reader.tensors:
        name = to_transformers(tensor.name)
        if name is None:
            continue
        if len(tensor.shape) == 2:
            types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        weight = weight.reshape([int(size) for size in reversed(tensor.shape)])
        if name.endswith(("q_proj", "k_proj")):
            weight = deinterleave(weight, heads if name.endswith("q_proj") else kv_heads)
        arrays[f"weight/{name}"] = weight
    return arrays, {"versions": versions("gguf", "numpy"), "types": types}


serve(consume)
