# SPDX-License-Identifier: Apache-2.0
"""Tiny random models on disk, and codes on grids for their linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from discquant.formats import Checkpoint, QuantizedLinear, export_compressed_tensors

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build_llama(path: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """Save a random Llama of two blocks with biases in attention, and a tokenizer file to be carried along."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "attention_bias": True,
        "tie_word_embeddings": False,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(sizes | options))).to(dtype)
    # Fresh weights are so small that logits hardly differ, and biases are zero: make both matter.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif parameter.dim() == 2:
                parameter.mul_(8)
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (path / "README.md").write_text("the card of the original model\n")
    return path


def grid_layer(
    name: str, weight: torch.Tensor, num_bits: int, group_size: int, symmetric: bool
) -> QuantizedLinear:
    """Round to nearest on a plain abs-max or min-max grid with bfloat16 scales."""
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = weight.float().reshape(rows, columns // size, size)
    top = (1 << num_bits) - 1
    if symmetric:
        scale = (groups.abs().amax(-1) * 2 / top).clamp(min=2.0**-17).bfloat16().float()
        zero, center = None, torch.full_like(scale, 1 << (num_bits - 1))
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / top).clamp(min=2.0**-17).bfloat16().float()
        center = (-low / scale).round().clamp(0, top)
        zero = center.to(torch.uint8)
    q = (groups / scale[..., None] + center[..., None]).round().clamp(0, top).to(torch.uint8)
    return QuantizedLinear(name, q.reshape(rows, columns), scale, zero, num_bits, group_size)


def grid_layers(path: Path, num_bits: int, group_size: int, symmetric: bool) -> Iterator[QuantizedLinear]:
    """Every linear layer inside the blocks, one at a time."""
    checkpoint = Checkpoint(path)
    for key in sorted(checkpoint.tensors):
        name = key.removesuffix(".weight")
        if key != name and name.rpartition(".")[2] in LINEAR:
            yield grid_layer(name, checkpoint.read(key), num_bits, group_size, symmetric)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bfloat16 Llama with an untied head."""
    return build_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Path]:
    """build_llama, for other shapes and dtypes."""
    return build_llama


@pytest.fixture(scope="session")
def make_layers() -> Callable[..., Iterator[QuantizedLinear]]:
    """grid_layers."""
    return grid_layers


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., QuantizedLinear]:
    """grid_layer."""
    return grid_layer


@pytest.fixture(scope="session")
def exported(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama at 3 bits, symmetric, groups of 32. Tests that change it copy it first."""
    out = tmp_path_factory.mktemp("exported") / "out"
    export_compressed_tensors(llama_dir, out, grid_layers(llama_dir, 3, 32, True), recipe={"seed": 5})
    return out


FAMILY_COMMON: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8}
# Class of the configuration without "Config", and what differs from FAMILY_COMMON.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
    "qwen3moe": (
        "Qwen3Moe",
        {
            "head_dim": 64,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "gemma": ("Gemma", {"head_dim": 64}),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3": ("Gemma3Text", {**_GEMMA, "num_hidden_layers": 6}),
    "phi3": ("Phi3", {}),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "command-r": ("Cohere", {}),
}


def family_settings(name: str, **config: Any) -> Any:
    """Return the configuration of a small model of a family that GGUF is written for."""
    import transformers

    family, extra = FAMILIES[name]
    return getattr(transformers, f"{family}Config")(**{**FAMILY_COMMON, **extra, **config})


@pytest.fixture
def family_config() -> Callable[..., dict[str, Any]]:
    """Return what makes the configuration of a small model of a family, as config.json has it."""

    def make(name: str, **config: Any) -> dict[str, Any]:
        kind = FAMILIES[name][0].removesuffix("Text")
        return {**family_settings(name, **config).to_dict(), "architectures": [f"{kind}ForCausalLM"]}

    return make


@pytest.fixture
def make_family() -> Callable[..., Path]:
    """Return what saves a random bfloat16 model of a family, without a tokenizer, and gives its folder."""
    import transformers

    def make(name: str, folder: Path, **config: Any) -> Path:
        torch.manual_seed(3)
        kind = FAMILIES[name][0].removesuffix("Text")
        model = getattr(transformers, f"{kind}ForCausalLM")(family_settings(name, **config)).to(
            torch.bfloat16
        )
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith(("norm.weight", "bias")):
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder)
        return folder

    return make
