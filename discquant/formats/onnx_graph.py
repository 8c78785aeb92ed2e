# SPDX-License-Identifier: Apache-2.0
"""A Llama-family decoder as a plain ONNX graph: embedding, RMSNorm, rotary attention with shared keys, SwiGLU, head.

Token ids in, float32 logits out, no cache. Weights that are not quantized keep the dtype of the original and are cast
in the graph, which runtimes fold when they load it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from discquant.errors import UnrepresentableError
from discquant.formats.rotary import head_size, rope_factors, rope_kind, rope_of

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
OPSET = 18
# Least version of the file that this opset may be in; runtimes refuse files newer than they are.
IR_VERSION = 9


class GraphBuilder:
    """Nodes in order, each named, and small constants kept in the graph.

    Args:
        linear: Called as linear(builder, module, x) for a linear layer without its bias; returns its output's name.
        stored: Called as stored(name) for a tensor of the original; returns the name of its float32 value.
    """

    def __init__(
        self, linear: Callable[[GraphBuilder, str, str], str], stored: Callable[[GraphBuilder, str], str]
    ) -> None:
        self.linear, self.stored = linear, stored
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def op(self, kind: str, inputs: Sequence[str], name: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output, which has the node's name."""
        from onnx import helper

        self.nodes.append(
            helper.make_node(kind, list(inputs), [name], name=name, domain=domain, **attributes)
        )
        return name

    def constant(self, name: str, values: Tensor) -> str:
        """A small initializer, kept in the graph; the same name is the same value."""
        from onnx import numpy_helper

        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(values.contiguous().numpy(), name)
        return name

    def integers(self, *values: int) -> str:
        """A constant list of int64."""
        return self.constant("int_" + "_".join(map(str, values)), torch.tensor(values, dtype=torch.int64))

    def number(self, value: float) -> str:
        """A constant float32."""
        return self.constant(f"float_{value!r}", torch.tensor(value, dtype=torch.float32))


def check_architecture(config: Mapping[str, Any]) -> None:
    """Refuse what the graph does not compute.

    Raises:
        UnrepresentableError: The message names the entry of config.json.
    """
    named = (config.get("architectures") or [None])[0]
    if named not in ARCHITECTURES:
        raise UnrepresentableError(f"onnx: {named} is not written; these are: {', '.join(ARCHITECTURES)}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnrepresentableError(f"onnx: hidden_act {config['hidden_act']!r} is not written")
    rope = rope_of(config)
    kind = rope_kind(rope)
    if kind not in ("default", "linear", "llama3"):
        raise UnrepresentableError(f"onnx: rotary scaling {kind!r} is not written")
    if config.get("use_sliding_window") or (named == "MistralForCausalLM" and config.get("sliding_window")):
        raise UnrepresentableError("onnx: attention in a sliding window is not written")


def build_decoder(build: GraphBuilder, config: Mapping[str, Any], names: Mapping[str, object]) -> None:
    """Append the whole decoder; its input is `input_ids` [batch, sequence], its output `logits`.

    Args:
        build: Receives the nodes.
        config: config.json.
        names: Tensors of the original, to see which biases and norms there are.
    """
    epsilon = float(config.get("rms_norm_eps", 1e-6))
    x = build.op("Gather", [build.stored(build, "model.embed_tokens.weight"), "input_ids"], "embed")
    _rotation(build, config)
    for layer in range(int(config["num_hidden_layers"])):
        base = f"model.layers.{layer}"
        normed = _norm(build, x, f"{base}.input_layernorm", epsilon)
        attended = _attention(build, normed, f"{base}.self_attn", config, names, epsilon)
        x = build.op("Add", [x, attended], f"{base}/after_attention")
        normed = _norm(build, x, f"{base}.post_attention_layernorm", epsilon)
        gate = _linear(build, normed, f"{base}.mlp.gate_proj", names)
        up = _linear(build, normed, f"{base}.mlp.up_proj", names)
        sigmoid = build.op("Sigmoid", [gate], f"{base}/sigmoid")
        act = build.op("Mul", [build.op("Mul", [gate, sigmoid], f"{base}/silu"), up], f"{base}/gated")
        x = build.op("Add", [x, _linear(build, act, f"{base}.mlp.down_proj", names)], f"{base}/out")
    x = _norm(build, x, "model.norm", epsilon)
    head = _linear(build, x, "lm_head", names)
    build.op("Identity", [head], "logits")


def inverse_frequencies(config: Mapping[str, Any]) -> Tensor:
    """Rotary frequencies, float32, [head_dim / 2]."""
    rope = rope_of(config)
    size = head_size(config)
    powers = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    frequencies = 1.0 / (float(rope.get("rope_theta") or 10000.0) ** powers)
    if rope_kind(rope) == "linear":
        frequencies = frequencies / float(rope["factor"])
    factors = rope_factors(config)
    return frequencies if factors is None else frequencies / factors


def _rotation(build: GraphBuilder, config: Mapping[str, Any]) -> None:
    """`cos` and `sin` [1, 1, sequence, head_dim] and the causal `mask` [sequence, sequence]."""
    from onnx import TensorProto

    length = build.op(
        "Squeeze", [build.op("Shape", ["input_ids"], "length_1", start=1, end=2), build.integers(0)], "length"
    )
    places = build.op(
        "Range",
        [build.constant("zero", torch.tensor(0)), length, build.constant("one", torch.tensor(1))],
        "places",
    )
    floats = build.op("Cast", [places], "places_float", to=TensorProto.FLOAT)
    column = build.op("Unsqueeze", [floats, build.integers(1)], "places_column")
    half = build.op("Mul", [column, build.constant("inv_freq", inverse_frequencies(config))], "angles_half")
    angles = build.op("Concat", [half, half], "angles", axis=-1)
    for kind in ("Cos", "Sin"):
        build.op("Unsqueeze", [build.op(kind, [angles], f"{kind}_flat"), build.integers(0, 1)], kind.lower())
    row = build.op("Unsqueeze", [places, build.integers(0)], "places_row")
    below = build.op("Unsqueeze", [places, build.integers(1)], "places_below")
    future = build.op("Greater", [row, below], "future")
    lowest = float(torch.finfo(torch.float32).min)
    build.op("Where", [future, build.number(lowest), build.number(0.0)], "mask")


def _norm(build: GraphBuilder, x: str, module: str, epsilon: float) -> str:
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last axis."""
    square = build.op("Mul", [x, x], f"{module}/square")
    mean = build.op("ReduceMean", [square, build.integers(-1)], f"{module}/mean", keepdims=1)
    root = build.op(
        "Sqrt", [build.op("Add", [mean, build.number(epsilon)], f"{module}/shifted")], f"{module}/root"
    )
    scaled = build.op("Div", [x, root], f"{module}/scaled")
    return build.op("Mul", [scaled, build.stored(build, f"{module}.weight")], f"{module}/normed")


def _linear(build: GraphBuilder, x: str, module: str, names: Mapping[str, object]) -> str:
    y = build.linear(build, module, x)
    if f"{module}.bias" in names:
        y = build.op("Add", [y, build.stored(build, f"{module}.bias")], f"{module}/biased")
    return y


def _attention(
    build: GraphBuilder,
    x: str,
    base: str,
    config: Mapping[str, Any],
    names: Mapping[str, object],
    epsilon: float,
) -> str:
    """Causal attention; each key head serves num_attention_heads / num_key_value_heads query heads."""
    heads = int(config["num_attention_heads"])
    shared = int(config.get("num_key_value_heads") or heads)
    size = head_size(config)

    def split(kind: str, count: int) -> str:
        flat = _linear(build, x, f"{base}.{kind}_proj", names)
        parted = build.op("Reshape", [flat, build.integers(0, 0, count, size)], f"{base}/{kind}_heads")
        if f"{base}.{kind}_norm.weight" in names:
            parted = _norm(build, parted, f"{base}.{kind}_norm", epsilon)
        return build.op("Transpose", [parted], f"{base}/{kind}", perm=[0, 2, 1, 3])

    def repeat(y: str, kind: str) -> str:
        if shared == heads:
            return y
        # [batch, shared, sequence, size] -> [batch, shared, 1, ..] -> repeated -> [batch, heads, sequence, size]
        wide = build.op("Unsqueeze", [y, build.integers(2)], f"{base}/{kind}_wide")
        many = build.op(
            "Expand", [wide, build.integers(1, 1, heads // shared, 1, 1)], f"{base}/{kind}_repeated"
        )
        return build.op("Reshape", [many, build.integers(0, heads, -1, size)], f"{base}/{kind}_all")

    q = _rotate(build, split("q", heads), f"{base}/q", size)
    k = repeat(_rotate(build, split("k", shared), f"{base}/k", size), "k")
    v = repeat(split("v", shared), "v")
    across = build.op("Transpose", [k], f"{base}/k_across", perm=[0, 1, 3, 2])
    scores = build.op("MatMul", [q, across], f"{base}/products")
    scaled = build.op("Mul", [scores, build.number(size**-0.5)], f"{base}/scores")
    share = build.op(
        "Softmax", [build.op("Add", [scaled, "mask"], f"{base}/masked")], f"{base}/share", axis=-1
    )
    mixed = build.op("MatMul", [share, v], f"{base}/mixed")
    rows = build.op("Transpose", [mixed], f"{base}/rows", perm=[0, 2, 1, 3])
    joined = build.op("Reshape", [rows, build.integers(0, 0, heads * size)], f"{base}/joined")
    return _linear(build, joined, f"{base}.o_proj", names)


def _rotate(build: GraphBuilder, y: str, name: str, size: int) -> str:
    """y cos + (-second half, first half) sin."""
    from onnx import helper

    first, second = f"{name}_first", f"{name}_second"
    build.nodes.append(
        helper.make_node("Split", [y], [first, second], name=f"{name}_halves", axis=-1, num_outputs=2)
    )
    turned = build.op(
        "Concat", [build.op("Neg", [second], f"{name}_minus"), first], f"{name}_turned", axis=-1
    )
    along = build.op("Mul", [y, "cos"], f"{name}_along")
    return build.op("Add", [along, build.op("Mul", [turned, "sin"], f"{name}_aside")], f"{name}_rotated")
