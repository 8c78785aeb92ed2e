# SPDX-License-Identifier: Apache-2.0
"""What each tensor of a checkpoint has to do with the stream that runs from block to block, by its name.

In a decoder of blocks h <- h + f(norm(h)) with root-mean-square norms, an orthogonal R may stand between h and all who
read or write it: norm(R h) = R norm(h) once the norm's own weight has moved into the matrices behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from discquant.errors import UnrepresentableError

# Which rotation: of the stream between blocks, or of every head's values.
Space = Literal["stream", "values"]
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

# Model types whose blocks are of that form. Gemma's is too, but its engines have no head apart from the embedding.
FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3", "granite", "smollm3", "olmoe",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """What a rotation does to one tensor.

    Attributes:
        columns: Space of its input features (of an embedding's entries): turned along the last dimension.
        rows: Space of its output features (a bias has these alone): turned along the first dimension.
        norm: Name of the norm whose weight moves into its columns; None if there is none.
        neutral: It is such a norm, and becomes 1.
        layer: Number of its block, -1 outside of the blocks.
    """

    columns: Space | None = None
    rows: Space | None = None
    norm: str | None = None
    neutral: bool = False
    layer: int = -1

    @property
    def turns(self) -> bool:
        """Whether a rotation acts on it."""
        return self.columns is not None or self.rows is not None


_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_ATTENTION, _MLP = "input_layernorm.weight", "post_attention_layernorm.weight"
_EXPERTS = r"(?:block_sparse_moe\.experts\.\d+\.|mlp\.experts\.\d+\.|mlp\.shared_expert\.|mlp\.)"
_READERS = _EXPERTS + r"(?:(?:gate|up|gate_up)_proj|w1|w3)\.weight"
_WRITERS = _EXPERTS + r"(?:down_proj|w2)\.weight"
# Within a block: pattern, columns, rows, norm in front.
_Rule = tuple[str, Space | None, Space | None, str | None]
_RULES: tuple[_Rule, ...] = (
    (r"self_attn\.[qk]_proj\.weight", "stream", None, _ATTENTION),
    (r"self_attn\.(?:v|qkv)_proj\.weight", "stream", "values", _ATTENTION),
    (r"self_attn\.(?:v|qkv)_proj\.bias", None, "values", None),
    (r"self_attn\.o_proj\.weight", "values", "stream", None),
    (r"self_attn\.o_proj\.bias", None, "stream", None),
    (_READERS, "stream", None, _MLP),
    (r"(?:block_sparse_moe\.gate|mlp\.gate|mlp\.shared_expert_gate)\.weight", "stream", None, _MLP),
    (_WRITERS, None, "stream", None),
    (_EXPERTS + r"(?:down_proj|w2)\.bias", None, "stream", None),
    # Queries, keys and what is inside the MLP stay in their own basis.
    (r"self_attn\.[qk]_proj\.bias|self_attn\.[qk]_norm\.weight|self_attn\.rotary_emb\.inv_freq", None, None, None),
    (_EXPERTS + r"(?:gate|up|gate_up)_proj\.bias", None, None, None),
)  # fmt: skip


def _place(name: str) -> Place | None:
    """Place of a tensor, None if its name says nothing to us."""
    outside = {
        EMBEDDING: Place(columns="stream"),
        FINAL_NORM: Place(neutral=True),
        HEAD: Place(columns="stream", norm=FINAL_NORM),
        "lm_head.bias": Place(),
    }
    if name in outside:
        return outside[name]
    found = _LAYER.fullmatch(name)
    if found is None:
        return None
    layer, inner = int(found[1]), found[2]
    if inner in (_ATTENTION, _MLP):
        return Place(neutral=True, layer=layer)
    for pattern, columns, rows, norm in _RULES:
        if re.fullmatch(pattern, inner):
            return Place(columns, rows, None if norm is None else f"model.layers.{layer}.{norm}", layer=layer)
    return None


def check_family(model_type: object) -> None:
    """Refuse models whose blocks are not known to be of the form above.

    Raises:
        UnrepresentableError: They are not.
    """
    if model_type not in FAMILIES:
        raise UnrepresentableError(
            f"rotate: models of type {model_type} are not known to keep their function when rotated; "
            f"known are {', '.join(FAMILIES)}"
        )


def places(names: Iterable[str], layers: int) -> dict[str, Place]:
    """Return the place of every tensor that a rotated model will have.

    Args:
        names: All of them, the head's too where the original shares the embedding's weights.
        layers: Number of blocks.

    Raises:
        UnrepresentableError: A tensor has no known place, or one that the model needs is missing.
    """
    found = {name: _place(name) for name in names}
    unknown = sorted(name for name, place in found.items() if place is None or not -1 <= place.layer < layers)
    if unknown:
        raise UnrepresentableError(
            f"rotate: {unknown[0]} has no known place in this model ({len(unknown)} such tensors)"
        )
    missing = [name for name in (EMBEDDING, FINAL_NORM, HEAD) if name not in found]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        inner = {name.removeprefix(prefix) for name in found if name.startswith(prefix)}
        needed = [_ATTENTION, _MLP, "self_attn.o_proj.weight"]
        if "self_attn.qkv_proj.weight" not in inner:
            needed += [f"self_attn.{part}_proj.weight" for part in "qkv"]
        missing += [prefix + name for name in needed if name not in inner]
        for pattern in (_READERS, _WRITERS):
            if not any(re.fullmatch(pattern, name) for name in inner):
                missing.append(f"{prefix}mlp")
    if missing:
        raise UnrepresentableError(f"rotate: the checkpoint lacks {missing[0]} ({len(missing)} such tensors)")
    return {name: place for name, place in found.items() if place is not None}
