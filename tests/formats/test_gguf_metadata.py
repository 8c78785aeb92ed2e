# SPDX-License-Identifier: Apache-2.0
"""What a GGUF file tells llama.cpp of a model, and what llama.cpp would compute otherwise, which is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from discquant.errors import CheckpointError, UnrepresentableError
from discquant.formats.gguf_metadata import extra_tensors, metadata_warnings, model_metadata

Config = Callable[..., dict[str, Any]]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    "family, wanted",
    [
        (
            "llama",
            {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0, "rope.dimension_count": 32},
        ),
        ("mixtral", {"expert_count": 3, "expert_used_count": 2, "feed_forward_length": 96}),
        ("qwen3moe", {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 32}),
        (
            "gemma2",
            {"attention.sliding_window": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ),
        ("gemma3", {"attention.sliding_window": 8, "rope.freq_base": 1e6, "attention.key_length": 64}),
        ("phi3", {"attention.sliding_window": 0, "rope.dimension_count": 32}),
        (
            "granite",
            {"attention.scale": 0.2, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 2.0},
        ),
        ("command-r", {"attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.0625}),
    ],
)
def test_a_family_is_told_what_it_needs(family: str, wanted: dict[str, Any], family_config: Config) -> None:
    found = model_metadata(family_config(family))
    assert {key: found.get(key) for key in wanted} == wanted
    assert ("attention.layer_norm_rms_epsilon" in found) == (family != "command-r")


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("gemma2", {"query_pre_attn_scalar": 32}, "scales attention by 64"),
        ("gemma2", {"attn_logit_softcapping": None}, "caps the logits"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "one layer in 2"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_act 'gelu'"),
        ("gemma3", {"layer_types": ["sliding_attention"] * 6}, "one layer in 6"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "caps no logits"),
        (
            "gemma3",
            {"num_hidden_layers": 62, "layer_types": None},
            "scales attention by 32 in a model of gemma3 with 62",
        ),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob false"),
        ("qwen3moe", {"mlp_only_layers": [0]}, "layers without experts"),
        ("command-r", {"use_qk_norm": True}, "norms q and k of command-r from 64 layers on"),
        ("command-r", {"num_hidden_layers": 64}, "use_qk_norm is False"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not written"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is not written"),
        ("llama", {"rope_parameters": {"rope_type": "su"}}, "'longrope' is not written"),
        ("llama", {"rope_parameters": {**YARN, "beta_fast": 8.0}}, "YaRN's bounds"),
        ("llama", {"rope_parameters": {**YARN, "truncate": False}}, "YaRN's bounds"),
        ("llama", {"partial_rotary_factor": 0.5}, "rotates whole heads of llama"),
        (
            "qwen2",
            {"head_dim": 64},
            "2 heads of 64; llama.cpp wants those of qwen2 to make up hidden_size 64",
        ),
        ("gemma3", {"layer_types": None, "_sliding_window_pattern": 4}, "one layer in 6"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    family: str, change: dict[str, Any], message: str, family_config: Config
) -> None:
    with pytest.raises(UnrepresentableError, match=message):
        model_metadata({**family_config(family), **change})


@pytest.mark.parametrize(
    "change, refused",
    [
        ({"rope_parameters": None, "rope_local_base_freq": 10000.0, "rope_theta": 1e6}, False),
        ({"rope_parameters": None, "rope_local_base_freq": 20000.0}, True),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 20000.0}}}, True),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "rope_theta": 10000.0}}}, True),
    ],
)
def test_sliding_layers_of_gemma3_rotate_by_ten_thousand(
    change: dict[str, Any], refused: bool, family_config: Config
) -> None:
    stated = {**family_config("gemma3"), **change}
    if refused:
        with pytest.raises(UnrepresentableError, match="sliding layers rotate by 10000"):
            model_metadata(stated)
    else:
        assert model_metadata(stated)["rope.freq_base"] == 1e6


def test_a_scaling_of_the_full_layers_of_gemma3(family_config: Config) -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    found = model_metadata({**family_config("gemma3"), "rope_parameters": rope})
    assert (found["rope.scaling.type"], found["rope.scaling.factor"]) == ("linear", 8.0)


def test_factors_of_a_long_context_are_those_of_transformers(family_config: Config) -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + i / 10 for i in range(12)], "long_factor": [2.0 + i for i in range(12)],
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    stated = family_config(
        "phi3", rope_parameters=rope, partial_rotary_factor=0.75, original_max_position_embeddings=16
    )
    found, tensors = model_metadata(stated), extra_tensors(stated)
    assert found["rope.dimension_count"] == 24 and found["rope.scaling.original_context_length"] == 16
    model = transformers.Phi3Config(**{key: value for key, value in stated.items() if key != "architectures"})
    base = 1.0 / 10000.0 ** (torch.arange(0, 24, 2).float() / 24)
    for length, name in ((64, "long"), (8, "short")):
        theirs, growth = ROPE_INIT_FUNCTIONS["longrope"](model, torch.device("cpu"), seq_len=length)
        torch.testing.assert_close(base / tensors[f"rope_factors_{name}.weight"], theirs)
        assert found["rope.scaling.attn_factor"] == pytest.approx(growth)
    with pytest.raises(CheckpointError, match="long_factor must be 12 numbers"):
        extra_tensors({**stated, "rope_parameters": {**rope, "long_factor": [1.0]}})


def test_a_window_that_llama_cpp_does_not_have_is_told(family_config: Config) -> None:
    assert metadata_warnings({**family_config("phi3"), "sliding_window": 16}) == [
        "llama.cpp attends to all positions; beyond 16 tokens the original does not"
    ]
    for family, change in (
        ("phi3", {"sliding_window": 64}), ("phi3", {"sliding_window": None}), ("gemma2", {}),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}),
    ):  # fmt: skip
        assert metadata_warnings({**family_config(family), **change}) == []


@pytest.mark.parametrize("change", [{}, {"attention_factor": 1.5}, {"mscale": 2.0, "mscale_all_dim": 1.0}])
def test_attention_grows_in_yarn_as_in_transformers(change: dict[str, Any], family_config: Config) -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stated = family_config("llama", rope_parameters={**YARN, **change})
    found = model_metadata(stated)
    model = transformers.LlamaConfig(
        **{key: value for key, value in stated.items() if key != "architectures"}
    )
    _, growth = ROPE_INIT_FUNCTIONS["yarn"](model, torch.device("cpu"))
    assert ("rope.scaling.attn_factor" in found) == bool(change)
    own = 1 + 0.1 * math.log(4.0)  # by which llama.cpp multiplies what it is told
    assert float(found.get("rope.scaling.attn_factor", 1.0)) * own == pytest.approx(growth)


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_earlier_names_of_phi_3_s_scaling(name: str, family_config: Config) -> None:
    rope = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "original_max_position_embeddings": 16}
    wanted, other = (
        {**family_config("phi3"), "rope_parameters": None, "rope_scaling": {**rope, "type": kind}}
        for kind in ("longrope", name)
    )
    assert model_metadata(wanted) == model_metadata(other)
    assert "rope.scaling.attn_factor" in model_metadata(other)
    assert extra_tensors(wanted).keys() == extra_tensors(other).keys() != set()


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2", "gemma3", "phi3", "granite", "command-r"])
def test_what_a_configuration_leaves_out_is_what_transformers_takes(
    family: str, family_config: Config
) -> None:
    stated = family_config(family)
    left_out = ("rope_parameters", "rms_norm_eps", "layer_norm_eps", "logit_scale")
    less = {key: value for key, value in stated.items() if key not in left_out}
    assert model_metadata(less) == model_metadata(stated)


def test_command_r_s_context_is_that_of_its_training(family_config: Config) -> None:
    stated = {**family_config("command-r"), "model_max_length": 131072}
    assert model_metadata(stated)["context_length"] == 131072


def test_qwen_slides_only_where_it_says_so(family_config: Config) -> None:
    stated = {**family_config("qwen2"), "sliding_window": 16}
    del stated["use_sliding_window"]
    assert metadata_warnings(stated) == []


@pytest.mark.parametrize(
    "family, change",
    [
        ("llama", {"rms_norm_eps": "small"}),
        ("llama", {"rms_norm_eps": float("nan")}),
        ("llama", {"max_position_embeddings": 1 << 40}),
        ("llama", {"hidden_size": True}),
        ("llama", {"head_dim": "64"}),
        ("llama", {"head_dim": -1}),
        ("llama", {"rope_scaling": "linear"}),
        ("llama", {"rope_parameters": [1]}),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": None}}),
        ("llama", {"rope_parameters": {"rope_theta": "10000"}}),
        ("llama", {"rope_parameters": {**YARN, "factor": float("inf")}}),
        ("llama", {"rope_parameters": {**YARN, "original_max_position_embeddings": "16"}}),
        ("llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": None}}),
        ("llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}),
        ("phi3", {"partial_rotary_factor": 1 << 70}),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": "x" * 16}}),
        ("gemma2", {"attn_logit_softcapping": "50"}),
        ("gemma2", {"num_hidden_layers": 1 << 30}),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_theta": "x"}}}),
        ("granite", {"logits_scaling": {}}),
        ("command-r", {"logit_scale": [1]}),
        ("command-r", {"layer_norm_eps": 0}),
    ],
)  # fmt: skip
def test_an_entry_that_is_no_number_is_named(
    family: str, change: dict[str, Any], family_config: Config
) -> None:
    stated = {**family_config(family), **change}
    with pytest.raises(CheckpointError, match=r"^config\.json: \w+"):
        model_metadata(stated), extra_tensors(stated)


@pytest.mark.parametrize("named", [None, [], 5, {}, [None], "LlamaForCausalLM!"])
def test_an_architecture_that_is_no_list_is_refused(named: object, family_config: Config) -> None:
    with pytest.raises(UnrepresentableError, match="is not written"):
        model_metadata({**family_config("llama"), "architectures": named})
