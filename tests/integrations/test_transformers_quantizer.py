# SPDX-License-Identifier: Apache-2.0
"""from_pretrained onto packed layers: the same logits, no plain weight left, and everything undone afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import discquant
from discquant import _extension
from discquant.config import GridConfig
from discquant.errors import CheckpointError, ConfigError
from discquant.formats import registry
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.grids import place_grid
from discquant.integrations.transformers_quantizer import register, unregister
from discquant.modules import PackedLinear

needs_extension = pytest.mark.skipif(
    not _extension.available(), reason="packed layers need the compiled extension"
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-like model: biases on q, k, v."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("qwen")
    config = Qwen2Config(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def _registered() -> Iterator[None]:
    register()
    register()
    yield
    unregister()
    unregister()


def _export(original: Path, out: Path, name: str, grid: GridConfig) -> dict[str, torch.Tensor]:
    """Write nearest codes; return the served weights."""
    checkpoint, layers = Checkpoint(original), []
    for key in checkpoint.tensors:
        if key.endswith("proj.weight"):
            weight = checkpoint.read(key).float()
            laid = place_grid(weight, grid)
            layers.append(CodedLayer(key.removesuffix(".weight"), laid.nearest(weight), laid))
    registry.by_name(name).write(checkpoint, out, layers)
    return {f"{layer.name}.weight": layer.dequantize(torch.bfloat16) for layer in layers}


@needs_extension
@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("compressed-tensors", GridConfig(3, 32, True)),
        ("gptq", GridConfig(4, 32, True)),
        ("compressed-tensors", GridConfig(8, 32, True)),  # no packed kernel: ordinary weights
    ],
)
def test_same_logits_on_packed_layers(original: Path, tmp_path: Path, name: str, grid: GridConfig) -> None:
    from transformers import AutoModelForCausalLM

    weights = _export(original, tmp_path / "out", name, grid)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == (14 if grid.bits in (3, 4) else 0)
    assert not any(parameter.device.type == "meta" for parameter in model.parameters())
    reference = AutoModelForCausalLM.from_pretrained(original)
    reference.load_state_dict(weights, strict=False)
    ids = torch.randint(0, 61, (2, 12))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(ids).logits, reference(ids).logits)  # with gradients on: there are none
    assert model.generate(ids[:1], max_new_tokens=3, do_sample=False).shape == (1, 15)
    with pytest.raises(ValueError, match="serializable"):
        model.save_pretrained(tmp_path / "again")
    with pytest.raises(NotImplementedError, match="save_pretrained: a model on packed layers"):
        model.model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


@needs_extension
@pytest.mark.usefixtures("_registered")
def test_mode_chooses_kernels_or_plain_weights(original: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    _export(original, tmp_path / "out", "compressed-tensors", GridConfig(4, 32, True))
    config = AutoConfig.from_pretrained(tmp_path / "out")
    ids = torch.randint(0, 61, (2, 12))

    def loaded(dtype: torch.dtype, **mode: str) -> tuple[int, torch.Tensor]:
        config.quantization_config = {**stated, **mode}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", config=config, dtype=dtype)
        layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert {layer.mode for layer in layers} <= {mode.get("mode", "exact")}
        return model.packed_report.layers, model(ids).logits

    stated = dict(config.quantization_config)
    layers, expected = loaded(torch.float32)
    assert layers == 14 and loaded(torch.float32, mode="auto")[0] == 14
    layers, logits = loaded(torch.float32, mode="plain")
    assert layers == 0 and torch.equal(logits, expected)
    layers, logits = loaded(torch.float64, mode="a8")  # no kernel computes in it
    assert layers == 0 and logits.dtype == torch.float64
    for mode in ("int8", None):
        with pytest.raises(ConfigError, match=rf"discquant: mode must be one of .* or plain, got {mode!r}"):
            loaded(torch.float32, mode=mode)


_FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
from discquant.integrations.transformers_quantizer import register

register()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    torch.save(model(torch.arange(24).reshape(2, 12)).logits, sys.argv[2])
"""


@pytest.mark.parametrize("name", ["awq", "autoround"])
def test_same_logits_where_the_format_is_first_imported_on_meta(
    original: Path, tmp_path: Path, name: str
) -> None:
    """In a process of its own: modules imported while transformers builds the model must hold real values."""
    _export(original, tmp_path / "out", name, GridConfig(4, 32, False))
    found = tmp_path / "found.pt"
    subprocess.run([sys.executable, "-c", _FRESH, str(tmp_path / "out"), str(found)], check=True)
    reference = discquant.load(tmp_path / "out", torch.float32, mode="plain")
    with torch.no_grad():
        assert torch.equal(torch.load(found), reference(torch.arange(24).reshape(2, 12)).logits)


def test_modules_can_be_imported_on_meta() -> None:
    """Nothing that is made at import may depend on the default device."""
    script = """
import importlib, pkgutil, torch
with torch.device("meta"):
    import discquant
    for found in pkgutil.walk_packages(discquant.__path__, "discquant."):
        if found.name.split(".")[1] in ("formats", "grids", "modules", "ops", "rounding", "solver"):
            module = importlib.import_module(found.name)
            tensors = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
            assert not tensors, (found.name, tensors)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.usefixtures("_registered")
def test_refuses_a_file_of_another_model(original: Path, tmp_path: Path) -> None:
    import json

    from transformers import AutoModelForCausalLM

    _export(original, tmp_path / "out", "compressed-tensors", GridConfig(4, 32, True))
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    fewer = {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1]}
    path.write_text(json.dumps({**config, **fewer}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"layers\.1"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(NotImplementedError, match="device_map"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map={"model": "cpu", "lm_head": "disk"})


def test_register_and_unregister_leave_no_trace() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    before = dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    with pytest.raises(ConfigError, match=r"take_over must be of compressed-tensors, .* got 'foo'"):
        register(take_over=("gptq", "foo"))
    assert (dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)) == before
    register(take_over=())
    assert AUTO_QUANTIZER_MAPPING["gptq"] is before[0]["gptq"]
    assert "discquant" in AUTO_QUANTIZER_MAPPING
    register()
    register()
    assert AUTO_QUANTIZER_MAPPING["gptq"] is AUTO_QUANTIZER_MAPPING["discquant"]
    unregister()
    assert (dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)) == before
