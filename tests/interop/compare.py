# SPDX-License-Identifier: Apache-2.0
"""What is expected of a consumer: the rounded model's logits with a derived bound, and its codes back from weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from discquant.formats.coded import CodedLayer
from discquant.grids import Grid
from discquant.grids.fused import experts_of
from discquant.solver.experts import expert_refs

EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# llama.cpp rounds activations to int8 in blocks before each quantized product: 32 columns (Q8_0, Q8_1) beside the
# 4-bit types, 256 (Q8_K) beside the K-quants.
ACTIVATION_BLOCKS = {"int8 activations, blocks of 32": 32, "int8 activations, blocks of 256": 256}

# MLX's CPU kernel adds the products of a quantized row one by one, in column order, in float32 (mlx/backend/cpu/
# quantized.cpp, _qmm_t); BLAS adds blocks of them, whose rounding errors are smaller.
IN_SEQUENCE = "float32, summed in sequence"


def load_model(path: Path, dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None) -> Any:
    """The original model with other weights in place, eager attention and experts, evaluation mode.

    Args:
        path: The original.
        dtype: To run in.
        weights: By module path; each is rounded once to dtype.

    Raises:
        AttributeError: A weight belongs to no module.
    """
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **eager).eval()
    with torch.no_grad():
        for name, weight in (weights or {}).items():
            matrix(model, name).copy_(weight)
    return model


def matrix(model: Any, name: str) -> Tensor:
    """The weight of a layer, or of one expert where the layer is one's; a view, so writable.

    Raises:
        AttributeError: There is no such layer.
    """
    if experts_of(name) is None:
        return model.get_submodule(name).weight
    refs = {ref.name: ref for ref in expert_refs(model, model, "", lambda name: True, strict=False)}
    return refs[name].view(refs[name].parameter)


@torch.inference_mode()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Logits in float64, [windows, tokens, vocab_size]."""
    parts = [model(input_ids=ids[i : i + 4], use_cache=False).logits.double() for i in range(0, len(ids), 4)]
    return torch.cat(parts)


def dense_weights(layers: list[CodedLayer], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of coded layers by module path."""
    return {layer.name: layer.dequantize(dtype) for layer in layers}


def baseline(path: Path, layers: list[CodedLayer], ids: Tensor, arithmetic: str) -> Tensor:
    """The rounded model's logits when transformers runs it in the tool's arithmetic, float64."""
    block = ACTIVATION_BLOCKS.get(arithmetic)
    dtype = getattr(torch, arithmetic.partition(",")[0]) if not block else torch.float32
    model = load_model(path, dtype, dense_weights(layers))
    if block:
        places = {matrix(model, layer.name).data_ptr() for layer in layers}
        linear = torch.nn.functional.linear

        def rounded(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return linear(_int8_blocks(x, block) if weight.data_ptr() in places else x, weight, bias)

        with mock.patch.object(torch.nn.functional, "linear", rounded):  # experts have no module of their own
            return logits(model, ids)
    if arithmetic == IN_SEQUENCE:
        for layer in layers:
            module = model.get_submodule(layer.name)
            module.forward = lambda x, weight=module.weight: sum_in_sequence(x, weight)
    return logits(model, ids)


def sum_in_sequence(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, the products of each output added in column order in the dtype of x, [..., out_features]."""
    out = x.new_zeros(*x.shape[:-1], len(weight))
    for column in range(x.shape[-1]):
        out += x[..., column, None] * weight[:, column]
    return out


def _int8_blocks(x: Tensor, block: int) -> Tensor:
    """Activations rounded to scale * int8 in blocks of columns, scale = max|x| / 127; a rest keeps blocks of 32."""
    size = block if x.shape[-1] % block == 0 else 32
    grouped = x.unflatten(-1, (-1, size))
    scale = grouped.abs().amax(dim=-1, keepdim=True) / 127
    return torch.where(scale > 0, (grouped / scale).round() * scale, grouped).flatten(-2)


def logit_bound(oracle: Tensor, plain: Tensor, arithmetic: str) -> float:
    """2 (max|plain - oracle| + eps max|oracle|): the house's rule, plain being the reference in the same arithmetic."""
    epsilon = EPSILON.get(arithmetic, EPSILON["float32"])
    return float(2 * ((plain - oracle).abs().max() + epsilon * oracle.abs().max()))


def mean_kl(original: Tensor, candidate: Tensor) -> float:
    """KL(original || candidate), mean over positions, nats."""
    p, q = torch.log_softmax(original.double(), -1), torch.log_softmax(candidate.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def perplexity(found: Tensor, ids: Tensor) -> float:
    """exp of the mean negative log-likelihood of each next token."""
    logs = torch.log_softmax(found[:, : ids.shape[1] - 1].double(), -1)
    return float(logs.gather(-1, ids[:, 1:].unsqueeze(-1)).mean().neg().exp())


def recover_codes(weight: Tensor, grid: Grid) -> Tensor:
    """The code whose value lies nearest to each weight, uint8, [out_features, in_features]."""
    best = torch.zeros(weight.shape, dtype=torch.uint8)
    least = torch.full(weight.shape, torch.inf, dtype=torch.float64)
    for code in range(1 << grid.num_bits):
        value = grid.dequantize(torch.full(weight.shape, code, dtype=torch.uint8), torch.float32).double()
        error = (value - weight.double()).abs()
        nearer = error < least
        best, least = torch.where(nearer, code, best), torch.where(nearer, error, least)
    return best


def compare_weights(layers: list[CodedLayer], found: Mapping[str, Tensor]) -> dict[str, Any]:
    """How a tool's weights agree with what was written.

    Returns:
        `weights`: compared; `codes_equal`: of those, on the written code (or one of the same value);
        `bits_equal`: equal to the grid's value bit for bit, rounded to float32, bfloat16 or float16, whichever agrees
        most; `missing`: layers the tool did not give.
    """
    count = codes_equal = 0
    exact = {"float32": 0, "bfloat16": 0, "float16": 0}
    for layer in layers:
        weight = found.get(layer.name)
        if weight is None:
            continue
        count += weight.numel()
        value = layer.dequantize(torch.float32)
        again = layer.grid.dequantize(recover_codes(weight, layer.grid), torch.float32)
        codes_equal += int((again == value).sum())
        for name in exact:
            exact[name] += int((layer.dequantize(getattr(torch, name)).float() == weight).sum())
    best = max(exact, key=lambda name: exact[name])
    return {
        "weights": count,
        "codes_equal": codes_equal,
        "bits_equal": exact[best],
        "bits_equal_as": best,
        "missing": [layer.name for layer in layers if layer.name not in found],
    }
