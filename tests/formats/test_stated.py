# SPDX-License-Identifier: Apache-2.0
"""What configurations of other tools say, and where they say it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from discquant.errors import CheckpointError, UnrepresentableError
from discquant.formats import Checkpoint, CodedLayer, QuantizedLinear
from discquant.formats.load import forget_quantization
from discquant.formats.registry import by_name, find, quantized
from discquant.formats.source import open_source

Layers = Callable[..., Iterator[QuantizedLinear]]
FORMATS = ("compressed-tensors", "gptq", "gptq-v2", "autoround", "awq")


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a config.json."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def written(
    llama_dir: Path, make_layers: Layers, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A folder of a format, 4 bits, symmetric, groups of 32; made once."""
    home = tmp_path_factory.mktemp("written")

    def make(name: str) -> Path:
        if not (home / name).exists():
            layers = map(CodedLayer.of, make_layers(llama_dir, 4, 32, True))
            by_name(name).write(Checkpoint(llama_dir), home / name, layers)
        return home / name

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_a_composite_model_says_it_of_its_text_model(
    name: str, written: Callable[[str], Path], tmp_path: Path
) -> None:
    """Read like any other file, and no original: not even where nothing else gives the format away."""
    shutil.copytree(written(name), tmp_path / "nested")

    def nest(config: dict[str, Any]) -> None:
        config["text_config"] = {"quantization_config": config.pop("quantization_config")}

    edit(tmp_path / "nested", nest)
    (tmp_path / "nested" / "quantize_config.json").unlink(missing_ok=True)
    assert find(tmp_path / "nested").name == name
    found = {layer.name: layer for layer in by_name(name).read(tmp_path / "nested")}
    for layer in by_name(name).read(written(name)):
        assert torch.equal(found[layer.name].q, layer.q)
        assert torch.equal(found[layer.name].grid.scale, layer.grid.scale)
    with pytest.raises(CheckpointError, match="quantized already"):
        open_source(tmp_path / "nested")
    for target in ("awq", "onnx", "gguf"):
        with pytest.raises(UnrepresentableError, match="quantized already"):
            by_name(target).write(Checkpoint(tmp_path / "nested"), tmp_path / "out", [])
    edit(
        tmp_path / "nested",
        lambda config: config["text_config"]["quantization_config"].update(quant_method="x"),
    )
    with pytest.raises(CheckpointError, match="in no quantized format"):
        quantized(tmp_path / "nested")


def test_a_composite_model_is_loaded_plain() -> None:
    from transformers import Gemma3Config

    config = Gemma3Config(
        text_config={"num_hidden_layers": 1, "quantization_config": {"quant_method": "awq"}}
    )
    assert hasattr(config.text_config, "quantization_config")
    forget_quantization(config)
    assert not hasattr(config.text_config, "quantization_config")
    assert not hasattr(config, "quantization_config")


# Words of 4-bit zero points: 8 everywhere, as it is and less one.
EIGHT, SEVEN = 0x88888888 - (1 << 32), 0x77777777


@pytest.mark.parametrize(
    ("said", "word"),
    [
        # What releases of 2024 wrote: `backend` alone, by which their exporter chose the packer.
        ({"quant_method": "intel/auto-round", "backend": "autoround:exllamav2"}, EIGHT),
        ({"quant_method": "intel/auto-round", "backend": "auto_round:triton"}, EIGHT),
        ({"quant_method": "intel/auto-round", "backend": "gptq:exllamav2"}, SEVEN),
        ({"quant_method": "intel/auto-round", "backend": "auto_gptq:cuda"}, SEVEN),
        ({"quant_method": "auto-round"}, SEVEN),
        # Spellings that auto-round takes for the first of its packings; the first is transformers' own default.
        ({"packing_format": "auto_round:gptq"}, SEVEN),
        ({"packing_format": "auto"}, SEVEN),
        ({"packing_format": "auto_round", "backend": "gptq"}, EIGHT),
    ],
)
def test_autoround_packings(
    said: dict[str, Any], word: int, written: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(written("autoround"), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    filled = {
        key: torch.full_like(value, word) if key.endswith(".qzeros") else value
        for key, value in tensors.items()
    }
    save_file(filled, file, {"format": "pt"})

    def state(config: dict[str, Any]) -> None:
        config["quantization_config"].pop("packing_format")
        config["quantization_config"].update(said)

    edit(tmp_path / "out", state)
    expected = {layer.name: layer for layer in by_name("autoround").read(written("autoround"))}
    for layer in by_name("autoround").read(tmp_path / "out"):
        assert layer.grid.symmetric
        assert torch.equal(layer.dequantize(torch.float32), expected[layer.name].dequantize(torch.float32))
    # Packed in the other way, every zero point would be off by one, and the layer asymmetric without a word.
    other = {
        key: torch.full_like(value, EIGHT + SEVEN - word) for key, value in filled.items() if "qzeros" in key
    }
    save_file({**filled, **other}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"stated to be symmetric, but its zero points are all [79]"):
        next(by_name("autoround").read(tmp_path / "out"))
    # A layer of which the file says that it is asymmetric may have any.
    name = next(iter(expected))
    edit(
        tmp_path / "out",
        lambda config: config["quantization_config"]["extra_config"].update({name: {"sym": False}}),
    )
    found = {stored.name: stored for stored in by_name("autoround").layers(Checkpoint(tmp_path / "out"))}  # type: ignore[attr-defined]
    assert not by_name("autoround").decode(found[name]).grid.symmetric  # type: ignore[attr-defined]


@pytest.mark.parametrize("said", [{"backend": "auto_round:awq"}, {"packing_format": "auto_round:awq"}])
def test_autoround_in_awq_layout(
    said: dict[str, str], llama_dir: Path, make_layers: Layers, tmp_path: Path
) -> None:
    layers = [CodedLayer.of(layer) for layer in make_layers(llama_dir, 4, 32, False)]
    by_name("autoround").write(Checkpoint(llama_dir), tmp_path / "out", layers)

    def state(config: dict[str, Any]) -> None:
        config["quantization_config"].pop("packing_format")
        config["quantization_config"].update(said)

    edit(tmp_path / "out", state)
    expected = {layer.name: layer for layer in layers}
    for layer in by_name("autoround").read(tmp_path / "out"):
        assert torch.equal(layer.q, expected[layer.name].q)
        assert torch.equal(layer.dequantize(torch.float32), expected[layer.name].dequantize(torch.float32))
