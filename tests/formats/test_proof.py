# SPDX-License-Identifier: Apache-2.0
"""Damage that the proof and the loader find."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from discquant.errors import CheckpointError, MissingModelError, ProofError
from discquant.formats import (
    Checkpoint,
    QuantizedLinear,
    export_compressed_tensors,
    load_quantized,
    prove,
)

Layers = Callable[..., Iterator[QuantizedLinear]]


@pytest.fixture
def damaged(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(exported, tmp_path / "copy")
    return tmp_path / "copy"


def damage_tensor(path: Path, name: str, place: int = 0) -> None:
    """Flip one bit of one tensor, keeping the file sound."""
    file = path / "model.safetensors"
    info = Checkpoint(path).tensors[name]
    raw = bytearray(file.read_bytes())
    raw[info.start + place] ^= 1
    file.write_bytes(raw)


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: damage_tensor(path, f"{UP}.weight_packed", 5), rf"{UP}: codes: 1 values differ"),
        (lambda path: damage_tensor(path, f"{UP}.weight_scale"), rf"{UP}: scale: 1 values differ, the first at \[0"),
        (lambda path: damage_tensor(path, f"{UP}.weight_shape"), "weight_shape is not"),
        (lambda path: damage_tensor(path, "model.norm.weight"), "norm.weight is not the source's byte for byte"),
        (lambda path: change_tensors(path, lambda t: t.pop("model.norm.weight")), "tensors are missing from the file"),
        (lambda path: change_tensors(path, lambda t: t.pop(f"{UP}.weight_scale")), f"{UP}: weight_scale is missing"),
        (lambda path: change_tensors(path, lambda t: t.update(more=torch.ones(1))), "that nobody asked for: .'more'."),
        (lambda path: change_tensors(path, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()})),
         "changed dtype or shape"),
    ],
)  # fmt: skip
def test_proof_finds_damage(
    damage: Callable[[Path], None], message: str, damaged: Path, llama_dir: Path, make_layers: Layers
) -> None:
    (damaged / "discquant_manifest.json").unlink()
    prove(llama_dir, damaged, make_layers(llama_dir, 3, 32, True))
    damage(damaged)
    with pytest.raises(ProofError, match=message):
        prove(llama_dir, damaged, make_layers(llama_dir, 3, 32, True))


def test_proof_checks_shard_hashes(damaged: Path, llama_dir: Path, make_layers: Layers) -> None:
    """The same tensors in a file with other bytes: only the manifest can tell."""
    change_tensors(damaged, lambda tensors: None)
    with pytest.raises(ProofError, match=r"model\.safetensors does not have the hash of the manifest"):
        prove(llama_dir, damaged, make_layers(llama_dir, 3, 32, True))


def test_proof_checks_the_configuration(damaged: Path, llama_dir: Path, make_layers: Layers) -> None:
    text = (damaged / "config.json").read_text()
    for before, after, message in (
        ('"num_bits": 3', '"num_bits": 4', "config.json says num_bits = 4, the layer has 3"),
        ('"group_size": 32', '"group_size": 64', "config.json says group_size = 64, the layer has 32"),
        ('"lm_head"\n', f'"{UP}"\n', f"config.json tells engines to ignore {UP}"),
    ):
        assert text.count(before) == 1
        (damaged / "config.json").write_text(text.replace(before, after))
        with pytest.raises(ProofError, match=message):
            prove(llama_dir, damaged, make_layers(llama_dir, 3, 32, True))


def test_proof_fails_before_anything_appears(llama_dir: Path, make_layers: Layers, tmp_path: Path) -> None:
    def others() -> Iterator[QuantizedLinear]:
        for layer in make_layers(llama_dir, 3, 32, True):
            q = layer.q.clone()
            q[3, 4] ^= 1
            yield dataclasses.replace(layer, q=q)

    with pytest.raises(ProofError, match=r"codes: 1 values differ, the first at \[3, 4\]"):
        export_compressed_tensors(
            llama_dir, tmp_path / "out", make_layers(llama_dir, 3, 32, True), prove_from=others
        )
    assert list(tmp_path.iterdir()) == []


def test_load_refuses(damaged: Path, llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is an ordinary model"):
        load_quantized(llama_dir)
    with pytest.raises(MissingModelError):
        load_quantized(tmp_path / "nowhere")
    (damaged / "discquant_manifest.json").unlink()
    change_tensors(damaged, lambda tensors: tensors.pop("model.norm.weight"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            CheckpointError, match=r"does not fit LlamaForCausalLM: missing_keys .'model\.norm\.weight'"
        ):
            load_quantized(damaged)
