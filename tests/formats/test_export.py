# SPDX-License-Identifier: Apache-2.0
"""Whole directories: what an export holds, real consumers, damage that the proof finds, kills that leave nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from discquant.errors import (
    UnrepresentableError,
)
from discquant.formats import (
    Checkpoint,
    QuantizedLinear,
    export_compressed_tensors,
    load_quantized,
    prove,
    read_layers,
    read_manifest,
)

Layers = Callable[..., Iterator[QuantizedLinear]]
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 96


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


def test_keys_and_untouched_bytes(exported: Path, llama_dir: Path, make_layers: Layers) -> None:
    source, written = load_file(llama_dir / "model.safetensors"), load_file(exported / "model.safetensors")
    names = [layer.name for layer in make_layers(llama_dir, 3, 32, True)]
    assert len(names) == 14
    replaced = {f"{name}.weight" for name in names}
    added = {
        f"{name}.{suffix}" for name in names for suffix in ("weight_packed", "weight_scale", "weight_shape")
    }
    assert written.keys() == source.keys() - replaced | added
    for name in source.keys() - replaced:
        assert torch.equal(source[name].view(torch.int16), written[name].view(torch.int16))
    assert any(name.endswith("bias") for name in source.keys() - replaced)


def test_side_files(exported: Path, llama_dir: Path) -> None:
    assert (exported / "tokenizer.json").read_bytes() == (llama_dir / "tokenizer.json").read_bytes()
    assert (exported / "generation_config.json").read_bytes() == (
        llama_dir / "generation_config.json"
    ).read_bytes()
    card = (exported / "README.md").read_text()
    assert card.startswith("---\n") and "the card of the original model" not in card
    config = json.loads((exported / "config.json").read_text())
    quantization = config.pop("quantization_config")
    original = json.loads((llama_dir / "config.json").read_text())
    assert {name: config[name] for name in original} == original  # older names: test_older_names.py
    assert quantization["ignore"] == ["lm_head"]


def test_manifest(exported: Path, llama_dir: Path) -> None:
    manifest = read_manifest(exported)
    stored = load_file(exported / "model.safetensors")
    assert manifest["tensors"].keys() == stored.keys()
    for name, row in manifest["tensors"].items():
        data = stored[name].contiguous().view(torch.uint8).numpy().tobytes()
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert row["shape"] == list(stored[name].shape)
        assert row["copied"] == ("weight_" not in name)
    file = exported / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert manifest["shards"] == {file.name: {"bytes": file.stat().st_size, "sha256": digest}}
    assert manifest["source"]["sha256"] == Checkpoint(llama_dir).sha256()
    assert manifest["recipe"] == {"seed": 5}
    weights = sum(row["shape"][0] * row["shape"][1] for row in manifest["layers"].values())
    assert manifest["quantized_weights"] == weights
    # 3 bits, 16 bits of scale for 32 weights; the shape that each layer keeps is not counted.
    assert manifest["bits_per_weight"] == 3 + 16 / 32
    assert manifest["requires"] == {"compressed-tensors": "0.18.0"}
    assert str(llama_dir.parent) not in json.dumps(manifest), "the manifest holds a path of this machine"


def test_same_arguments_same_bytes(
    exported: Path, llama_dir: Path, make_layers: Layers, tmp_path: Path
) -> None:
    layers = make_layers(llama_dir, 3, 32, True)
    export_compressed_tensors(llama_dir, tmp_path / "again", layers, recipe={"seed": 5})
    assert contents(tmp_path / "again") == contents(exported)


def test_layers_read_back(exported: Path, llama_dir: Path, make_layers: Layers) -> None:
    expected = {layer.name: layer for layer in make_layers(llama_dir, 3, 32, True)}
    found = {layer.name: layer for layer in read_layers(exported)}
    assert found.keys() == expected.keys()
    for name, layer in found.items():
        assert torch.equal(layer.q, expected[name].q)
        assert torch.equal(layer.scale.float(), expected[name].scale)
        assert (layer.num_bits, layer.group_size, layer.symmetric) == (3, 32, True)


def test_sharded_and_single_hold_the_same(
    exported: Path, llama_dir: Path, make_layers: Layers, tmp_path: Path
) -> None:
    layers = make_layers(llama_dir, 3, 32, True)
    out = tmp_path / "sharded"
    manifest = export_compressed_tensors(llama_dir, out, layers, shard_bytes=20_000)
    assert len(manifest["shards"]) > 2
    assert Checkpoint(out).sha256() == Checkpoint(exported).sha256()
    prove(llama_dir, out, make_layers(llama_dir, 3, 32, True))
    assert torch.equal(load_quantized(out)(TOKENS).logits, load_quantized(exported)(TOKENS).logits)


CASES = [
    (3, 32, True, torch.bfloat16),
    (4, 64, True, torch.bfloat16),
    (3, -1, True, torch.float32),
    (4, 32, True, torch.float16),
    (4, 32, False, torch.bfloat16),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("num_bits", "group_size", "symmetric", "dtype"),
    CASES,
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_real_consumer(
    num_bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    make_llama: Callable[..., Path],
    make_layers: Layers,
    tmp_path: Path,
) -> None:
    """transformers with compressed-tensors, our own load, and the source with rounded weights put in: the same logits.

    The bound is zero. All three run the same modules on the same weights: q - z has at most nine bits and a 16-bit
    scale at most eleven, so their float32 product is exact and each path rounds it to the model's dtype once.
    """
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    source, out = make_llama(tmp_path / "model", dtype), tmp_path / "out"

    def layers() -> Iterator[QuantizedLinear]:
        return make_layers(source, num_bits, group_size, symmetric)

    export_compressed_tensors(source, out, layers(), prove_from=layers)
    solved = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        original = solved(TOKENS).logits
        for layer in layers():
            solved.get_parameter(f"{layer.name}.weight").copy_(layer.dequantize(dtype))
        expected = solved(TOKENS).logits
        ours = load_quantized(out)
        assert next(ours.parameters()).dtype == dtype
        assert torch.equal(ours(TOKENS).logits, expected)
        theirs = AutoModelForCausalLM.from_pretrained(out).eval()
        assert torch.equal(theirs(TOKENS).logits, expected)
    assert not torch.equal(original, expected), (
        "quantization changed nothing: the test would not notice a wrong load"
    )


def test_tied_head(make_llama: Callable[..., Path], make_layers: Layers, tmp_path: Path) -> None:
    source, out = (
        make_llama(tmp_path / "model", tie_word_embeddings=True, attention_bias=False),
        tmp_path / "out",
    )
    assert "lm_head.weight" not in Checkpoint(source).tensors
    export_compressed_tensors(source, out, make_layers(source, 4, 32, True))
    assert json.loads((out / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
    model = load_quantized(out, torch.float32)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    embedding = Checkpoint(source).read("model.embed_tokens.weight")
    assert torch.equal(model.lm_head.weight, embedding.float())
    head = QuantizedLinear("lm_head", torch.zeros(96, 64, dtype=torch.uint8), torch.ones(96, 2), None, 4, 32)
    with pytest.raises(UnrepresentableError, match=r"no lm_head\.weight; a layer that shares its weight"):
        export_compressed_tensors(source, tmp_path / "no", [head])


def test_biases_and_dtype_on_load(exported: Path, llama_dir: Path) -> None:
    model = load_quantized(exported, torch.float32)
    name = "model.layers.1.self_attn.k_proj"
    layer = next(layer for layer in read_layers(exported) if layer.name == name)
    assert torch.equal(model.get_parameter(f"{name}.weight"), layer.dequantize(torch.float32))
    assert torch.equal(
        model.get_parameter(f"{name}.bias"), Checkpoint(llama_dir).read(f"{name}.bias").float()
    )
    assert not model.training


def test_mixed_schemes(llama_dir: Path, make_layers: Layers, tmp_path: Path) -> None:
    def layers() -> Iterator[QuantizedLinear]:
        fours = {layer.name: layer for layer in make_layers(llama_dir, 4, 64, True)}
        for layer in make_layers(llama_dir, 3, 32, True):
            yield fours[layer.name] if "mlp" in layer.name else layer

    out = tmp_path / "out"
    export_compressed_tensors(llama_dir, out, layers(), prove_from=layers)
    assert {layer.num_bits for layer in read_layers(out) if "mlp" in layer.name} == {4}
    load_quantized(out)


def test_some_layers_only(llama_dir: Path, make_layers: Layers, tmp_path: Path) -> None:
    """What is not quantized is named to the engine."""
    chosen = [layer for layer in make_layers(llama_dir, 3, 32, True) if "layers.0" not in layer.name]
    out = tmp_path / "out"
    export_compressed_tensors(llama_dir, out, chosen, prove_from=lambda: chosen)
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert len([name for name in ignored if name.startswith("model.layers.0.")]) == 7
    assert "model.embed_tokens" not in ignored
    assert len(list(read_layers(out))) == 7
