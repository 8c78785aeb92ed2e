# SPDX-License-Identifier: Apache-2.0
"""What GGUF calls the parts of a decoder, and what it changes about them: names, row order, metadata.

Llama-family, Qwen2 and Qwen3. llama.cpp rotates neighbouring rows of q and k of Llama models, transformers rows half a
head apart, so those rows change places; groups run along a row, so codes and scales move with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from discquant.errors import CheckpointError, UnrepresentableError

# transformers architecture -> GGUF architecture, and whether rows of q and k are permuted.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}
PERMUTED = dict(ARCHITECTURES.values())
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER_BACK = {theirs: ours for ours, theirs in _OUTER.items()}
_INNER_BACK = {theirs: ours for ours, theirs in _INNER.items()}
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Heads:
    """What the permutation needs: number of query and of key heads, and whether rows are permuted at all."""

    query: int
    key: int
    permuted: bool

    def rows(self, module: str, count: int) -> Tensor | None:
        """Where each row of a module's tensor in the file comes from in the original, or None if nothing moves.

        Row h (head size) + 2 i + s of the file is row h (head size) + s (half) + i of the original.

        Raises:
            ValueError: The rows are no whole heads of even size.
        """
        last = module.rpartition(".")[2]
        if not self.permuted or last not in ("q_proj", "k_proj"):
            return None
        heads = self.query if last == "q_proj" else self.key
        if heads < 1 or count % (2 * heads):
            raise ValueError(f"{module}: {count} rows are no {heads} heads of even size")
        return torch.arange(count).reshape(heads, 2, count // heads // 2).transpose(1, 2).reshape(-1)


def to_gguf(name: str) -> str:
    """GGUF's name of a tensor of transformers, `.weight` or `.bias` included.

    Raises:
        UnrepresentableError: GGUF has no such tensor in the models that are written.
    """
    module, _, kind = name.rpartition(".")
    found = _OUTER.get(module)
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if match and match[2] in _INNER:
        found = f"blk.{int(match[1])}.{_INNER[match[2]]}"
    if found is None or kind not in ("weight", "bias"):
        raise UnrepresentableError(f"gguf: {name} has no place in a GGUF file of this architecture")
    return f"{found}.{kind}"


def from_gguf(name: str) -> str | None:
    """Undo `to_gguf`; None for tensors that transformers does not have, such as rope_freqs."""
    module, _, kind = name.rpartition(".")
    match = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(.+)", module)
    if kind not in ("weight", "bias"):
        return None
    if match and match[2] in _INNER_BACK:
        return f"model.layers.{match[1]}.{_INNER_BACK[match[2]]}.{kind}"
    return f"{_OUTER_BACK[module]}.{kind}" if module in _OUTER_BACK else None


def architecture_of(config: Mapping[str, Any]) -> tuple[str, bool]:
    """GGUF architecture of a config.json, and whether its q and k rows are permuted.

    Raises:
        UnrepresentableError: Not one of those written.
    """
    named = (config.get("architectures") or [None])[0]
    found = ARCHITECTURES.get(named) if isinstance(named, str) else None
    if found is None:
        raise UnrepresentableError(
            f"gguf: {named} is not written; these are: {', '.join(ARCHITECTURES)}; "
            "other formats keep the original's architecture"
        )
    return found


def model_metadata(config: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Metadata that llama.cpp needs to build the model; keys without the architecture's prefix.

    Raises:
        UnrepresentableError: The configuration wants something that is not written (a scaling of the rotation, say).
        CheckpointError: An entry is missing or no number.
    """
    architecture_of(config)
    heads = _integer(config, "num_attention_heads")
    hidden = _integer(config, "hidden_size")
    head_dim = config.get("head_dim") or hidden // heads
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnrepresentableError(
            f"gguf: hidden_act {config['hidden_act']!r} is not what llama.cpp computes"
        )
    found: dict[str, int | float | str] = {
        "context_length": _integer(config, "max_position_embeddings"),
        "embedding_length": hidden,
        "block_count": _integer(config, "num_hidden_layers"),
        "feed_forward_length": _integer(config, "intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": _integer(config, "num_key_value_heads", heads),
        "attention.key_length": int(head_dim),
        "attention.value_length": int(head_dim),
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "rope.dimension_count": int(head_dim),
        "vocab_size": _integer(config, "vocab_size"),
    }
    rope = rope_of(config)
    found["rope.freq_base"] = float(rope.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(original),
        }
    elif kind not in ("default", "llama3"):
        raise UnrepresentableError(f"gguf: rotary scaling {kind!r} is not written")
    return found


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, wherever the version of transformers that wrote the file put them."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    if "rope_theta" in config:
        rope.setdefault("rope_theta", config["rope_theta"])
    return rope


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """Divisors of the rotary frequencies of Llama 3.1 models, float32, [head_dim / 2]; None for other models.

    Wavelengths above the original context over low_freq_factor are divided by `factor`, those below it over
    high_freq_factor are kept, and between the two the frequency is interpolated.
    """
    rope = rope_of(config)
    if (rope.get("rope_type") or rope.get("type")) != "llama3":
        return None
    head_dim = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    powers = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelength = 2 * math.pi * float(rope.get("rope_theta") or 10000.0) ** powers
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def heads_of_file(metadata: Mapping[str, Any], path: object) -> Heads:
    """Heads of a GGUF file.

    Raises:
        CheckpointError: The counts are missing or no positive integers.
        NotImplementedError: The architecture is not read.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in PERMUTED:
        raise NotImplementedError(
            f"{path}: architecture {architecture!r} is not read; these are: {', '.join(PERMUTED)}"[:300]
        )
    counts: list[int] = []
    for key in ("head_count", "head_count_kv"):
        value = metadata.get(f"{architecture}.attention.{key}", counts[0] if counts else None)
        if type(value) is not int or not 1 <= value <= 1 << 16:
            raise CheckpointError(f"{path}: metadata {architecture}.attention.{key} is {value!r}"[:300])
        counts.append(value)
    return Heads(counts[0], counts[1], PERMUTED[architecture])


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise CheckpointError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value
