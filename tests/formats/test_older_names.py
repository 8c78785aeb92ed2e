# SPDX-License-Identifier: Apache-2.0
"""What transformers 5 writes to config.json, said once more in the words that mlx-lm and transformers 4 read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from discquant.formats import Checkpoint, CodedLayer
from discquant.formats.older_names import add_older_names
from discquant.formats.registry import by_name
from discquant.grids import UniformGrid

THETA = {"rope_theta": 54321.0}
PLAIN = {"rope_type": "default", **THETA}
LINEAR = {"rope_type": "linear", "factor": 4.0, **THETA}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, **THETA,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 128, **THETA,
}  # fmt: skip
SLIDING = {"rope_type": "default", "rope_theta": 777.0}
LAYERS = ["sliding_attention", "full_attention"] * 2


def scaling(kind: str, **entries: Any) -> dict[str, Any]:
    """As transformers 4 stored it, by both names of its kind."""
    return {"rope_scaling": {"rope_type": kind, "type": kind, **entries}}


CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    *((kind, PLAIN, {}, THETA) for kind in "llama mistral qwen2 qwen3 gemma gemma2 cohere granite".split()),
    ("llama", LINEAR, {}, {**THETA, **scaling("linear", factor=4.0)}),
    ("llama", LLAMA3, {}, {**THETA, **scaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                               original_max_position_embeddings=32)}),
    ("qwen3", YARN, {}, {**THETA, **scaling("yarn", factor=4.0, original_max_position_embeddings=64)}),
    ("mixtral", PLAIN, {"num_local_experts": 6}, THETA),
    ("qwen3_moe", PLAIN, {"num_experts": 6}, {**THETA, "num_experts": 6}),
    ("phi3", {**PLAIN, "partial_rotary_factor": 0.5}, {}, {**THETA, "partial_rotary_factor": 0.5}),
    ("phi3", LONG, {"original_max_position_embeddings": 128},
     {**THETA, "partial_rotary_factor": 1.0,
      "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}}),
    ("gpt_neox", {**PLAIN, "partial_rotary_factor": 0.5}, {}, {"rotary_emb_base": 54321.0, "rotary_pct": 0.5}),
    ("gemma3_text", {"full_attention": PLAIN, "sliding_attention": SLIDING}, {"layer_types": LAYERS},
     {**THETA, "rope_local_base_freq": 777.0, "sliding_window_pattern": 2}),
    ("gemma3_text", {"full_attention": LINEAR, "sliding_attention": SLIDING}, {"layer_types": LAYERS},
     {**THETA, "rope_local_base_freq": 777.0, "sliding_window_pattern": 2, **scaling("linear", factor=4.0)}),
    ("olmo3", {"full_attention": YARN, "sliding_attention": PLAIN}, {"layer_types": LAYERS},
     {**THETA, **scaling("yarn", factor=4.0, original_max_position_embeddings=64)}),
    ("cohere2", PLAIN, {"layer_types": LAYERS}, {**THETA, "sliding_window_pattern": 2}),
]  # fmt: skip


def saved(kind: str, rope: dict[str, Any], more: dict[str, Any], folder: Path) -> dict[str, Any]:
    """config.json of a small model as transformers writes it."""
    from transformers import AutoConfig

    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
    }  # fmt: skip
    made = AutoConfig.for_model(kind, **sizes, rope_parameters=copy.deepcopy(rope), **more)
    made.save_pretrained(folder)
    return dict(json.loads((folder / "config.json").read_text()))


def loaded(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What transformers makes of a config.json."""
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(config))
    return {**AutoConfig.from_pretrained(folder).to_dict(), "_name_or_path": ""}


@pytest.mark.parametrize(("kind", "rope", "more", "expected"), CASES)
def test_both_names(
    kind: str, rope: dict[str, Any], more: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    before = saved(kind, rope, more, tmp_path)
    config = copy.deepcopy(before)
    add_older_names(config)
    assert {name: config.get(name) for name in expected} == expected
    assert {name: config[name] for name in before} == before
    assert config.keys() <= before.keys() | expected.keys() | {"torch_dtype"}
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    # Read by transformers 5 the two are one, but for second names that none of its models asks for.
    one, two = loaded(before, tmp_path), loaded(config, tmp_path)
    for name in ("partial_rotary_factor", "sliding_window_pattern"):
        two.pop(name, None)
        one.pop(name, None)
    for part in (two["rope_parameters"], two["rope_parameters"].get("full_attention", {})):
        part.pop("type", None)
    assert one == two


def test_models_of_several_parts(tmp_path: Path) -> None:
    rope = {"full_attention": LINEAR, "sliding_attention": SLIDING}
    text = saved("gemma3_text", rope, {"layer_types": LAYERS}, tmp_path)
    config = {"model_type": "gemma3", "text_config": text}
    add_older_names(config)
    assert set(config) == {"model_type", "text_config"}
    assert text["rope_theta"] == 54321.0 and text["rope_local_base_freq"] == 777.0
    assert text["rope_scaling"]["factor"] == 4.0


@pytest.mark.parametrize(
    "config",
    [
        # Of transformers 4 already, or of another theta, which a scaling beside it would bring to bear.
        {"model_type": "llama", "rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"model_type": "llama", "rope_theta": 5.0, "rope_parameters": LINEAR},
        # Rotations that the older words cannot hold, or in no model that they were made for.
        {
            "model_type": "gemma3_text",
            "rope_parameters": {"full_attention": PLAIN, "sliding_attention": LINEAR},
        },
        {"model_type": "olmo3", "rope_parameters": {"full_attention": PLAIN, "sliding_attention": SLIDING}},
        {
            "model_type": "gemma4_text",
            "rope_parameters": {"full_attention": PLAIN, "sliding_attention": SLIDING},
        },
        {"model_type": "cohere2", "layer_types": [*LAYERS, *LAYERS[:1], *LAYERS]},
        {"model_type": "gpt2", "rope_parameters": None, "text_config": None},
    ],
)
def test_nothing_to_say(config: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    add_older_names(config)
    assert config == before


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "gptq-v2", "awq", "autoround", "mlx"])
def test_every_folder_has_both_names(name: str, make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """The Llama that mlx-lm would turn by its default theta."""
    path = make_llama(tmp_path / "model", rope_parameters=copy.deepcopy(LLAMA3))
    source, module = Checkpoint(path), "model.layers.0.mlp.up_proj"
    assert "rope_theta" not in source.config()
    rows, columns = source.tensors[f"{module}.weight"].shape
    grid = UniformGrid(4, 32, True, torch.ones(rows, columns // 32).bfloat16())
    layers = [CodedLayer(module, torch.ones(rows, columns, dtype=torch.uint8), grid)]
    by_name(name).write(source, tmp_path / "out", layers, prove_from=lambda: layers)
    config = Checkpoint(tmp_path / "out").config()
    assert config["rope_theta"] == 54321.0 and config["rope_parameters"] == LLAMA3
    assert config["rope_scaling"]["type"] == "llama3" and config["rope_scaling"]["factor"] == 8.0
