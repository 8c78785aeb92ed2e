# SPDX-License-Identifier: Apache-2.0
"""`inspect` tells what a file says of itself and its tensors contradict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from discquant.config import GridConfig
from discquant.errors import CheckpointError
from discquant.formats import Scheme, plan_export, registry
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.grids import place_grid
from discquant.run.inspection import inspect, print_report
from discquant.run.refine import RefinePipeline

LAYERS = [
    f"model.layers.{block}.{part}_proj"
    for block in (0, 1)
    for part in (*(f"self_attn.{n}" for n in "qkvo"), *(f"mlp.{n}" for n in ("gate", "up", "down")))
]


def write(source: Path, out: Path, name: str, bits: int) -> Path:
    """Nearest codes, symmetric, groups of 32."""
    checkpoint = Checkpoint(source)
    layers = []
    for layer in LAYERS:
        weight = checkpoint.read(f"{layer}.weight").float()
        laid = place_grid(weight, GridConfig(bits, 32, True, "absmax"))
        layers.append(CodedLayer(layer, laid.nearest(weight), laid))
    registry.by_name(name).write(checkpoint, out, layers)
    return out


def said(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def problems(folder: Path, **changes: Any) -> list[str]:
    """What is wrong once the configuration says something else."""
    file = folder / "config.json"
    before = file.read_text()
    config = json.loads(before)
    file.write_text(json.dumps({**config, "quantization_config": {**said(folder), **changes}}))
    found: list[str] = inspect(folder)["problems"]
    file.write_text(before)
    return found


def test_widths_and_groups(model_dir: Path, tmp_path: Path) -> None:
    file = write(model_dir, tmp_path / "file", "gptq", 3)
    assert not problems(file)
    (text,) = problems(file, bits=4)
    assert (
        f"{LAYERS[0]} and 13 more have 4 bits in groups of 32, but their shapes are those of 3 bits" in text
    )
    (text,) = problems(file, group_size=-1)
    assert "3 bits per row, but their shapes are those of 3 bits in groups of 32" in text
    # What is said of single modules counts.
    assert not problems(file, bits=4, dynamic={"+:.*_proj": {"bits": 3}})
    (text,) = problems(file, dynamic={"-:.*down_proj": {}, "+:(": {"bits": 5}})
    assert "layers.0.mlp.down_proj and 1 more are not quantized, but they are" in text
    auto = write(model_dir, tmp_path / "auto", "autoround", 4)
    (text,) = problems(auto, extra_config={".*attn.*": {"bits": 8}, LAYERS[0]: {"bits": 4}})
    assert f"{LAYERS[1]} and 6 more have 8 bits" in text
    awq = write(model_dir, tmp_path / "awq", "awq", 4)
    (text,) = problems(awq, group_size=64)
    assert "4 bits in groups of 64, but their shapes are those of 4 bits in groups of 32" in text


def test_parts_that_are_not_quantized(model_dir: Path, tmp_path: Path) -> None:
    """Engines join q, k and v, so one of them left alone is told, whichever it is; by the plan, too."""
    quantized = [name for name in LAYERS if not name.endswith("q_proj")]
    schemes = dict.fromkeys(quantized, Scheme(4, 32, True))
    plan = plan_export(model_dir, tmp_path / "none", schemes, "gptq")
    checkpoint, layers = Checkpoint(model_dir), []
    for layer in quantized:
        weight = checkpoint.read(f"{layer}.weight").float()
        laid = place_grid(weight, GridConfig(4, 32, True, "absmax"))
        layers.append(CodedLayer(layer, laid.nearest(weight), laid))
    manifest = registry.by_name("gptq").write(checkpoint, tmp_path / "file", layers)
    for found in (inspect(tmp_path / "file")["problems"], manifest["warnings"], plan.warnings):
        assert [text for text in found if "engines fuse q_proj, k_proj, v_proj" in text] == found
        assert len(found) == 2


def test_a_claim_without_codes(model_dir: Path, tmp_path: Path) -> None:
    """Such folders exist: somebody dequantized the weights and left the configuration."""
    file = write(model_dir, tmp_path / "file", "gptq", 3)
    (file / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes())
    facts = inspect(file)
    assert facts["problems"] == ["the configuration says gptq, but no layer is quantized"]
    assert facts["bits_per_weight"] is None
    with pytest.raises(CheckpointError, match="no quantized layer"):
        RefinePipeline(file, tmp_path / "out", model_dir)


def test_quantize_config_alone(model_dir: Path, tmp_path: Path) -> None:
    """AutoGPTQ once wrote no more; beside weights without codes the file says nothing."""
    file = write(model_dir, tmp_path / "file", "gptq", 3)
    config = json.loads((file / "config.json").read_text())
    del config["quantization_config"]
    (file / "config.json").write_text(json.dumps(config))
    stated = {"bits": 3, "group_size": 32, "desc_act": False, "sym": True}
    (file / "quantize_config.json").write_text(json.dumps(stated))
    facts = inspect(file)
    assert facts["format"] == "gptq" and len(facts["layers"]) == 14 and not facts["problems"]
    (file / "quantize_config.json").write_text(json.dumps({**stated, "checkpoint_format": "gptq_v2"}))
    assert inspect(file)["format"] == "gptq-v2"
    for other in ({**stated, "quant_method": "awq"}, []):
        (file / "quantize_config.json").write_text(json.dumps(other))
        with pytest.raises(CheckpointError, match="no quantized format"):
            inspect(file)
    (file / "quantize_config.json").write_text(json.dumps(stated))
    (file / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="no quantized format"):
        inspect(file)


def test_a_pattern_that_never_ends(model_dir: Path, tmp_path: Path) -> None:
    """Patterns are somebody else's: what takes hours elsewhere matches nothing at once, or is told after a moment."""
    out = write(model_dir, tmp_path / "out", "gptq", 4)
    assert not problems(out, dynamic={r"(([\w.])+)+[!?]": {"bits": 8}})
    with pytest.raises(CheckpointError, match="takes too long"):
        problems(out, dynamic={10 * "(.*)" + r"\1[!?]": {"bits": 8}})


def test_text_of_a_file_is_no_markup(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = write(model_dir, tmp_path / "out", "gptq", 4)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["dynamic"] = {"model": {"bits": "[/x]"}}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    print_report(inspect(out))
    assert "[/x]" in capsys.readouterr().out


def test_experts_that_are_alike_are_printed_in_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    def row(name: str, kind: str) -> dict[str, Any]:
        return {
            "name": name, "shape": (8, 32), "kind": kind, "group_size": 32, "symmetric": True, "stored_bytes": 100,
        }  # fmt: skip

    experts = [row(f"a.experts.{number}.up_proj", "int4") for number in range(12)]
    found = {
        "format": "gguf", "schemes": [], "quantized_weights": 0, "bits_per_weight": None, "file_bytes": 0,
        "untouched_bytes": 0, "engines": [], "engines_as_of": "", "problems": [], "notes": [],
        "layers": [*experts, row("a.experts.12.up_proj", "int8"), row("a.q_proj", "int4")],
    }  # fmt: skip
    print_report(found)
    lines = capsys.readouterr().out.splitlines()
    assert [
        line for line in lines if "experts.*.up_proj" in line and "12 of 8 x 32" in line and "1,200" in line
    ]
    assert [line for line in lines if "experts.12.up_proj" in line and "│ 8 x 32" in line]
    assert not [line for line in lines if "experts.1.up" in line]
