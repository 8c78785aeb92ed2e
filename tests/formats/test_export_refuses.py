# SPDX-License-Identifier: Apache-2.0
"""What an export refuses before and during the work; nothing appears then."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from discquant.errors import (
    CheckpointError,
    DiskSpaceError,
    MissingModelError,
    OutputExistsError,
    UnrepresentableError,
)
from discquant.formats import Checkpoint, QuantizedLinear, Scheme, export_compressed_tensors, plan_export
from discquant.formats.registry import by_name

Layers = Callable[..., Iterator[QuantizedLinear]]


def plan_of(source: Path, layers: Iterator[QuantizedLinear]) -> dict[str, Scheme]:
    return {layer.name: Scheme.of(layer) for layer in layers}


def test_plan_knows_the_size(exported: Path, llama_dir: Path, make_layers: Layers, tmp_path: Path) -> None:
    plan = plan_export(llama_dir, tmp_path / "out", plan_of(llama_dir, make_layers(llama_dir, 3, 32, True)))
    assert plan.weight_bytes == sum(info.num_bytes for info in Checkpoint(exported).tensors.values())
    assert plan.warnings == []


def test_plan_refuses_before_work(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"model.layers.0.mlp.up_proj": Scheme(3, 32, True)}
    out = tmp_path / "out"
    with pytest.raises(
        UnrepresentableError, match=r"layers\.0\.mlp\.down_proj: its 192 input columns are no multiple"
    ):
        plan_export(llama_dir, out, {"model.layers.0.mlp.down_proj": Scheme(3, 128, True)})
    with pytest.raises(UnrepresentableError, match=r"holds no model\.layers\.9\.mlp\.up_proj\.weight"):
        plan_export(llama_dir, out, {"model.layers.9.mlp.up_proj": Scheme(3, 32, True)})
    with pytest.raises(UnrepresentableError, match=r"model\.norm\.weight must have 2 dimensions, got \[64\]"):
        plan_export(llama_dir, out, {"model.norm": Scheme(3, 32, True)})
    with pytest.raises(MissingModelError):
        plan_export(tmp_path / "nowhere", out, good)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputExistsError):
        plan_export(llama_dir, tmp_path / "full", good)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskSpaceError, match="1,000 bytes free"):
        plan_export(llama_dir, out, good)
    assert not out.exists()


def test_plan_warns(llama_dir: Path, tmp_path: Path) -> None:
    schemes = {f"model.layers.0.self_attn.{name}": Scheme(4, 32, True) for name in ("q_proj", "k_proj")}
    found = plan_export(llama_dir, tmp_path / "out", schemes).warnings
    assert found == [
        "model.layers.0.self_attn: engines fuse q_proj, k_proj, v_proj, which do not share one grid"
    ]
    found = plan_export(llama_dir, tmp_path / "out", {"lm_head": Scheme(3, 32, False)}).warnings
    assert len(found) == 1
    assert "3 bits asymmetric" in found[0]


def test_export_keeps_to_the_plan(llama_dir: Path, make_layers: Layers, tmp_path: Path) -> None:
    layers = list(make_layers(llama_dir, 3, 32, True))
    plan = plan_export(llama_dir, tmp_path / "out", {layer.name: Scheme.of(layer) for layer in layers})
    with pytest.raises(UnrepresentableError, match=rf"not those planned: {layers[-1].name}"):
        export_compressed_tensors(llama_dir, tmp_path / "out", layers[:-1], plan=plan)
    with pytest.raises(UnrepresentableError, match=f"{layers[0].name} was given twice"):
        export_compressed_tensors(llama_dir, tmp_path / "out", [layers[0], layers[0]])
    wrong = dataclasses.replace(layers[0], name=layers[-2].name)
    assert layers[-2].q.shape != layers[0].q.shape
    with pytest.raises(UnrepresentableError, match=f"{layers[-2].name} must have the shape of its weight"):
        export_compressed_tensors(llama_dir, tmp_path / "out", [wrong])
    assert list(tmp_path.iterdir()) == []


def test_quantized_source_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UnrepresentableError, match="is quantized already"):
        export_compressed_tensors(exported, tmp_path / "out", [])


def test_truncated_source_is_refused(llama_dir: Path, make_layers: Layers, tmp_path: Path) -> None:
    shutil.copytree(llama_dir, tmp_path / "source")
    layers = list(make_layers(llama_dir, 3, 32, True))
    file = tmp_path / "source" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        export_compressed_tensors(tmp_path / "source", tmp_path / "out", layers)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["compressed-tensors", "gguf", "onnx"])
def test_a_model_without_a_quantized_layer_is_refused(
    name: str, make_family: Callable[..., Path], tmp_path: Path
) -> None:
    source = Checkpoint(make_family("llama", tmp_path / "model", attention_bias=False))
    with pytest.raises(UnrepresentableError, match="no quantized layer was given"):
        by_name(name).write(source, tmp_path / "out", [])
    assert not (tmp_path / "out").exists()
