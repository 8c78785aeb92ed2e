# SPDX-License-Identifier: Apache-2.0
"""What GGUF calls the parts of a decoder, and what it changes about them, family by family.

llama.cpp rotates neighbouring rows of q and k of some families, transformers rows half a head apart: those rows change
places; groups run along a row, so codes and scales move with it. Gemma's norms are stored as the factor that they are,
which transformers computes as 1 + weight. The experts of a layer lie in one tensor of three dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from discquant.errors import CheckpointError, UnrepresentableError

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
_HEAD = {"lm_head": "output"}
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GATED = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_NORMS_AROUND = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_MIXTRAL = {
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.*.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.*.w2": "ffn_down_exps",
    "block_sparse_moe.experts.*.w3": "ffn_up_exps",
}
_QWEN_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.*.gate_proj": "ffn_gate_exps",
    "mlp.experts.*.up_proj": "ffn_up_exps",
    "mlp.experts.*.down_proj": "ffn_down_exps",
}
_PHI3 = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Matrices of which llama.cpp reads a bias: in every family, and in those it runs as Llama.
_BIASED = ("q_proj", "k_proj", "v_proj")
_ALL_BIASED = (*_BIASED, "o_proj", "gate_proj", "up_proj", "down_proj")
_EXPERT = re.compile(r"(?<=\.experts\.)(\d+)(?=\.)")
# Last names of the matrices that are rounded; embeddings and routers are others.
_MATRICES = ("_proj", "lm_head", ".w1", ".w2", ".w3")


@dataclass(frozen=True)
class Family:
    """How GGUF holds the models of one architecture.

    Attributes:
        name: `general.architecture`.
        block: What the file calls the modules of a block; the number of an expert is *.
        permuted: Rows of q and k are in the order of llama.cpp's own rotation.
        shifted: Norms hold 1 more than those of transformers.
        head: The output head may be a matrix of its own; else it is the embedding.
        biased: Last names of the matrices of a block that may have a bias; of another the file would not open.
    """

    name: str
    block: Mapping[str, str]
    permuted: bool = False
    shifted: bool = False
    head: bool = True
    biased: tuple[str, ...] = _BIASED

    @property
    def outer(self) -> dict[str, str]:
        """What the file calls the modules outside the blocks."""
        return {**_OUTER, **(_HEAD if self.head else {})}


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", {**_NORMS, **_ATTENTION, **_GATED, **_MIXTRAL}, permuted=True, biased=_ALL_BIASED),
        Family("qwen2", {**_NORMS, **_ATTENTION, **_GATED}),
        Family("qwen3", {**_NORMS, **_ATTENTION, **_QK_NORMS, **_GATED}),
        Family("qwen3moe", {**_NORMS, **_ATTENTION, **_QK_NORMS, **_QWEN_EXPERTS}),
        Family("gemma", {**_NORMS, **_ATTENTION, **_GATED}, shifted=True, head=False),
        Family("gemma2", {**_NORMS_AROUND, **_ATTENTION, **_GATED}, shifted=True, head=False),
        Family("gemma3", {**_NORMS_AROUND, **_ATTENTION, **_QK_NORMS, **_GATED}, shifted=True),
        Family("phi3", {**_NORMS, **_PHI3}),
        Family("granite", {**_NORMS, **_ATTENTION, **_GATED}, permuted=True, biased=_ALL_BIASED),
        Family(
            "command-r",
            {"input_layernorm": "attn_norm", **_ATTENTION, **_QK_NORMS, **_GATED},
            head=False,
        ),
    )
}
# transformers' class, and the family that llama.cpp runs it as.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "GraniteForCausalLM": "granite",
    "CohereForCausalLM": "command-r",
}


class Place(NamedTuple):
    """Where a tensor of transformers lies in a file: a tensor there, and which matrix of it where it holds experts."""

    tensor: str
    expert: int | None = None


@dataclass(frozen=True)
class Layout:
    """One model in GGUF: its family, and the numbers that decide where rows and experts lie.

    Attributes:
        family: Names and changes.
        query: Query heads.
        key: Key heads.
        experts: Of each layer; 0 where there are none.
    """

    family: Family
    query: int
    key: int
    experts: int = 0

    def place(self, name: str) -> Place:
        """Where a tensor of transformers lies, `.weight` or `.bias` included.

        Raises:
            UnrepresentableError: GGUF has no such tensor in models of this family.
        """
        module, _, kind = name.rpartition(".")
        found, expert = self.family.outer.get(module), None
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        if match:
            number = _EXPERT.search(match[2])
            expert = None if number is None else int(number[0])
            inner = self.family.block.get(_EXPERT.sub("*", match[2]))
            found = None if inner is None else f"blk.{int(match[1])}.{inner}"
        if module == "lm_head" and not self.family.head:
            raise UnrepresentableError(
                f"gguf: llama.cpp takes the embedding for the output head of {self.family.name}, and this model has "
                "a head of its own"
            )
        lone = expert is None or (kind == "weight" and expert < self.experts)
        if found is None or kind not in ("weight", "bias") or not lone:
            raise UnrepresentableError(
                f"gguf: {name} has no place in a GGUF file of this architecture ({self.family.name})"
            )
        if kind == "bias" and found is not None and module.rpartition(".")[2] not in self.family.biased:
            raise UnrepresentableError(f"gguf: llama.cpp has no {name} in models of {self.family.name}")
        return Place(f"{found}.{kind}", expert)

    def original(self, tensor: str) -> str | None:
        """What transformers calls a tensor of the file, the number of an expert as *; None where it has none."""
        module, _, kind = tensor.rpartition(".")
        if kind not in ("weight", "bias"):
            return None
        match = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(.+)", module)
        for ours, theirs in (self.family.block if match else self.family.outer).items():
            if theirs == (match[2] if match else module):
                return f"model.layers.{match[1]}.{ours}.{kind}" if match else f"{ours}.{kind}"
        return None

    def rows(self, module: str, count: int) -> Tensor | None:
        """Where each row of a module's tensor in the file comes from in the original, or None if nothing moves.

        Row h (head size) + 2 i + s of the file is row h (head size) + s (half) + i of the original.

        Raises:
            ValueError: The rows are no whole heads of even size.
        """
        last = module.rpartition(".")[2]
        if not self.family.permuted or last not in ("q_proj", "k_proj"):
            return None
        heads = self.query if last == "q_proj" else self.key
        if heads < 1 or count % (2 * heads):
            raise ValueError(f"{module}: {count} rows are no {heads} heads of even size")
        return torch.arange(count).reshape(heads, 2, count // heads // 2).transpose(1, 2).reshape(-1)

    def shift(self, name: str) -> float:
        """What a tensor of the file holds more than that of transformers."""
        return 1.0 if self.family.shifted and name.endswith("norm.weight") else 0.0


def is_matrix(module: str) -> bool:
    """Whether a module's weight is of those that are rounded, by its name."""
    return module.endswith(_MATRICES)


def in_float32(name: str, dimensions: int) -> bool:
    """Whether llama.cpp wants a tensor in float32: vectors, norms and routers; the widening is exact."""
    return dimensions == 1 or name.endswith(("norm.weight", ".gate.weight"))


def family_of(config: Mapping[str, Any]) -> Family:
    """Family of a config.json.

    Raises:
        UnrepresentableError: Not one of those written.
    """
    listed = config.get("architectures")
    named = listed[0] if isinstance(listed, list) and listed else listed
    found = ARCHITECTURES.get(named) if isinstance(named, str) else None
    if found is None:
        raise UnrepresentableError(
            f"gguf: {named} is not written; these are: {', '.join(ARCHITECTURES)}; "
            "other formats keep the original's architecture"
        )
    return FAMILIES[found]


def layout_of_file(metadata: Mapping[str, Any], path: object) -> Layout:
    """Layout of a GGUF file.

    Raises:
        CheckpointError: The counts are missing or no positive integers.
        NotImplementedError: The architecture is not read.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise NotImplementedError(
            f"{path}: architecture {architecture!r} is not read; these are: {', '.join(FAMILIES)}"[:300]
        )

    def count(key: str, default: int | None, least: int = 1) -> int:
        value = metadata.get(f"{architecture}.{key}", default)
        if type(value) is not int or not least <= value <= 1 << 16:
            raise CheckpointError(f"{path}: metadata {architecture}.{key} is {value!r}"[:300])
        return value

    query = count("attention.head_count", None)
    key = count("attention.head_count_kv", query)
    return Layout(FAMILIES[architecture], query, key, count("expert_count", 0, 0))
