# SPDX-License-Identifier: Apache-2.0
"""A model's way into GGUF: names of tensors, order of rows, rotary factors; against gguf and transformers."""

from __future__ import annotations

import pytest
import torch

from discquant.errors import UnrepresentableError
from discquant.formats.gguf_model import Heads, from_gguf, rope_factors, to_gguf

gguf = pytest.importorskip("gguf")


def test_names_are_the_package_s() -> None:
    for architecture in ("LLAMA", "QWEN2", "QWEN3"):
        arch = gguf.MODEL_ARCH[architecture]
        table = gguf.get_tensor_name_map(arch, 3)
        for ours in (
            "model.embed_tokens", "model.norm", "lm_head", "model.layers.2.input_layernorm",
            "model.layers.2.post_attention_layernorm", "model.layers.2.self_attn.q_proj",
            "model.layers.2.self_attn.k_proj", "model.layers.2.self_attn.v_proj", "model.layers.2.self_attn.o_proj",
            "model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj",
        ):  # fmt: skip
            assert to_gguf(f"{ours}.weight") == table.get_name(f"{ours}.weight", try_suffixes=(".weight",))
            assert from_gguf(to_gguf(f"{ours}.weight")) == f"{ours}.weight"
    assert from_gguf("rope_freqs.weight") is None and from_gguf("blk.0.ffn_gate_exps.weight") is None
    with pytest.raises(UnrepresentableError, match="no place"):
        to_gguf("model.layers.0.block_sparse_moe.gate.weight")


def test_rows_of_heads() -> None:
    rows = Heads(4, 2, True).rows("model.layers.0.self_attn.q_proj", 24)
    assert rows is not None and rows[:6].tolist() == [0, 3, 1, 4, 2, 5]
    assert Heads(4, 2, False).rows("model.layers.0.self_attn.q_proj", 24) is None
    assert Heads(4, 2, True).rows("model.layers.0.self_attn.v_proj", 24) is None
    with pytest.raises(ValueError, match="no 4 heads"):
        Heads(4, 2, True).rows("model.layers.0.self_attn.q_proj", 20)


def test_rotary_factors_are_those_of_transformers() -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    ours = rope_factors({"hidden_size": 256, "num_attention_heads": 4, "rope_parameters": rope})
    assert ours is not None
    plain = 1.0 / 500000.0 ** (torch.arange(0, 64, 2).float() / 64)
    torch.testing.assert_close(plain / ours, theirs, rtol=1e-5, atol=0)
    assert rope_factors({"hidden_size": 256, "num_attention_heads": 4, "rope_theta": 10000.0}) is None
