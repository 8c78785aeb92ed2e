# SPDX-License-Identifier: Apache-2.0
"""NVFP4 and MXFP4: the library's own decompressor gives back the solver's weights, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from discquant.config import GridConfig
from discquant.errors import CheckpointError, UnrepresentableError
from discquant.formats import Checkpoint, CodedLayer
from discquant.formats.registry import by_name
from discquant.grids import place_grid

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layers_of(source: Path, kind: str) -> Iterator[CodedLayer]:
    checkpoint = Checkpoint(source)
    for key in sorted(checkpoint.tensors):
        name = key.removesuffix(".weight")
        if key != name and name.rpartition(".")[2] in LINEAR:
            weight = checkpoint.read(key).float()
            grid = place_grid(weight, GridConfig.of_kind(kind))  # type: ignore[arg-type]
            yield CodedLayer(name, grid.nearest(weight), grid)


@pytest.fixture(params=["nvfp4", "mxfp4"])
def written(request: pytest.FixtureRequest, llama_dir: Path, tmp_path: Path) -> tuple[str, Path]:
    kind = request.param
    by_name("compressed-tensors").write(
        Checkpoint(llama_dir), tmp_path / kind, layers_of(llama_dir, kind),
        prove_from=lambda: layers_of(llama_dir, kind),
    )  # fmt: skip
    return kind, tmp_path / kind


def test_library_decompresses_to_the_same_bits(written: tuple[str, Path], llama_dir: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    kind, out = written
    checkpoint = Checkpoint(out)
    said = QuantizationConfig.model_validate(checkpoint.config()["quantization_config"])
    assert said.format == f"{kind}-pack-quantized"
    (scheme,) = said.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(said.format)
    assert compressor.can_compress(torch.nn.Linear, scheme)
    for layer in layers_of(llama_dir, kind):
        prefix = f"{layer.name}.weight_"
        stored = {
            key.rpartition(".")[2]: checkpoint.read(key)
            for key in checkpoint.tensors
            if key.startswith(prefix)
        }
        assert set(stored) == set(compressor.compression_param_names(scheme))
        weight = compressor.decompress(stored, scheme)["weight"]
        ours = layer.dequantize(weight.dtype)
        assert weight.dtype == torch.bfloat16
        # Signs of zero included.
        assert torch.equal(weight.view(torch.int16), ours.view(torch.int16))


def test_read_and_rewrite(written: tuple[str, Path], llama_dir: Path, tmp_path: Path) -> None:
    kind, out = written
    chosen = by_name("compressed-tensors")
    found = {layer.name: layer for layer in chosen.read(out)}
    for layer in layers_of(llama_dir, kind):
        assert torch.equal(found[layer.name].q, layer.q)
        assert torch.equal(found[layer.name].grid.scale, layer.grid.scale)
    name = layer.name
    other = (15 - layer.q).contiguous()
    manifest = chosen.rewrite(out, tmp_path / "again", {name: other})
    assert manifest["byte_diff"]["outside"] == 0
    assert set(manifest["byte_diff"]["layers"]) == {name}
    again = {layer.name: layer for layer in chosen.read(tmp_path / "again")}
    assert torch.equal(again[name].q, other)
    assert {row.kind for row in chosen.describe(out).layers} == {kind}


def test_global_scales_that_an_engine_would_drop(written: tuple[str, Path]) -> None:
    kind, out = written  # every matrix has a grid of its own
    found = by_name("compressed-tensors").describe(out).problems
    assert len(found) == (4 if kind == "nvfp4" else 0)
    assert all("one global scale" in text for text in found)


def test_global_scales_where_the_first_part_has_none(llama_dir: Path, tmp_path: Path) -> None:
    rest = [layer for layer in layers_of(llama_dir, "nvfp4") if not layer.name.endswith("q_proj")]
    by_name("compressed-tensors").write(Checkpoint(llama_dir), tmp_path / "out", rest)
    found = by_name("compressed-tensors").describe(tmp_path / "out").problems
    assert len([text for text in found if "q_proj, k_proj, v_proj and keep one global scale" in text]) == 2


def test_nf4_has_no_served_format(llama_dir: Path, tmp_path: Path) -> None:
    chosen = by_name("compressed-tensors")
    with pytest.raises(UnrepresentableError, match="serves no nf4"):
        chosen.check((64, 64), GridConfig.of_kind("nf4"), "layer")
    with pytest.raises(UnrepresentableError, match="serves no nf4"):
        chosen.write(Checkpoint(llama_dir), tmp_path / "out", layers_of(llama_dir, "nf4"))
    assert not (tmp_path / "out").exists()


def test_a_minimum_per_group_is_said_in_words() -> None:
    """Kinds have inner names; a refusal says what the user knows."""
    for kind in ("compressed-tensors", "gptq", "awq"):
        with pytest.raises(UnrepresentableError, match=r"a minimum per group \(as Q4_1, Q4_K\)") as refused:
            by_name(kind).check((64, 64), GridConfig.of_kind("q4_1"), "layer")
        assert "affine" not in str(refused.value) and "layer" in str(refused.value)


def test_damaged_scales_are_named(written: tuple[str, Path]) -> None:
    kind, out = written
    checkpoint = Checkpoint(out)
    name = next(layer.name for layer in by_name("compressed-tensors").read(out))
    key = f"{name}.weight_global_scale" if kind == "nvfp4" else f"{name}.weight_scale"
    info = checkpoint.tensors[key]
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[info.start : info.start + 4] = b"\xff\xff\xff\xff"  # float32 NaN; e8m0 NaN
    (out / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=name):
        list(by_name("compressed-tensors").read(out))
