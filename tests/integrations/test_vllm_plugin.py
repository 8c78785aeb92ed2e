# SPDX-License-Identifier: Apache-2.0
"""The vLLM plug-in against stand-ins with vLLM's names; that vLLM itself takes it is for a machine that has vLLM."""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from discquant import _extension
from discquant.config import GridConfig
from discquant.formats.codes import QuantizedLinear
from discquant.formats.compressed_tensors import encode, quantization_config
from discquant.formats.scheme import Scheme
from discquant.grids import place_uniform
from discquant.integrations import vllm_plugin

METHODS: dict[str, type] = {}


class _Parameter(nn.Parameter):
    def __new__(cls, data: Tensor, **facts: Any) -> _Parameter:
        made: _Parameter = torch.Tensor._make_subclass(cls, data, False)
        made.facts = facts
        return made

    facts: dict[str, Any]

    def __init__(self, data: Tensor, **facts: Any) -> None:
        pass


class _LinearBase(nn.Module):
    pass


def _register(name: str) -> Any:
    def take(cls: type) -> type:
        assert name not in METHODS, "registered twice"
        METHODS[name] = cls
        return cls

    return take


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    base = "vllm.model_executor"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        base: {},
        f"{base}.layers": {},
        f"{base}.layers.linear": {
            "LinearBase": _LinearBase,
            "LinearMethodBase": object,
            "UnquantizedLinearMethod": type("UnquantizedLinearMethod", (), {}),
            "register_weight_loader_v2_supported_method": lambda cls: cls,
        },
        f"{base}.layers.quantization": {"register_quantization_config": _register},
        f"{base}.layers.quantization.base_config": {"QuantizationConfig": object},
        f"{base}.parameter": dict.fromkeys(
            (
                "BasevLLMParameter",
                "ChannelQuantScaleParameter",
                "GroupQuantScaleParameter",
                "PackedvLLMParameter",
            ),
            _Parameter,
        ),
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    METHODS.clear()
    monkeypatch.setattr(vllm_plugin, "_registered", [])


def test_entry_point_and_import_without_vllm() -> None:
    assert "vllm" not in sys.modules
    found = [
        point
        for point in importlib.metadata.entry_points(group="vllm.general_plugins")
        if point.name == "discquant"
    ]
    # An installation made before the entry point existed has none; one that has it must lead here.
    for point in found:
        assert point.load() is vllm_plugin.register
    with pytest.raises(ImportError, match="vllm"):
        vllm_plugin.register()


def _layer(grid_config: GridConfig) -> tuple[QuantizedLinear, dict[str, Tensor], dict[str, Any]]:
    weight = torch.randn(96, 128) * 0.05
    grid = place_uniform(weight, grid_config)
    layer = QuantizedLinear(
        "l", grid.nearest(weight), grid.scale, grid.zero_point, grid.num_bits, grid.group_size
    )
    scheme = Scheme(grid.num_bits, grid.group_size, grid.symmetric)
    tensors = {key.removeprefix("l."): value for key, value in encode(layer, torch.bfloat16).items()}
    return layer, tensors, quantization_config({"model.layers.0.l": scheme}, ["lm_head"])


@pytest.mark.usefixtures("vllm")
@pytest.mark.skipif(not _extension.available(), reason="packed layers need the compiled extension")
@pytest.mark.parametrize(
    "grid_config",
    [GridConfig(3, 32, True), GridConfig(4, 64, True), GridConfig(4, 32, False), GridConfig(4, -1, True)],
    ids=str,
)
def test_a_layer_through_vllms_steps(grid_config: GridConfig) -> None:
    layer, tensors, said = _layer(grid_config)
    vllm_plugin.register()
    vllm_plugin.register()
    config = METHODS["discquant"].from_config(said)  # type: ignore[attr-defined]
    linear = _LinearBase()
    method = config.get_quant_method(linear, "model.layers.0.l")
    method.create_weights(linear, 128, [64, 32], 128, 96, torch.bfloat16, weight_loader=None)
    assert set(dict(linear.named_parameters())) == set(tensors)
    for name, value in tensors.items():
        parameter = getattr(linear, name)
        assert parameter.shape == value.shape and parameter.dtype == value.dtype, name
        parameter.data.copy_(value)
    method.process_weights_after_loading(linear)
    assert not dict(linear.named_parameters())
    x, bias = torch.randn(5, 128), torch.randn(96)
    expected = x @ layer.dequantize(torch.float32).T + bias
    error = (method.apply(linear, x, bias) - expected).abs().max()
    assert error <= 2.0**-9 * (x.abs() @ layer.dequantize(torch.float32).abs().T).max()


@pytest.mark.usefixtures("vllm")
def test_what_is_left_to_vllm() -> None:
    _, _, said = _layer(GridConfig(4, 32, True))
    vllm_plugin.register()
    chosen: Any = METHODS["discquant"]
    config = chosen.from_config(said)
    assert type(config.get_quant_method(_LinearBase(), "lm_head")).__name__ == "UnquantizedLinearMethod"
    assert config.get_quant_method(nn.LayerNorm(4), "norm") is None
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    method = config.get_quant_method(_LinearBase(), "model.layers.0.qkv_proj")
    assert method.scheme == Scheme(4, 32, True)
    config.ignore = ("lm_head", "model.layers.0.k_proj")
    with pytest.raises(ValueError, match="share one grid"):
        config.get_quant_method(_LinearBase(), "model.layers.0.qkv_proj")
    assert chosen.override_quantization_method(said, "discquant") == "discquant"
    assert chosen.override_quantization_method(said, None) is None
    assert chosen.override_quantization_method({"quant_method": "gptq"}, "discquant") is None


@pytest.mark.usefixtures("vllm")
def test_quantized_activations_are_left_to_vllm() -> None:
    _, _, said = _layer(GridConfig(4, 32, True))
    said["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int"}
    vllm_plugin.register()
    with pytest.raises(NotImplementedError, match=r"activations are quantized too \(inputs int8\)"):
        METHODS["discquant"].from_config(said)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("vllm")
def test_patterns_among_what_is_ignored() -> None:
    _, _, said = _layer(GridConfig(4, 32, True))
    said["ignore"] = ["lm_head", "re:.*self_attn.*", "re:visual"]
    vllm_plugin.register()
    config: Any = METHODS["discquant"].from_config(said)  # type: ignore[attr-defined]
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    for name in (
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
        "visual.blocks.0.fc",
    ):
        assert type(config.get_quant_method(_LinearBase(), name)).__name__ == "UnquantizedLinearMethod"
    assert config.get_quant_method(_LinearBase(), "model.layers.0.mlp.visual").scheme == Scheme(4, 32, True)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("name", ["FusedMoE", "RoutedExperts"])
def test_experts_are_left_to_vllm(name: str) -> None:
    """Without a method of their own vLLM would take packed experts for plain ones."""
    _, _, said = _layer(GridConfig(4, 32, True))
    vllm_plugin.register()
    experts = type("SharedFused", (type(name, (nn.Module,), {}),), {})()
    chosen: Any = METHODS["discquant"]
    with pytest.raises(NotImplementedError, match=r"model\.layers\.1\.mlp\.experts is a mixture of experts"):
        chosen.from_config(said).get_quant_method(experts, "model.layers.1.mlp.experts")
    for ignored in ("model.layers.1.mlp.experts.0.up_proj", "re:.*experts"):
        said["ignore"] = [ignored]
        assert chosen.from_config(said).get_quant_method(experts, "model.layers.1.mlp.experts") is None


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("order", ["group", "dynamic"])
def test_act_order_is_left_to_vllm(order: str) -> None:
    _, _, said = _layer(GridConfig(4, 32, True))
    said["config_groups"]["group_0"]["weights"]["actorder"] = order
    vllm_plugin.register()
    with pytest.raises(NotImplementedError, match="act-order"):
        METHODS["discquant"].from_config(said)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("vllm")
def test_older_layouts_are_refused() -> None:
    """vLLM's loaders cut a tensor to the parameter's size: words of ten codes and zero points of a byte would fit."""
    _, tensors, said = _layer(GridConfig(3, 32, False))
    vllm_plugin.register()
    method = METHODS["discquant"].from_config(said).get_quant_method(_LinearBase(), "model.layers.0.l")  # type: ignore[attr-defined]
    linear = _LinearBase()
    loaded: list[Tensor] = []
    method.create_weights(
        linear,
        64,
        [96],
        128,
        96,
        torch.bfloat16,
        weight_loader=lambda parameter, value, part: loaded.append(value),
    )
    words: Any = linear.weight_packed
    zero: Any = linear.weight_zero_point
    for parameter, value in ((words, tensors["weight_packed"]), (zero, tensors["weight_zero_point"])):
        parameter.facts["weight_loader"](parameter, value, "q")
    assert len(loaded) == 2
    for parameter, value in (
        (words, torch.zeros(96, 13, dtype=torch.int32)),
        (zero, torch.zeros(96, 4, dtype=torch.int8)),
    ):
        with pytest.raises(NotImplementedError, match=r"layout of compressed-tensors before 0\.18"):
            parameter.facts["weight_loader"](parameter, value, "q")


@pytest.mark.usefixtures("vllm")
def test_refuses_what_no_kernel_multiplies() -> None:
    with pytest.raises(NotImplementedError, match="3 and 4 bits"):
        vllm_plugin.check_scheme(Scheme(8, 32, True))
    _, _, said = _layer(GridConfig(4, 32, True))
    vllm_plugin.register()
    method = METHODS["discquant"].from_config(said).get_quant_method(_LinearBase(), "model.layers.0.l")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="multiple of 32"):
        method.create_weights(_LinearBase(), 48, [32], 48, 32, torch.bfloat16)
