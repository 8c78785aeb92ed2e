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
