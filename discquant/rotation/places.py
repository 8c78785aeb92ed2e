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

# Model types whose blocks are of that form; the value is what their norms add to the stored weight.
FAMILIES = {
    "llama": 0.0, "mistral": 0.0, "mixtral": 0.0, "qwen2": 0.0, "qwen2_moe": 0.0, "qwen3": 0.0, "qwen3_moe": 0.0,
    "phi3": 0.0, "granite": 0.0, "smollm3": 0.0, "olmoe": 0.0, "gemma": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """What a rotation does to one tensor.

    Attributes:
        columns: Space of its input features (of an embedding's entries): turned along the last dimension.
        rows: Space of its output features (a bias has these alone): turned along the first dimension.
        norm: Name of the norm whose weight moves into its columns; None if there is none.
        neutral: It is such a norm, and no longer changes anything.
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
# Within a block: pattern, columns, rows, norm in front.
_Rule = tuple[str, Space | None, Space | None, str | None]
_RULES: tuple[_Rule, ...] = (
    (r"self_attn\.[qk]_proj\.weight", "stream", None, _ATTENTION),
    (r"self_attn\.(?:v|qkv)_proj\.weight", "stream", "values", _ATTENTION),
    (r"self_attn\.(?:v|qkv)_proj\.bias", None, "values", None),
    (r"self_attn\.o_proj\.weight", "values", "stream", None),
    (r"self_attn\.o_proj\.bias", None, "stream", None),
    (_EXPERTS + r"(?:(?:gate|up|gate_up)_proj|w1|w3)\.weight", "stream", None, _MLP),
    (r"(?:block_sparse_moe\.gate|mlp\.gate|mlp\.shared_expert_gate)\.weight", "stream", None, _MLP),
    (_EXPERTS + r"(?:down_proj|w2)\.(?:weight|bias)", None, "stream", None),
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


def places(model_type: str, names: Iterable[str]) -> dict[str, Place]:
    """Return the place of every tensor of a checkpoint.

    Args:
        model_type: As config.json states it.
        names: All tensors.

    Raises:
        UnrepresentableError: The model's blocks are not known to be of the form above, or a tensor has no known place.
    """
    if model_type not in FAMILIES:
        raise UnrepresentableError(
            f"rotate: models of type {model_type} are not known to keep their function when rotated; "
            f"known are {', '.join(FAMILIES)}"
        )
    found = {name: _place(name) for name in names}
    unknown = sorted(name for name, place in found.items() if place is None)
    if unknown:
        raise UnrepresentableError(
            f"rotate: {unknown[0]} has no known place in a {model_type} model "
            f"({len(unknown)} such tensors); nothing was written"
        )
    norms = {place.norm for place in found.values() if place is not None and place.norm is not None}
    missing = sorted(norms - found.keys())
    if missing:
        raise UnrepresentableError(f"rotate: {missing[0]} is not in the checkpoint")
    return {name: place for name, place in found.items() if place is not None}
