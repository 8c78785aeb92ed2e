# SPDX-License-Identifier: Apache-2.0
"""Files as other tools write them: old AutoGPTQ with tensors that change nothing, NVFP4 with quantized activations."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import discquant
from discquant import _extension
from discquant.config import DataConfig, GridConfig, QuantizeConfig
from discquant.errors import CheckpointError
from discquant.evaluation.candidates import open_candidate
from discquant.formats import registry
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.formats.load import load_quantized
from discquant.formats.load_packed import load_packed_model
from discquant.formats.source import open_source
from discquant.grids import place_grid
from discquant.run.events import Events
from discquant.run.export import export
from discquant.run.inspection import inspect
from discquant.run.refine import RefinePipeline
from discquant.run.served import load_run_model

IDS = torch.arange(40).reshape(2, 20) * 7 % 90 + 3
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LAYERS = [
    f"model.layers.{block}.{part}_proj"
    for block in (0, 1)
    for part in (*(f"self_attn.{n}" for n in "qkvo"), *(f"mlp.{n}" for n in ("gate", "up", "down")))
]


def config_of(dataset: str) -> QuantizeConfig:
    return QuantizeConfig(method="gptq", data=DataConfig(dataset, 24, 32), gptq_samples=8, baselines=())


@pytest.fixture(scope="module")
def tied_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with its head tied to the embedding."""
    path = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(model_dir, path)
    tensors = load_file(path / "model.safetensors")
    del tensors[HEAD]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    reconfigure(path, tie_word_embeddings=True)
    return path


def write(source: Path, out: Path, name: str, grid: GridConfig) -> Path:
    """Nearest codes in a format, then without our own side files."""
    checkpoint = Checkpoint(source)
    layers = []
    for layer in LAYERS:
        weight = checkpoint.read(f"{layer}.weight").float()
        laid = place_grid(weight, grid)
        layers.append(CodedLayer(layer, laid.nearest(weight), laid))
    registry.by_name(name).write(checkpoint, out, layers)
    return out


def add(folder: Path, more: dict[str, Tensor]) -> None:
    """Put further tensors into a folder of one file."""
    (file,) = folder.glob("*.safetensors")
    save_file({**load_file(file), **more}, file, {"format": "pt"})


def reconfigure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def old_autogptq(source: Path, out: Path) -> Path:
    """As AutoGPTQ wrote them in 2023: another file name, quantize_config.json alone, tensors that nobody needs."""
    write(source, out, "gptq", GridConfig(3, 32, True, "absmax"))
    reconfigure(out, quantization_config=None)
    said = {"bits": 3, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True}
    (out / "quantize_config.json").write_text(json.dumps(said))
    (out / "model.safetensors").rename(out / "gptq_model-3bit-32g.safetensors")
    rows = {layer: Checkpoint(source).tensors[f"{layer}.weight"].shape[0] for layer in LAYERS}
    more = {f"{layer}.bias": torch.zeros(count, dtype=torch.float16) for layer, count in rows.items()}
    for block in (0, 1):
        more[f"model.layers.{block}.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    add(out, {HEAD: Checkpoint(source).read(EMBEDDING), **more})
    return out


def same_but_codes(before: Path, after: Path, codes: str) -> None:
    """The same tensors, dtypes and bytes, but for the codes."""
    one, two = Checkpoint(before), Checkpoint(after)
    assert list(one.tensors) == list(two.tensors)
    changed = {
        name
        for name in one.tensors
        if not torch.equal(one.read(name).view(torch.uint8), two.read(name).view(torch.uint8))
    }
    assert changed and all(name.endswith(codes) for name in changed)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def test_an_old_autogptq_file(tied_dir: Path, dataset: str, tmp_path: Path) -> None:
    file = old_autogptq(tied_dir, tmp_path / "old")
    facts = inspect(file)
    assert facts["format"] == "gptq" and len(facts["layers"]) == 14
    assert facts["schemes"] == ["int3 group 32 symmetric"] and not facts["problems"]
    with pytest.raises(CheckpointError, match="quantized already"):
        open_source(file)
    summary = RefinePipeline(file, tmp_path / "out", tied_dir, config_of(dataset)).execute()
    assert summary["refine"]["improved"] and summary["byte_diff"]["outside"] == 0
    same_but_codes(file, tmp_path / "out" / "gptq", ".qweight")
    assert registry.find(tmp_path / "out" / "gptq").name == "gptq"
    expected = logits(load_run_model(tmp_path / "out"))
    refined = tmp_path / "out" / "gptq"
    for model in (discquant.load(refined, mode="plain"), discquant.load(refined), open_candidate(refined)):
        assert torch.equal(logits(model), expected)
    if _extension.available():
        packed = load_packed_model(refined)
        assert packed is not None and packed.packed_report.layers == 14
        assert packed.lm_head.weight is packed.model.embed_tokens.weight
    export(file, ["mlx"], tmp_path, original=str(tied_dir))
    export(tmp_path / "out", ["autoround"], tmp_path)


def test_an_old_awq_file(tied_dir: Path, dataset: str, tmp_path: Path) -> None:
    """As AutoAWQ wrote them in 2023: quant_config.json alone, by other names."""
    file = tmp_path / "old"
    write(tied_dir, file, "awq", GridConfig(4, 32, False, "absmax"))
    reconfigure(file, quantization_config=None)
    said = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (file / "quant_config.json").write_text(json.dumps(said))
    facts = inspect(file)
    assert facts["format"] == "awq" and len(facts["layers"]) == 14 and not facts["problems"]
    with pytest.raises(CheckpointError, match="quantized already"):
        open_source(file)
    summary = RefinePipeline(file, tmp_path / "out", tied_dir, config_of(dataset)).execute()
    assert summary["byte_diff"]["outside"] == 0
    refined = tmp_path / "out" / "awq"
    assert json.loads((refined / "quant_config.json").read_text()) == said
    expected = logits(load_run_model(tmp_path / "out"))
    for model in (discquant.load(refined, mode="plain"), discquant.load(refined)):
        assert torch.equal(logits(model), expected)
    export(file, ["gptq"], tmp_path, original=str(tied_dir))
    assert not (tmp_path / "gptq" / "quant_config.json").exists()
    # A file left over from another method changes nothing.
    (file / "quantize_config.json").write_text(json.dumps({"bits": 3, "group_size": 32}))
    assert inspect(file)["format"] == "awq"
    (file / "quantize_config.json").unlink()
    # Another tool's file of that name, and one beside a configuration that says something, are none of its business.
    (file / "quant_config.json").write_text(json.dumps({"bits": 4}))
    with pytest.raises(CheckpointError):
        registry.find(file)


def test_a_head_of_its_own_is_no_tied_one(tied_dir: Path, dataset: str, tmp_path: Path) -> None:
    file = old_autogptq(tied_dir, tmp_path / "old")
    add(file, {HEAD: Checkpoint(tied_dir).read(EMBEDDING) * 2})
    with pytest.raises(CheckpointError, match=HEAD):
        RefinePipeline(file, tmp_path / "out", tied_dir, config_of(dataset)).execute()
    with pytest.raises(CheckpointError, match=HEAD):
        export(file, ["mlx"], tmp_path, original=str(tied_dir))
    # Loaded alone, it is the model that its tensors make.
    plain = discquant.load(file, mode="plain")
    assert not torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight)
    assert torch.equal(logits(discquant.load(file)), logits(plain))


def test_a_bias_that_is_not_zero_is_one(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    file = write(model_dir, tmp_path / "file", "gptq", GridConfig(3, 32, True, "absmax"))
    add(file, {f"{LAYERS[0]}.bias": torch.ones(64)})
    with pytest.raises(CheckpointError, match="that the original lacks"):
        RefinePipeline(file, tmp_path / "out", model_dir, config_of(dataset)).execute()
    for mode in ("plain", "exact"):
        with pytest.raises(CheckpointError, match=r"unexpected_keys .*q_proj\.bias"):
            discquant.load(file, mode=mode)  # type: ignore[arg-type]


def with_activations(source: Path, out: Path) -> Path:
    """As llm-compressor writes NVFP4 for weights and activations, and a quantized cache of keys and values."""
    write(source, out, "compressed-tensors", GridConfig.of_kind("nvfp4"))
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    (group,) = said["config_groups"].values()
    group["input_activations"] = {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16,
        "dynamic": "local",
    }  # fmt: skip
    said["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    reconfigure(out, quantization_config=said)
    more = {f"{layer}.input_global_scale": torch.tensor([100.0]) for layer in LAYERS}
    more |= {f"model.layers.{block}.self_attn.{n}_scale": torch.ones(1) for block in (0, 1) for n in "kv"}
    add(out, more)
    return out


def test_quantized_activations(
    model_dir: Path, dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = write(model_dir, tmp_path / "plain", "compressed-tensors", GridConfig.of_kind("nvfp4"))
    file = with_activations(model_dir, tmp_path / "file")
    facts, alone = inspect(file), inspect(plain)
    by_name = [{row["name"]: row for row in found["layers"]} for found in (facts, alone)]
    assert by_name[0] == by_name[1] and not alone["notes"]
    assert any("inputs float4, keys and values" in note for note in facts["notes"])
    with caplog.at_level(logging.WARNING):
        loaded = discquant.load(file)
    assert "full precision" in caplog.text
    assert torch.equal(logits(loaded), logits(load_quantized(plain)))
    said: list[str] = []
    RefinePipeline(
        file, tmp_path / "out", model_dir, config_of(dataset), events=Events(message=said.append)
    ).execute()
    assert any("inputs float4" in line for line in said)
    same_but_codes(file, tmp_path / "out" / "compressed-tensors", ".weight_packed")
    for path, original in ((file, str(model_dir)), (tmp_path / "out", None)):
        said.clear()
        # Of the formats only compressed-tensors holds this table.
        target = tmp_path / f"{path.name}-exported"
        export(path, ["compressed-tensors"], target, original=original, say=said.append)
        assert any("quantizes weights alone" in line for line in said)
        assert not inspect(target / "compressed-tensors")["notes"]


def test_tensors_of_activations_are_not_passed_over_elsewhere(
    model_dir: Path, dataset: str, tmp_path: Path
) -> None:
    file = with_activations(model_dir, tmp_path / "file")
    add(file, {"model.norm.input_global_scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match="that the original lacks"):
        RefinePipeline(file, tmp_path / "out", model_dir, config_of(dataset)).execute()
