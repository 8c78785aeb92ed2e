# SPDX-License-Identifier: Apache-2.0
"""Every family of models through GGUF: what is loaded from a file is the rounded model, experts lie in one tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from discquant.config import GridConfig
from discquant.errors import CheckpointError, ProofError, UnrepresentableError
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.formats.gguf import FORMAT
from discquant.formats.gguf_file import GgufFile
from discquant.formats.gguf_model import is_matrix
from discquant.formats.gguf_write import prove, space
from discquant.formats.load import load_quantized
from discquant.formats.scheme import Scheme
from discquant.grids import place_grid

gguf = pytest.importorskip("gguf")
FAMILIES = (
    "llama", "mixtral", "qwen2", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3", "granite", "command-r",
)  # fmt: skip
Make = Callable[..., Path]
Q4_0, Q8_0 = GridConfig.of_kind("q4_0"), GridConfig(8, 32)


def rounded(source: Checkpoint, grid: GridConfig = Q4_0, but: Iterable[str] = ()) -> list[CodedLayer]:
    """Nearest codes of every matrix but the head and those whose names hold a word of `but`."""
    found = []
    for key in source.tensors:
        name = key.removesuffix(".weight")
        if is_matrix(name) and name != key and name != "lm_head" and not any(word in name for word in but):
            weight = source.read(key).float()
            laid = place_grid(weight, grid)
            found.append(CodedLayer(name, laid.nearest(weight), laid))
    return found


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(ids).logits


def reference(source: Checkpoint, layers: list[CodedLayer], folder: Path) -> torch.Tensor:
    """Logits of the original with the layers' weights in their places, all in float32."""
    import transformers

    shutil.copytree(source.path, folder)
    state = {key: source.read(key).float() for key in source.tensors}
    state |= {f"{layer.name}.weight": layer.dequantize(torch.float32) for layer in layers}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_any_family_gives_the_rounded_model(family: str, make_family: Make, tmp_path: Path) -> None:
    source = Checkpoint(make_family(family, tmp_path / "model"))
    layers = rounded(source)
    manifest = FORMAT.write(source, tmp_path / "out", layers, prove_from=lambda: layers)
    assert set(manifest["layers"]) == {layer.name for layer in layers} and len(layers) >= 8
    file = GgufFile(tmp_path / "out" / "model.gguf")
    assert file.metadata["general.architecture"] == {"mixtral": "llama"}.get(family, family)
    found = {layer.name: layer.q for layer in FORMAT.read(tmp_path / "out")}
    assert all(torch.equal(found.pop(layer.name), layer.q) for layer in layers) and not found
    assert torch.equal(
        logits(load_quantized(tmp_path / "out")), reference(source, layers, tmp_path / "plain")
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
def test_the_experts_of_a_layer_lie_in_one_tensor(family: str, make_family: Make, tmp_path: Path) -> None:
    source = Checkpoint(make_family(family, tmp_path / "model"))
    layers = rounded(source)
    FORMAT.write(source, tmp_path / "out", layers)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    width = 96 if family == "mixtral" else 32
    assert stored["blk.1.ffn_up_exps.weight"].shape.tolist() == [64, width, 3]
    assert stored["blk.1.ffn_down_exps.weight"].shape.tolist() == [width, 64, 3]
    assert stored["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    down = {"mixtral": "block_sparse_moe.experts.2.w2", "qwen3moe": "mlp.experts.2.down_proj"}[family]
    layer = next(layer for layer in layers if layer.name == f"model.layers.1.{down}")
    tensor = stored["blk.1.ffn_down_exps.weight"]
    values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(3, 64, width)
    assert torch.equal(values[2], layer.dequantize(torch.float32))
    described = FORMAT.describe(tmp_path / "out")
    assert [row.name for row in described.layers if "experts" in row.name and "layers.0" in row.name] == [
        layer.name
        for layer in FORMAT.read(tmp_path / "out")
        if "layers.0" in layer.name and "experts" in layer.name
    ]
    assert sum(
        row.stored_bytes for row in described.layers if "layers.1" in row.name and "expert" in row.name
    ) == 3 * (sum(stored[f"blk.1.ffn_{kind}_exps.weight"].n_bytes for kind in ("gate", "up", "down")) // 3)


def test_experts_that_are_left_alone_are_joined_as_they_are(make_family: Make, tmp_path: Path) -> None:
    source = Checkpoint(make_family("qwen3moe", tmp_path / "model"))
    layers = rounded(source, but=("experts",))
    FORMAT.write(source, tmp_path / "out", layers, prove_from=lambda: layers)
    tensor = GgufFile(tmp_path / "out" / "model.gguf").tensors["blk.0.ffn_gate_exps.weight"]
    assert (tensor.type, tensor.shape) == ("BF16", (3, 32, 64))
    assert torch.equal(
        logits(load_quantized(tmp_path / "out")), reference(source, layers, tmp_path / "plain")
    )


def test_experts_of_several_types_are_refused_before_and_while_writing(
    make_family: Make, tmp_path: Path
) -> None:
    source = Checkpoint(make_family("mixtral", tmp_path / "model"))
    mixed = [
        *rounded(source, Q8_0, ("experts.1.",)),
        *(row for row in rounded(source) if "experts.1." in row.name),
    ]
    schemes = {row.name: Scheme.planned((row.q.shape[0], row.q.shape[1]), Q4_0) for row in mixed}
    assert space(source, schemes) > 0
    odd = "model.layers.0.block_sparse_moe.experts.1.w1"
    schemes[odd] = Scheme.planned((96, 64), Q8_0)
    with pytest.raises(
        UnrepresentableError, match=r"one type, and .* is Q4_0, .*experts\.1\.w1\.weight is Q8_0"
    ):
        space(source, schemes)
    del schemes[odd]
    with pytest.raises(UnrepresentableError, match="is BF16"):
        space(source, schemes)
    with pytest.raises(UnrepresentableError, match=r"expert 1 of blk\.0\.ffn_\w+_exps\.weight is Q4_0"):
        FORMAT.write(source, tmp_path / "out", mixed)
    assert not (tmp_path / "out").exists()


def test_other_codes_of_one_expert_change_nothing_else(make_family: Make, tmp_path: Path) -> None:
    source = Checkpoint(make_family("qwen3moe", tmp_path / "model"))
    FORMAT.write(source, tmp_path / "before", rounded(source))
    name = "model.layers.1.mlp.experts.1.down_proj"
    old = {layer.name: layer.q for layer in FORMAT.read(tmp_path / "before")}
    diff = FORMAT.rewrite(tmp_path / "before", tmp_path / "after", {name: old[name] ^ 1})["byte_diff"]
    assert list(diff["layers"]) == ["model.layers.1.mlp.experts.*.down_proj"] and diff["outside"] == 0
    for layer in FORMAT.read(tmp_path / "after"):
        assert torch.equal(layer.q, old[layer.name] ^ 1 if layer.name == name else old[layer.name])


def test_the_proof_misses_no_expert(make_family: Make, tmp_path: Path) -> None:
    source = Checkpoint(make_family("qwen3moe", tmp_path / "model"))
    layers = rounded(source)
    FORMAT.write(source, tmp_path / "out", layers)
    file = tmp_path / "out" / "model.gguf"
    assert prove(source, file, layers)["layers"] == len(layers)
    changed = [CodedLayer(row.name, row.q ^ ("experts.2.up" in row.name), row.grid) for row in layers]
    with pytest.raises(ProofError, match=r"expert 2 of blk\.0\.ffn_up_exps\.weight: \d+ values differ"):
        prove(source, file, changed)
    name = "model.layers.0.mlp.experts.2.up_proj"
    del source.tensors[f"{name}.weight"]
    with pytest.raises(ProofError, match=r"ffn_up_exps\.weight holds 3 experts, of which 2 are"):
        prove(source, file, [row for row in layers if row.name != name])


def test_a_count_of_experts_that_no_tensor_bears_out(make_family: Make, tmp_path: Path) -> None:
    source = Checkpoint(make_family("mixtral", tmp_path / "model"))
    FORMAT.write(source, tmp_path / "out", rounded(source))
    file = tmp_path / "out" / "model.gguf"
    raw, key = file.read_bytes(), b"llama.expert_count"
    at = raw.index(key) + len(key) + 4
    file.write_bytes(raw[:at] + (4).to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(CheckpointError, match="a matrix for each of 4 experts, its shape is"):
        list(FORMAT.read(file))


def test_gemma_s_norms_are_stored_as_the_factors_that_they_are(make_family: Make, tmp_path: Path) -> None:
    source = Checkpoint(make_family("gemma3", tmp_path / "model"))
    FORMAT.write(source, tmp_path / "out", rounded(source))
    file = GgufFile(tmp_path / "out" / "model.gguf")
    for theirs, ours in (
        ("output_norm", "model.norm"), ("blk.1.attn_q_norm", "model.layers.1.self_attn.q_norm"),
        ("blk.2.post_ffw_norm", "model.layers.2.post_feedforward_layernorm"),
    ):  # fmt: skip
        assert torch.equal(file.plain(f"{theirs}.weight"), 1 + source.read(f"{ours}.weight").float())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gemma3_text"


@pytest.mark.parametrize("family", ["gemma", "command-r"])
def test_a_stored_copy_of_the_embedding_is_no_head_of_its_own(
    family: str, make_family: Make, tmp_path: Path
) -> None:
    path = make_family(family, tmp_path / "model")
    state = load_file(path / "model.safetensors")
    head = state["model.embed_tokens.weight"].clone()
    save_file({**state, "lm_head.weight": head}, path / "model.safetensors", metadata={"format": "pt"})
    source = Checkpoint(path)
    layers = rounded(source)
    FORMAT.write(source, tmp_path / "out", layers, prove_from=lambda: layers)
    assert "output.weight" not in GgufFile(tmp_path / "out" / "model.gguf").tensors
    head[0, 0] += 1
    save_file({**state, "lm_head.weight": head}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnrepresentableError, match="a head of its own"):
        FORMAT.check_source(Checkpoint(path))


def test_gemma_3_may_have_a_head_of_its_own(make_family: Make, tmp_path: Path) -> None:
    source = Checkpoint(make_family("gemma3", tmp_path / "model", tie_word_embeddings=False))
    layers = rounded(source)
    FORMAT.write(source, tmp_path / "out", layers, prove_from=lambda: layers)
    assert torch.equal(
        logits(load_quantized(tmp_path / "out")), reference(source, layers, tmp_path / "plain")
    )
