# SPDX-License-Identifier: Apache-2.0
"""A model's way into GGUF: names of tensors, order of rows, rotary factors; against gguf and transformers."""

from __future__ import annotations

import pytest
import torch

from discquant.errors import UnrepresentableError
from discquant.formats.gguf_model import FAMILIES, Layout
from discquant.formats.rotary import rope_factors

gguf = pytest.importorskip("gguf")


LLAMA = Layout(FAMILIES["llama"], 4, 2, experts=8)
QWEN2 = Layout(FAMILIES["qwen2"], 4, 2)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_names_are_the_package_s(name: str) -> None:
    """Experts: the package names the tensor that holds all of a layer by the name of one without its number."""
    layout = Layout(FAMILIES[name], 4, 2, experts=8)
    arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    table = gguf.get_tensor_name_map(arch, 3)
    modules = [*layout.family.outer, *(f"model.layers.2.{inner}" for inner in layout.family.block)]
    for module in modules:
        ours = f"{module.replace('*', '5')}.weight"
        joined = module.replace(".*", "").replace(
            "model.layers.2.block_sparse_moe.experts", "layers.2.feed_forward.experts"
        )
        place = layout.place(ours)
        assert place.tensor == table.get_name(f"{joined}.weight", try_suffixes=(".weight",))
        assert place.expert == (5 if "*" in module else None)
        assert layout.original(place.tensor) == f"{module}.weight"
    assert layout.original("rope_freqs.weight") is None


def test_what_a_family_does_not_have_has_no_place() -> None:
    assert QWEN2.original("blk.0.ffn_gate_exps.weight") is None
    for layout, name in (
        (QWEN2, "model.layers.0.block_sparse_moe.gate.weight"),
        (LLAMA, "model.layers.0.block_sparse_moe.experts.8.w1.weight"),
        (LLAMA, "model.layers.0.block_sparse_moe.experts.1.w1.bias"),
        (LLAMA, "model.layers.0.self_attn.q_norm.weight"),
    ):
        with pytest.raises(UnrepresentableError, match="no place"):
            layout.place(name)


def test_a_head_of_its_own_where_the_engine_takes_the_embedding() -> None:
    with pytest.raises(UnrepresentableError, match="embedding for the output head of gemma2"):
        Layout(FAMILIES["gemma2"], 4, 2).place("lm_head.weight")


def test_biases_are_those_that_llama_cpp_reads() -> None:
    assert LLAMA.place("model.layers.0.self_attn.o_proj.bias").tensor == "blk.0.attn_output.bias"
    for name in FAMILIES:
        layout = Layout(FAMILIES[name], 4, 2)
        if name != "phi3":
            assert layout.place("model.layers.0.self_attn.q_proj.bias").tensor == "blk.0.attn_q.bias"
        if name not in ("llama", "granite"):
            with pytest.raises(
                UnrepresentableError, match=r"has no model\.layers\.0\.self_attn\.o_proj\.bias"
            ):
                layout.place("model.layers.0.self_attn.o_proj.bias")
        with pytest.raises(UnrepresentableError, match=r"has no model\.norm\.bias"):
            layout.place("model.norm.bias")


def test_rows_of_heads() -> None:
    rows = LLAMA.rows("model.layers.0.self_attn.q_proj", 24)
    assert rows is not None and rows[:6].tolist() == [0, 3, 1, 4, 2, 5]
    assert QWEN2.rows("model.layers.0.self_attn.q_proj", 24) is None
    assert LLAMA.rows("model.layers.0.self_attn.v_proj", 24) is None
    with pytest.raises(ValueError, match="no 4 heads"):
        LLAMA.rows("model.layers.0.self_attn.q_proj", 20)


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
