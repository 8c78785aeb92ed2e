# SPDX-License-Identifier: Apache-2.0
"""What cannot be rotated is refused before anything appears; wrong files are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from discquant.errors import CheckpointError, ConfigError, OutputExistsError, ProofError, UnrepresentableError
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.source import open_source
from discquant.rotation import model as job
from discquant.rotation import rotate
from discquant.rotation.places import places


def test_refused(tmp_path: Path, save: Callable[..., Path]) -> None:
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
    # Code of a folder is not run, whatever its model type claims.
    refused(
        UnrepresentableError,
        "type mine are not known",
        {"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}},
    )
    refused(UnrepresentableError, "does not fit config.json", {"hidden_size": 96})
    refused(UnrepresentableError, "does not fit config.json", {"num_key_value_heads": 6})
    refused(UnrepresentableError, r"model.layers.1.* has no known place", {"num_hidden_layers": 1})
    refused(UnrepresentableError, r"lacks model.layers.2.input_layernorm.weight", {"num_hidden_layers": 3})
    refused(UnrepresentableError, "clip_qkv.*--no-values", {"model_type": "olmoe", "clip_qkv": 0.5})
    refused(CheckpointError, "ties the output head .* differ", {"tie_word_embeddings": True})
    refused(CheckpointError, "quantized already", {"quantization_config": {"quant_method": "gptq"}})
    refused(ConfigError, "dtype must be one of", dtype="float8")
    refused(ConfigError, "device must be", device="gpu")
    for seed in (-1, 2**32):
        refused(ConfigError, "seed must be in", seed=seed)
    rotate(source, tmp_path / "once")
    with pytest.raises(CheckpointError, match="rotated already"):
        rotate(tmp_path / "once", tmp_path / "twice")
    with pytest.raises(OutputExistsError):
        rotate(source, tmp_path / "once")


def test_missing_and_unknown_tensors(tmp_path: Path, save: Callable[..., Path]) -> None:
    names = [*Checkpoint(save(tmp_path / "model", "llama")).tensors]
    with pytest.raises(UnrepresentableError, match=r"model.layers.0.adapter.weight has no known place"):
        places([*names, "model.layers.0.adapter.weight"], 2)
    for lost, told in (
        ("model.embed_tokens", "model.embed_tokens"), ("lm_head", "lm_head"), ("model.norm", "model.norm"),
        ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp"),
    ):  # fmt: skip
        with pytest.raises(UnrepresentableError, match=f"lacks {told}"):
            places([name for name in names if name != f"{lost}.weight"], 2)


def change(folder: Path, name: str, tensor: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: tensor}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", ()), ("model.norm.weight", (1,)), ("model.layers.0.input_layernorm.weight", (7,)),
        ("model.layers.0.self_attn.q_proj.weight", (48,)), ("model.layers.0.self_attn.v_proj.weight", (16, 48)),
        ("model.layers.0.self_attn.o_proj.weight", (48, 40)), ("model.layers.1.mlp.down_proj.weight", (20,)),
        ("model.layers.1.self_attn.v_proj.bias", ()), ("model.layers.1.mlp.up_proj.weight", (0, 48)),
        ("lm_head.weight", (40, 24)),
    ],
)  # fmt: skip
def test_shapes(name: str, shape: tuple[int, ...], tmp_path: Path, save: Callable[..., Path]) -> None:
    source = save(tmp_path / "model", "llama")
    change(source, name, torch.ones(shape))
    with pytest.raises(UnrepresentableError, match=f"{name} has the shape .* does not fit config.json"):
        rotate(source, tmp_path / "rotated")


def test_dtypes_too_narrow(tmp_path: Path, save: Callable[..., Path]) -> None:
    """What would overflow or vanish is said with the dtype, and nothing appears."""
    source = save(tmp_path / "model", "llama")
    name = "model.layers.0.mlp.down_proj.weight"
    for values, error in (
        (torch.full((48, 20), 6e4), UnrepresentableError),
        (torch.randn(48, 20) * 1e-8, ProofError),
    ):
        change(source, name, values)
        with pytest.raises(error, match=f"{name} .*float16.*--dtype"):
            rotate(source, tmp_path / "rotated", dtype="float16")
        assert not (tmp_path / "rotated").exists()


def test_links_and_own_code(tmp_path: Path, save: Callable[..., Path]) -> None:
    """A link to an empty folder is filled; code that an original names is not asked for any more."""
    source = save(tmp_path / "model", "llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "code.Config"}}))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    rotate(source, tmp_path / "link")
    assert open_source(tmp_path / "real").model is not None


def test_sizes_without_a_matrix(tmp_path: Path, save: Callable[..., Path]) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    source = save(tmp_path / "model", "llama", hidden_size=48, head_dim=14, **heads)
    with pytest.raises(UnrepresentableError, match=r"no Hadamard matrix of size head_dim = 14 .*--no-values"):
        rotate(source, tmp_path / "rotated")
    rotate(source, tmp_path / "rotated", values=False)
    source = save(tmp_path / "odd", "llama", hidden_size=50, num_attention_heads=5, num_key_value_heads=5)
    with pytest.raises(UnrepresentableError, match="no Hadamard matrix of size hidden_size = 50"):
        rotate(source, tmp_path / "refused")


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"]
)
def test_wrong_bytes_are_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[..., Path]
) -> None:
    """Norms, copied and rotated tensors: one bit on disk that is not what was computed."""

    def spoil(folder: Path, *args: Any) -> None:
        info = Checkpoint(folder).tensors[name]
        data = bytearray(info.file.read_bytes())
        data[info.start] ^= 1
        info.file.write_bytes(data)

    source = save(tmp_path / "model", "llama")
    monkeypatch.setattr(job, "_write_config", spoil)
    with pytest.raises(ProofError, match=f"{name} on disk is not what was written"):
        rotate(source, tmp_path / "rotated")
    assert not (tmp_path / "rotated").exists()


def test_a_wrong_rotation_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[..., Path]
) -> None:
    """What was computed must turn back."""
    source, real = save(tmp_path / "model", "llama"), job.turned

    def spoiled(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        out = real(tensor, *args)
        out.view(-1)[3] += 0.01
        return out

    monkeypatch.setattr(job, "turned", spoiled)
    with pytest.raises(ProofError, match="turned back differs"):
        rotate(source, tmp_path / "rotated")
    assert not (tmp_path / "rotated").exists()
