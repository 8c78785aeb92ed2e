# SPDX-License-Identifier: Apache-2.0
"""Rotated models compute what the original computes, in every family; and what cannot be rotated is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from discquant.cli import app
from discquant.errors import CheckpointError
from discquant.formats.card import origin_of
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.source import open_source
from discquant.rotation import ROTATION, rotate
from discquant.rotation.places import FAMILIES


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(36).view(3, 12)).logits


@pytest.mark.parametrize(
    ("family", "values", "more"),
    [
        *((family, True, {}) for family in FAMILIES),
        ("llama", False, {}),
        ("phi3", False, {}),
        # A clamp of single values does not commute with a rotation of them.
        ("olmoe", False, {"clip_qkv": 0.5}),
        ("mistral", True, {"head_dim": 16, "sliding_window": 4}),
        ("qwen2_moe", True, {"mlp_only_layers": [0], "qkv_bias": False}),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, bool)) else "-".join(value),
)
def test_same_function(
    family: str, values: bool, more: dict[str, Any], tmp_path: Path, save: Callable[..., Path]
) -> None:
    source = save(tmp_path / "model", family, **more)
    record = rotate(source, tmp_path / "rotated", seed=3, values=values)
    want, found = logits(source), logits(tmp_path / "rotated")
    assert (found - want).abs().max() <= 2e-4 * want.abs().max()
    assert bool(record["values"]) == values
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "rotated"))
    moved = [name for name in before if before[name].dim() == 2 and torch.equal(before[name], after[name])]
    assert not moved
    if "model.layers.0.self_attn.q_proj.bias" in before:
        name = "model.layers.0.self_attn.q_proj.bias"
        assert torch.equal(before[name], after[name])


def test_tied_head_gets_its_own(tmp_path: Path, save: Callable[..., Path]) -> None:
    source = save(tmp_path / "model", "qwen3")
    assert "lm_head.weight" not in Checkpoint(source).tensors
    record = rotate(source, tmp_path / "rotated")
    assert record["head_untied"]
    assert "lm_head.weight" in Checkpoint(tmp_path / "rotated").tensors
    assert json.loads((tmp_path / "rotated" / "config.json").read_text())["tie_word_embeddings"] is False


def matrix(signs: str, size: int) -> torch.Tensor:
    """R of a record's signs, for a power of two: H diag(signs) / sqrt(n), float64."""
    bits = "".join(f"{int(digit, 16):04b}" for digit in signs)[:size]
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while sylvester.shape[0] < size:
        sylvester = torch.cat((torch.cat((sylvester, sylvester), 1), torch.cat((sylvester, -sylvester), 1)))
    return sylvester * torch.tensor([1.0 if bit == "1" else -1.0 for bit in bits]).double() / size**0.5


def test_signs_undo_it(tmp_path: Path, save: Callable[..., Path]) -> None:
    """The record alone turns the embedding back."""
    source = save(tmp_path / "model", "llama", hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    rotate(source, tmp_path / "rotated", seed=11)
    record = json.loads((tmp_path / "rotated" / ROTATION).read_text())
    name = "model.embed_tokens.weight"
    before, after = (
        load_file(f / "model.safetensors")[name].double() for f in (source, tmp_path / "rotated")
    )
    torch.testing.assert_close(after @ matrix(record["stream"], 32), before, atol=1e-6, rtol=1e-6)


def test_bytes_and_dtypes(tmp_path: Path, save: Callable[..., Path]) -> None:
    """Same arguments, same bytes; another seed, other bytes; dtypes are kept or changed as asked, shards allowed."""
    source = save(tmp_path / "model", "llama", torch.bfloat16)
    for name, options in (
        ("one", {}), ("two", {}), ("three", {"seed": 1}), ("wide", {"dtype": "float32"}),
        ("cut", {"shard_bytes": 4000}),
    ):  # fmt: skip
        rotate(source, tmp_path / name, **options)
    digests = {name: Checkpoint(tmp_path / name).sha256() for name in ("one", "two", "three", "wide", "cut")}
    assert digests["one"] == digests["two"] == digests["cut"]
    assert digests["three"] != digests["one"]
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 3
    kinds = {
        name: {info.dtype for info in Checkpoint(tmp_path / name).tensors.values() if len(info.shape) == 2}
        for name in ("one", "wide")
    }
    assert kinds == {"one": {"BF16"}, "wide": {"F32"}}
    wide = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert wide.get("dtype", wide.get("torch_dtype")) == "float32"
    assert {info.dtype for info in Checkpoint(tmp_path / "wide").tensors.values()} == {"F32"}


def test_rounded_once(tmp_path: Path, save: Callable[..., Path]) -> None:
    """Each bfloat16 weight is the float64 product, computed here with whole matrices, rounded to nearest."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    source = save(tmp_path / "model", "llama", torch.bfloat16, **sizes)
    record = rotate(source, tmp_path / "rotated", seed=5)
    before, after = (load_file(f / "model.safetensors") for f in (source, tmp_path / "rotated"))
    stream, values = matrix(record["stream"], 32), matrix(record["values"][1], 8)
    block = "model.layers.1."
    norm = before[block + "input_layernorm.weight"].double()
    heads = torch.block_diag(values, values)
    products: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "self_attn.q_proj.weight": lambda w: (w * norm) @ stream.t(),
        "self_attn.v_proj.weight": lambda w: heads @ (w * norm) @ stream.t(),
        "self_attn.v_proj.bias": lambda b: heads @ b,
        "self_attn.o_proj.weight": lambda w: stream @ w @ torch.block_diag(heads, heads).t(),
        "mlp.down_proj.weight": lambda w: stream @ w,
        "mlp.down_proj.bias": lambda b: stream @ b,
    }
    for name, product in products.items():
        exact = product(before[block + name].double())
        # Sums in another order differ by 1e-16: seen only where all of a sum cancels.
        same = (after[block + name] == exact.to(torch.bfloat16)) | (exact.abs() < 1e-12)
        assert bool(same.all()), name
        assert int((exact.abs() < 1e-12).sum()) < 5


def test_cards_name_the_original(tmp_path: Path, save: Callable[..., Path]) -> None:
    """What is made from a rotated model says from what; the licence goes along, the signs too."""
    source = save(tmp_path / "model", "llama", torch.bfloat16)
    (source / "README.md").write_text("---\nlicense: mit\n---\n\n# theirs\n")
    rotate(source, tmp_path / "rotated", seed=4)
    card = (tmp_path / "rotated" / "README.md").read_text()
    assert "license: mit" in card
    assert "`model` with its hidden states" in card
    assert "# theirs" not in card
    origin = origin_of(tmp_path / "rotated", "abc")
    assert (origin["name"], origin["sha256"], origin["rotated"]["seed"]) == ("model", "abc", 4)
    assert origin["rotated"]["sha256"] == Checkpoint(source).sha256()
    good = json.loads((tmp_path / "rotated" / ROTATION).read_text())
    for damage in ({}, {**good, "seed": "4"}, {**good, "source": {**good["source"], "name": 5}}):
        (tmp_path / "rotated" / ROTATION).write_text(json.dumps(damage))
        with pytest.raises(CheckpointError, match="does not name the model that was rotated"):
            origin_of(tmp_path / "rotated", "abc")
        with pytest.raises(CheckpointError, match="does not name the model that was rotated"):
            open_source(tmp_path / "rotated")  # before any work on it


def test_through_the_command_line(tmp_path: Path, repo_root: Path) -> None:
    """Rotate, quantize what came of it, and the file's card and manifest name the original."""
    runner, model = CliRunner(), repo_root / "examples" / "tiny_llama"
    rotated, out = tmp_path / "rotated", tmp_path / "out"
    found = runner.invoke(app, ["rotate", str(model), str(rotated), "--seed", "2"])
    assert found.exit_code == 0, found.output
    assert "turned back, its weights are the original's within" in found.output
    words = ["quantize", str(rotated), str(out), "--method", "rtn", "--bits", "3", "--dataset", "arithmetic",
             "--nsamples", "16", "--seqlen", "64", "--baselines", "none",
             "--format", "compressed-tensors,gguf"]  # fmt: skip
    found = runner.invoke(app, words)
    assert found.exit_code == 0, found.output
    served = out / "compressed-tensors"
    assert "`tiny_llama` (rotated, seed 2) rounded by" in (served / "README.md").read_text()
    manifest = json.loads((served / "discquant_manifest.json").read_text())
    assert manifest["source"]["rotated"]["sha256"] == Checkpoint(model).sha256()
    for folder in (served, out / "gguf"):
        assert (folder / ROTATION).read_bytes() == (rotated / ROTATION).read_bytes()


def test_outliers_spread(tmp_path: Path, save: Callable[..., Path]) -> None:
    """What it is for: a channel a hundred times as large as the others no longer is."""
    source = save(tmp_path / "model", "llama")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[name][:, 5] *= 100
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    rotate(source, tmp_path / "rotated")
    after = load_file(tmp_path / "rotated" / "model.safetensors")[name]

    def kurtosis(weight: torch.Tensor) -> float:
        return float(weight.pow(4).mean() / weight.square().mean() ** 2)

    assert kurtosis(tensors[name]) > 20 > 5 > kurtosis(after)
