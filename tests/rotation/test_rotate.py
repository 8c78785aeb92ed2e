# SPDX-License-Identifier: Apache-2.0
"""Rotated models compute what the original computes, in every family; and what cannot be rotated is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from discquant.cli import app
from discquant.errors import CheckpointError, ConfigError, OutputExistsError, ProofError, UnrepresentableError
from discquant.formats.card import origin_of
from discquant.formats.checkpoint import Checkpoint
from discquant.rotation import ROTATION, rotate
from discquant.rotation.places import FAMILIES, places

SMALL = {
    "vocab_size": 40, "hidden_size": 48, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
           "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "gemma": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "mixtral": EXPERTS, "qwen2_moe": EXPERTS, "qwen3_moe": EXPERTS, "olmoe": EXPERTS,
}  # fmt: skip


def save(folder: Path, family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """A random model of a family, every vector of it away from its neutral value."""
    options = {"tie_word_embeddings": False, **SMALL, **MORE.get(family, {}), **more}
    config = transformers.AutoConfig.for_model(family, **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.2 + (tensor.dim() == 1 and "norm" in name) * 0.8)
    model.to(dtype).save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(36).view(3, 12)).logits


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_function(family: str, values: bool, tmp_path: Path) -> None:
    if not values and family not in ("llama", "phi3"):
        return
    source = save(tmp_path / "model", family)
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


def test_tied_head_gets_its_own(tmp_path: Path) -> None:
    source = save(tmp_path / "model", "gemma")
    assert "lm_head.weight" not in Checkpoint(source).tensors
    record = rotate(source, tmp_path / "rotated")
    assert record["head_untied"]
    assert "lm_head.weight" in Checkpoint(tmp_path / "rotated").tensors
    assert json.loads((tmp_path / "rotated" / "config.json").read_text())["tie_word_embeddings"] is False


def test_signs_undo_it(tmp_path: Path) -> None:
    """The record alone turns the embedding back: h = signs * H^T h' / sqrt(n)."""
    source = save(tmp_path / "model", "llama", hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    rotate(source, tmp_path / "rotated", seed=11)
    record = json.loads((tmp_path / "rotated" / ROTATION).read_text())
    bits = "".join(f"{int(digit, 16):04b}" for digit in record["stream"])[:32]
    signs = torch.tensor([1.0 if bit == "1" else -1.0 for bit in bits], dtype=torch.float64)
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while sylvester.shape[0] < 32:
        sylvester = torch.cat((torch.cat((sylvester, sylvester), 1), torch.cat((sylvester, -sylvester), 1)))
    name = "model.embed_tokens.weight"
    before, after = (
        load_file(f / "model.safetensors")[name].double() for f in (source, tmp_path / "rotated")
    )
    torch.testing.assert_close(after @ sylvester / 32**0.5 * signs, before, atol=1e-6, rtol=1e-6)


def test_bytes_and_dtypes(tmp_path: Path) -> None:
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
    # Rounded once: the wide file, rounded, is the narrow one.
    narrow, broad = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "wide"))
    for name, tensor in narrow.items():
        assert (tensor.float() - broad[name].float()).abs().max() <= 2**-8 * broad[name].float().abs().max()


def test_cards_name_the_original(tmp_path: Path) -> None:
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
    (tmp_path / "rotated" / ROTATION).write_text("{}")
    with pytest.raises(CheckpointError, match="names no source"):
        origin_of(tmp_path / "rotated", "abc")


def test_through_the_command_line(tmp_path: Path, repo_root: Path) -> None:
    """Rotate, quantize what came of it, and the file's card and manifest name the original."""
    runner, model = CliRunner(), repo_root / "examples" / "tiny_llama"
    rotated, out = tmp_path / "rotated", tmp_path / "out"
    found = runner.invoke(app, ["rotate", str(model), str(rotated), "--seed", "2"])
    assert found.exit_code == 0, found.output
    assert "turned back it is the original within" in found.output
    words = ["quantize", str(rotated), str(out), "--method", "rtn", "--bits", "3", "--dataset", "arithmetic",
             "--nsamples", "16", "--seqlen", "64", "--baselines", "none"]  # fmt: skip
    found = runner.invoke(app, words)
    assert found.exit_code == 0, found.output
    served = out / "compressed-tensors"
    assert "`tiny_llama` (rotated, seed 2) rounded by" in (served / "README.md").read_text()
    manifest = json.loads((served / "discquant_manifest.json").read_text())
    assert manifest["source"]["rotated"]["sha256"] == Checkpoint(model).sha256()
    assert (served / ROTATION).read_bytes() == (rotated / ROTATION).read_bytes()


def test_outliers_spread(tmp_path: Path) -> None:
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


def test_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "model", "llama")
    config = json.loads((source / "config.json").read_text())

    def refused(
        error: type[Exception], message: str, change: dict[str, Any] | None = None, **options: Any
    ) -> None:
        (source / "config.json").write_text(json.dumps({**config, **(change or {})}))
        with pytest.raises(error, match=message):
            rotate(source, tmp_path / "refused", **options)
        (source / "config.json").write_text(json.dumps(config))
        assert not (tmp_path / "refused").exists()

    refused(UnrepresentableError, "type gemma2 are not known", {"model_type": "gemma2"})
    refused(UnrepresentableError, "does not fit config.json", {"hidden_size": 96})
    refused(UnrepresentableError, "does not fit config.json", {"num_hidden_layers": 1})
    refused(CheckpointError, "quantized already", {"quantization_config": {"quant_method": "gptq"}})
    refused(ConfigError, "dtype must be one of", dtype="float8")
    refused(ConfigError, "device must be", device="gpu")
    rotate(source, tmp_path / "once")
    with pytest.raises(CheckpointError, match="rotated already"):
        rotate(tmp_path / "once", tmp_path / "twice")
    with pytest.raises(OutputExistsError):
        rotate(source, tmp_path / "once")
    with pytest.raises(UnrepresentableError, match=r"model.layers.0.adapter.weight has no known place"):
        places("llama", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.adapter.weight"])
    with pytest.raises(UnrepresentableError, match=r"model.norm.weight is not in the checkpoint"):
        places("llama", ["lm_head.weight"])


def test_sizes_without_a_matrix(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    source = save(tmp_path / "model", "llama", hidden_size=48, head_dim=7 * 2, **heads)
    with pytest.raises(UnrepresentableError, match=r"no Hadamard matrix of size head_dim = 14 .*--no-values"):
        rotate(source, tmp_path / "rotated")
    rotate(source, tmp_path / "rotated", values=False)
    source = save(tmp_path / "odd", "llama", hidden_size=50, num_attention_heads=5, num_key_value_heads=5)
    with pytest.raises(UnrepresentableError, match="no Hadamard matrix of size hidden_size = 50"):
        rotate(source, tmp_path / "refused")


def test_a_wrong_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison reads what was written: one weight changed on its way is an error, and nothing appears."""
    from discquant.rotation import model as job

    source, real = save(tmp_path / "model", "llama"), job.turned

    def spoiled(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        out = real(tensor, *args)
        out.view(-1)[3] += 0.01
        return out

    monkeypatch.setattr(job, "turned", spoiled)
    with pytest.raises(ProofError, match="turned back differs"):
        rotate(source, tmp_path / "rotated")
    assert not (tmp_path / "rotated").exists()
