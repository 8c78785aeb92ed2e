# SPDX-License-Identifier: Apache-2.0
"""discquant.load of what a file names otherwise than the model: experts one by one, renamed tensors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import discquant
from discquant import _extension
from discquant.errors import CheckpointError
from discquant.formats import QuantizedLinear, export_compressed_tensors, load_experts
from discquant.formats.checkpoint import Checkpoint
from discquant.integrations.transformers_quantizer import register, unregister
from discquant.modules import PackedExperts, PackedLinear

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not _extension.available(), reason="discquant._C is not built")
IDS = torch.arange(40).reshape(2, 20) * 7 % 96
Coded = Callable[..., QuantizedLinear]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def model_of(kind: str) -> Any:
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    elif kind == "qwen2":
        config = transformers.Qwen2MoeConfig(**SIZES, **ROUTED, shared_expert_intermediate_size=32)
    elif kind == "neox":
        sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
        config = transformers.GPTNeoXConfig(**sizes)
    else:
        config = transformers.DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
            moe_intermediate_size=32, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
            qk_nope_head_dim=16, v_head_dim=16,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def layer_names(source: Path) -> list[str]:
    """Matrices of a checkpoint that quantizers round."""
    apart = ("embed", "lm_head", "gate", "router", "shared_expert_gate")
    return [
        name.removesuffix(".weight")
        for name, info in Checkpoint(source).tensors.items()
        if len(info.shape) == 2 and not any(word == name.split(".")[-2] or "embed" in name for word in apart)
    ]


def export(
    folder: Path, model: Any, coded: Coded, bits: Callable[[str], int | None] = lambda name: 4
) -> Path:
    """The model with its matrices at as many bits as `bits` says of their names in the file, None being plain."""
    model.save_pretrained(folder / "source")
    source = Checkpoint(folder / "source")
    layers = [
        coded(name, source.read(f"{name}.weight"), width)
        for name in layer_names(folder / "source")
        if (width := bits(name)) is not None
    ]
    export_compressed_tensors(folder / "source", folder / "out", layers)
    return folder / "out"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2", "deepseek"])
def test_experts_stay_packed_and_give_the_rounded_models_bits(
    tmp_path: Path, coded: Coded, kind: str, dtype: torch.dtype
) -> None:
    out = export(tmp_path, model_of(kind).to(dtype), coded)
    plain, packed, fast = (discquant.load(out, mode=mode) for mode in ("plain", "exact", "auto"))
    count = len(layer_names(tmp_path / "source"))
    assert packed.packed_report.layers == fast.packed_report.layers == count
    assert not any(parameter.dim() == 3 for parameter in packed.parameters())
    expected = logits(plain)
    assert torch.equal(logits(packed), expected)
    # 15-bit activations of two blocks; bfloat16 adds its own rounding of every intermediate.
    eps = 2.0**-15 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (logits(fast) - expected).abs().max().item() <= 14 * eps * expected.abs().max().item()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(packed.generate(IDS[:1], **settings), plain.generate(IDS[:1], **settings))


def test_the_bytes_of_packed_experts_are_counted(tmp_path: Path, coded: Coded) -> None:
    model = discquant.load(export(tmp_path, model_of("mixtral").bfloat16(), coded))
    report = model.packed_report
    assert report.replaced_bytes == 2 * 2 * (64 * 64 * 2 + 64 * 32 * 2 + 4 * 3 * 64 * 96)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert report.packed_bytes == sum(module.packed_bytes for module in packed)
    assert len(packed) == 2 * (4 + 4 * 2)  # gate and up of an expert in one


def test_what_kernels_do_not_cover_stays_plain_inside_packed_experts(tmp_path: Path, coded: Coded) -> None:
    """Experts of 8 bits, experts left alone, and a gate on another grid than its up."""
    odd = {"experts.0.": 8, "experts.1.": None, "experts.2.w1": 3}

    def bits(name: str) -> int | None:
        return next((width for part, width in odd.items() if part in name), 4)

    out = export(tmp_path, model_of("mixtral"), coded, bits)
    model = discquant.load(out)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, PackedExperts)
    assert model.packed_report.plain == 2 * (3 + 2) and model.packed_report.layers == 2 * (4 + 1 + 3)
    assert [type(layer) for layer in experts.first] == [nn.Linear, nn.Linear, nn.Linear, PackedLinear]
    assert [type(layer) for layer in experts.down] == [nn.Linear, nn.Linear, PackedLinear, PackedLinear]
    assert torch.equal(logits(model), logits(discquant.load(out, mode="plain")))


@pytest.mark.parametrize("mode", ["exact", "plain"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2", "deepseek"])
def test_from_pretrained_packs_experts_too(tmp_path: Path, coded: Coded, kind: str, mode: str) -> None:
    """With experts of 8 bits and experts left alone among them; in plain mode they stay fused."""
    odd = {"layers.1.": {"experts.0.": 8, "experts.1.": None}}

    def bits(name: str) -> int | None:
        widths = next((widths for part, widths in odd.items() if part in name), {})
        return next((width for part, width in widths.items() if part in name), 4)

    out = export(tmp_path, model_of(kind).bfloat16(), coded, bits)
    register()
    try:
        said = {"quant_method": "compressed-tensors", "mode": mode}
        config = transformers.AutoConfig.from_pretrained(out)
        config.quantization_config = {**config.quantization_config, **said}
        model = transformers.AutoModelForCausalLM.from_pretrained(out, config=config)
    finally:
        unregister()
    packed = [module for module in model.modules() if isinstance(module, PackedExperts)]
    routed = 1 if kind == "deepseek" else 2
    assert len(packed) == (routed if mode == "exact" else 0)
    assert (model.packed_report.layers > 20) == (mode == "exact")
    assert torch.equal(logits(model), logits(discquant.load(out, mode="plain")))


@pytest.mark.parametrize("width", [8, None])
def test_experts_without_a_packed_matrix_stay_as_they_are(
    tmp_path: Path, coded: Coded, width: int | None
) -> None:
    out = export(tmp_path, model_of("mixtral"), coded, lambda name: width if "experts" in name else 4)
    model = discquant.load(out)
    assert model.packed_report.layers == 8
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    assert torch.equal(logits(model), logits(discquant.load(out, mode="plain")))


def test_experts_are_copied_and_pickled_with_their_model(tmp_path: Path, coded: Coded) -> None:
    model = discquant.load(export(tmp_path, model_of("mixtral"), coded))
    expected = logits(model)
    experts = model.model.layers[1].mlp.experts
    rows, chosen, weights = torch.randn(3, 64), torch.tensor([[0, 1], [2, 0], [3, 1]]), torch.rand(3, 2)
    for twin in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(twin(rows, chosen, weights), experts(rows, chosen, weights))
    assert torch.equal(logits(copy.deepcopy(model)), expected)


def test_a_number_that_no_expert_has_gives_nothing(tmp_path: Path, coded: Coded) -> None:
    experts = discquant.load(export(tmp_path, model_of("mixtral"), coded)).model.layers[0].mlp.experts
    rows, weights = torch.randn(2, 64), torch.ones(2, 1)
    one = experts(rows, torch.tensor([[1], [4]]), weights)
    assert torch.equal(one[:1], experts(rows[:1], torch.tensor([[1]]), weights[:1]))
    assert not one[1].any()
    assert experts(rows[:0], torch.empty(0, 1, dtype=torch.int64), weights[:0]).shape == (0, 64)


def test_what_transformers_keeps_in_float32_stays_so(tmp_path: Path, coded: Coded) -> None:
    """The bias by which DeepSeek-V3 chooses experts: in bfloat16 it would choose others."""
    model = model_of("deepseek").bfloat16()
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias = torch.rand(4) / 3
    model = discquant.load(export(tmp_path, model, coded))
    loaded = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert loaded.dtype == torch.float32 and torch.equal(loaded, gate.e_score_correction_bias)


def test_renamed_tensors_find_their_place(tmp_path: Path, coded: Coded) -> None:
    """The head of GPT-NeoX is `embed_out` in its files."""
    out = export(tmp_path, model_of("neox"), coded)
    assert "embed_out.weight" in Checkpoint(out).tensors
    model = discquant.load(out)
    assert model.packed_report.layers == 8
    assert torch.equal(logits(model), logits(discquant.load(out, mode="plain")))


def test_models_with_further_parts_are_packed(tmp_path: Path, coded: Coded) -> None:
    """The decoder of a vision model has other names in its files."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.Gemma3Config(
        text_config={**SIZES, "head_dim": 16}, vision_config=vision, mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration(config).bfloat16().eval()
    out = export(tmp_path, model, coded, lambda name: 4 if name.startswith("language_model.") else None)
    loaded = discquant.load(out)
    assert loaded.packed_report.layers == 14
    assert torch.equal(logits(loaded), logits(discquant.load(out, mode="plain")))


def test_plain_weights_in_place_of_packed_ones_are_told(
    tmp_path: Path, coded: Coded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = export(tmp_path, model_of("mixtral"), coded)
    expected = logits(discquant.load(out, mode="plain"))
    assert not caplog.records
    monkeypatch.setattr(load_experts, "follows_grouped_product", lambda module: False)
    model = discquant.load(out)
    assert not hasattr(model, "packed_report") and torch.equal(logits(model), expected)
    assert "MixtralForCausalLM takes plain weights, not packed ones: model.layers.0" in caplog.text


def test_an_expert_of_another_shape_is_damage(tmp_path: Path, coded: Coded) -> None:
    model = model_of("mixtral")
    out = export(tmp_path, model, coded, lambda name: None if "experts.1" in name else 4)
    config = (out / "config.json").read_text()
    assert '"intermediate_size": 96' in config
    (out / "config.json").write_text(config.replace('"intermediate_size": 96', '"intermediate_size": 80'))
    with pytest.raises(
        CheckpointError, match=r"experts.* has the shape \[(96, 64|64, 96)\].* it \[(80, 64|64, 80)\]"
    ):
        discquant.load(out)
