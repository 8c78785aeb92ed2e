# SPDX-License-Identifier: Apache-2.0
"""One run, several formats; and grids that are not uniform through the run directory and back."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import discquant
from discquant.config import DataConfig, GridConfig, QuantizeConfig
from discquant.errors import ConfigError, DiskSpaceError, UnrepresentableError
from discquant.evaluation.candidates import bits_per_weight
from discquant.formats import registry
from discquant.formats.checkpoint import Checkpoint
from discquant.grids import AffineGrid, TableGrid, UniformGrid
from discquant.grids.storage import restore, store
from discquant.run.directory import RunDirectory
from discquant.run.inspection import inspect
from discquant.run.pipeline import Pipeline
from discquant.run.served import load_run_model


def _config(dataset: str, grid: GridConfig, formats: str) -> QuantizeConfig:
    return QuantizeConfig(
        grid=grid, method="rtn", data=DataConfig(dataset, 8, 32), format=formats, baselines=()
    )


def test_one_run_in_two_formats(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    config = _config(dataset, GridConfig(4, 32, True), "compressed-tensors, gptq")
    summary = Pipeline(model_dir, tmp_path / "out", config).execute()
    assert set(summary["sizes"]["formats"]) == {"compressed-tensors", "gptq"}
    assert summary["sizes"]["packed_bytes"] == summary["sizes"]["formats"]["compressed-tensors"] > 0
    codes = {layer.name: layer for layer in RunDirectory(tmp_path / "out").coded_layers()}
    for name in ("compressed-tensors", "gptq"):
        read = {layer.name: layer for layer in registry.by_name(name).read(tmp_path / "out" / name)}
        assert read.keys() == codes.keys()
        for layer, found in read.items():
            assert torch.equal(found.q, codes[layer].q)
            assert torch.equal(found.dequantize(torch.float32), codes[layer].dequantize(torch.float32))
    ids = torch.randint(3, 97, (1, 12))
    with torch.no_grad():
        of_run = load_run_model(tmp_path / "out")(ids).logits
        of_gptq = discquant.load(tmp_path / "out" / "gptq")(ids).logits
    assert torch.equal(of_run, of_gptq)


def test_a_first_block_left_alone(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    """What a format can hold is asked of the first block that has weights to quantize."""
    config = dataclasses.replace(
        _config(dataset, GridConfig(4, 32), "compressed-tensors"), ignore=("lm_head", "model.layers.0.*")
    )
    Pipeline(model_dir, tmp_path / "out", config).execute()
    names = {layer.name for layer in RunDirectory(tmp_path / "out").coded_layers()}
    assert len(names) == 7 and all(name.startswith("model.layers.1.") for name in names)


def test_a_composite_model(dataset: str, tmp_path: Path) -> None:
    """Gemma 3 from 4B on: renamed while it is loaded. Formats are refused with that reason; its codes are a run's."""
    from transformers import AutoModelForCausalLM, Gemma3Config

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = {**sizes, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "pad_token_id": 0}
    vision = {**sizes, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=127, boi_token_index=126,
        eoi_token_index=125,
    )  # fmt: skip
    model = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(model)
    stored = "is language_model.model.layers.0.self_attn.q_proj.weight in .*--format none"
    for name in ("compressed-tensors", "gguf"):
        with pytest.raises(UnrepresentableError, match=stored):
            Pipeline(model, tmp_path / "refused", _config(dataset, GridConfig(4, 32), name)).execute()
    assert not (tmp_path / "refused").exists()
    summary = Pipeline(model, tmp_path / "out", _config(dataset, GridConfig(4, 32), "none")).execute()
    assert 0 < summary["methods"]["rtn"]["kl_mean"] < 1
    assert load_run_model(tmp_path / "out").config.model_type == "gemma3"


def test_a_look_up_grid_through_a_run(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    config = _config(dataset, GridConfig.of_kind("nvfp4"), "compressed-tensors")
    summary = Pipeline(model_dir, tmp_path / "out", config).execute()
    assert summary["sizes"]["bits_per_weight"] == pytest.approx(4.5)
    layers = list(RunDirectory(tmp_path / "out").coded_layers())
    assert len(layers) == 14 and all(isinstance(layer.grid, TableGrid) for layer in layers)
    # Engines keep one global scale of fused matrices, and take block scales as they are.
    scales = {layer.name: float(layer.grid.tensor_scale) for layer in layers}  # type: ignore[attr-defined]
    for parent, members in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
        for block in (0, 1):
            assert len({scales[f"model.layers.{block}.{parent}.{name}"] for name in members}) == 1
    assert len(set(scales.values())) > 4
    assert not inspect(tmp_path / "out" / "compressed-tensors")["problems"]
    with pytest.raises(UnrepresentableError, match="uniform"):
        next(RunDirectory(tmp_path / "out").layers())
    ids = torch.randint(3, 97, (1, 12))
    with torch.no_grad():
        assert torch.equal(
            load_run_model(tmp_path / "out")(ids).logits, discquant.load(tmp_path / "out")(ids).logits
        )


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block whose rows fill the blocks of K types."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("grid", "name", "bits"),
    [
        (GridConfig.of_kind("q4_k"), "gguf", 4.5),
        (GridConfig.of_kind("q2_k"), "gguf", 2.625),
        (GridConfig.of_kind("q3_k"), "gguf", 3.4375),
        (GridConfig.of_kind("q5_k"), "gguf", 5.5),
        (GridConfig.of_kind("q6_k"), "gguf", 6.5625),
        (GridConfig.of_kind("q5_0"), "gguf", 5.5),
        (GridConfig.of_kind("iq4_xs"), "gguf", 4.25),
        (GridConfig.of_kind("q4_1"), "gguf", 5),
        (GridConfig(3, 64, True), "compressed-tensors", 3.25),
        (GridConfig(4, 32, False), "compressed-tensors", 4.625),
        # 3-bit codes are stored as Q4_0, with a scale for 32 columns; GPTQ keeps zero points of symmetric grids too.
        (GridConfig(3, 64, True), "gguf", 4.5),
        (GridConfig(3, 64, True), "gptq", 3 + 19 / 64),
    ],
)
def test_bits_per_weight_are_one_number(
    wide_dir: Path, dataset: str, tmp_path: Path, grid: GridConfig, name: str, bits: float
) -> None:
    """A run, its file's manifest, `inspect` of both and `evaluate` agree; a run without a file says the grid's."""
    out = tmp_path / "out"
    summary = Pipeline(wide_dir, out, _config(dataset, grid, name)).execute()
    manifest = json.loads((out / name / "discquant_manifest.json").read_text(encoding="utf-8"))
    assert summary["sizes"]["bits_per_weight"] == manifest["bits_per_weight"] == bits
    assert inspect(out)["bits_per_weight"] == inspect(out / name)["bits_per_weight"] == bits
    assert f"{bits:.3f} bits per quantized weight" in (out / name / "README.md").read_text(encoding="utf-8")
    assert bits_per_weight(out / name) == bits
    bare = Pipeline(wide_dir, tmp_path / "bare", _config(dataset, grid, "none")).execute()
    own = bits if grid.kind != "uniform" or name == "compressed-tensors" else 3.25
    assert bare["sizes"]["bits_per_weight"] == inspect(tmp_path / "bare")["bits_per_weight"] == own


def test_refused_before_any_work(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    for formats, grid, error in (
        ("gptq,nonsense", GridConfig(4, 32, True), ConfigError),
        ("gptq", GridConfig.of_kind("nvfp4"), UnrepresentableError),
        ("awq", GridConfig(3, 32, True), UnrepresentableError),
        # Each layer fits, but rows narrower than the group are planned whole, and AWQ states one group size.
        ("awq", GridConfig(4, 96, True), UnrepresentableError),
        # What only scales and offsets show: there is no bfloat16 number for them.
        ("mlx", GridConfig(4, 32, False), UnrepresentableError),
        ("mlx", GridConfig.of_kind("q4_1"), UnrepresentableError),
        ("compressed-tensors", GridConfig.of_kind("q4_0"), UnrepresentableError),
    ):
        with pytest.raises(error):
            Pipeline(model_dir, tmp_path / "out", _config(dataset, grid, formats)).execute()
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="format"):
        QuantizeConfig(format=" , ")


@pytest.mark.parametrize(
    ("formats", "share"), [("compressed-tensors,gptq", 1.0), ("compressed-tensors,gguf", 1.3)]
)
def test_room_for_all_formats(
    formats: str, share: float, wide_dir: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that has room for either is not enough for both; `share`: of the original's bytes that are free."""
    size = sum(info.num_bytes for info in Checkpoint(wide_dir).tensors.values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(share * size)))
    monkeypatch.setattr("discquant.run.planned.free_disk", lambda out: 1e12)
    with pytest.raises(DiskSpaceError, match=r"(MB|bytes) free"):
        Pipeline(wide_dir, tmp_path / "out", _config(dataset, GridConfig(4, 32), formats)).execute()
    assert not (tmp_path / "out").exists()
    for name in formats.split(","):
        Pipeline(wide_dir, tmp_path / name, _config(dataset, GridConfig(4, 32), name)).execute()


@pytest.mark.parametrize("grid", [GridConfig.of_kind("q4_1"), GridConfig(3, 32, False)])
def test_formats_are_asked_in_the_dtype_of_the_source(
    model_dir: Path, dataset: str, tmp_path: Path, grid: GridConfig
) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float16).save_pretrained(tmp_path / "half")
    Pipeline(tmp_path / "half", tmp_path / "out", _config(dataset, grid, "mlx")).execute()
    layers = {layer.name: layer for layer in RunDirectory(tmp_path / "out").coded_layers()}
    for layer in registry.by_name("mlx").read(tmp_path / "out" / "mlx"):
        assert torch.equal(layer.q, layers[layer.name].q)


def test_store_and_restore() -> None:
    scale, zero = torch.rand(3, 2).half() + 0.1, torch.full((3, 2), 7, dtype=torch.uint8)
    block = (torch.rand(3, 4) * 100 + 1).to(torch.float8_e4m3fn)
    grids = [
        UniformGrid(3, 32, True, scale),
        UniformGrid(4, 32, False, -scale, zero, g_idx=torch.randperm(64) // 32),
        AffineGrid(4, 32, scale, -scale, torch.float16),
        TableGrid.nf4(scale.float(), 32),
        TableGrid.mxfp4(torch.full((3, 2), 120, dtype=torch.uint8)),
        TableGrid.nvfp4(block, torch.tensor([100.0])),
        TableGrid.iq4(-scale, "iq4_xs"),
    ]
    for grid in grids:
        tensors, facts = store(grid)
        again = restore(tensors, facts)
        assert type(again) is type(grid)
        q = torch.randint(0, 2**grid.num_bits, (3, 64), dtype=torch.uint8)
        assert torch.equal(again.dequantize(q, torch.float32), grid.dequantize(q, torch.float32))
        assert store(again)[1] == facts
    with pytest.raises(ValueError, match="scale"):
        restore({}, {"num_bits": 4, "group_size": 32})
