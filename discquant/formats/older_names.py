# SPDX-License-Identifier: Apache-2.0
"""config.json in the words of transformers 5 and of 4: what only the newer words say, an older reader takes by default.

Most models of mlx-lm 0.32.2 ask for the older ones, and so does what runs on transformers 4 (earlier releases of vLLM
and SGLang among it): they go on with another rotation, or another number of experts, mostly without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The two rotations of models that have one per kind of layer: names of theta in full attention and in sliding windows.
_BY_LAYER = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "olmo3": ("rope_theta", "rope_theta"),
}
# Names of theta and of the rotated share of a head.
_FLAT = dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct"))
_PERIODIC = ("gemma3_text", "cohere2")
_EXPERTS = ("qwen3_moe", "qwen3_vl_moe_text")
# In `rope_scaling` of transformers 4 these have a place of their own.
_OUTSIDE = ("rope_theta", "partial_rotary_factor", "rope_type", "type")


def add_older_names(config: dict[str, Any]) -> None:
    """Say in the older words too what a config.json says in the newer ones; nothing is changed or taken away.

    transformers 5 reads the result as it read the original (beside a second name of the rotation's kind).

    Args:
        config: config.json; changed in place, as is its `text_config`.
    """
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            for name, value in _older(section).items():
                if section.get(name) is None:
                    section[name] = value


def _older(config: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of the older names."""
    kind, found = config.get("model_type"), _rotation(config)
    if isinstance(config.get("dtype"), str):
        found["torch_dtype"] = config["dtype"]  # before transformers 4.56
    if kind in _EXPERTS and "num_local_experts" in config:
        found["num_experts"] = config["num_local_experts"]
    period = _period(config.get("layer_types")) if kind in _PERIODIC else None
    if period is not None:
        found["sliding_window_pattern"] = period
    return found


def _rotation(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and the like; empty where they cannot hold what `rope_parameters` says."""
    rope, kind = config.get("rope_parameters"), str(config.get("model_type"))
    if not isinstance(rope, dict):
        return {}
    found: dict[str, Any] = {}
    if any(isinstance(value, dict) for value in rope.values()):
        full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
        if kind not in _BY_LAYER or not isinstance(full, dict) or not isinstance(sliding, dict):
            return {}
        names, thetas = _BY_LAYER[kind], [part.get("rope_theta") for part in (full, sliding)]
        # Windows have one number of their own, and no scaling.
        if _scaling(sliding, kind) or (names[0] == names[1] and thetas[0] != thetas[1]):
            return {}
        found, rope = dict(zip(names, thetas, strict=True)), full
    else:
        theta, share = _FLAT.get(kind, ("rope_theta", "partial_rotary_factor"))
        found = {theta: rope.get("rope_theta"), share: rope.get("partial_rotary_factor")}
    found["rope_scaling"] = _scaling(rope, kind)
    stated = {name: value for name, value in found.items() if value is not None}
    # transformers 5 prefers a scaling from outside, theta with it: beside another theta it would no longer read ours.
    other = any(config.get(name) not in (None, value) for name, value in stated.items())
    return {} if other else stated


def _scaling(rope: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """`rope_scaling` of one rotation; None where there is none to state."""
    named = rope.get("rope_type") or rope.get("type") or "default"
    rest = {name: value for name, value in rope.items() if name not in _OUTSIDE}
    if kind == "phi3":
        # Its class takes three entries and no other, and its original length from outside.
        rest.pop("original_max_position_embeddings", None)
        return {"type": named, **rest} if set(rest) == {"short_factor", "long_factor"} else None
    if named == "default" and not rest:
        return None
    return {"rope_type": named, "type": named, **rest}


def _period(layer_types: object) -> int | None:
    """p where every p-th layer attends to everything and all others to a window; None where no p is right."""
    if not isinstance(layer_types, list) or "full_attention" not in layer_types:
        return None
    period = layer_types.index("full_attention") + 1
    regular = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(len(layer_types))]
    return period if layer_types == regular else None
