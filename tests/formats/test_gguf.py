# SPDX-License-Identifier: Apache-2.0
"""Whole GGUF files: written from codes, read by the gguf package, rewritten, damaged."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from discquant.config import GRID_KINDS, GridConfig
from discquant.errors import CheckpointError, MissingModelError, UnrepresentableError, UserError
from discquant.formats import gguf_write
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.formats.gguf import FORMAT
from discquant.formats.gguf_file import GgufFile
from discquant.formats.gguf_metadata import layout_of
from discquant.formats.gguf_types import TYPES
from discquant.formats.scheme import Scheme
from discquant.grids import place_grid
from discquant.grids.gguf import FALLBACK, SUPER_KINDS

gguf = pytest.importorskip("gguf")
GGUF_KINDS = [kind for kind in GRID_KINDS if kind.upper() in TYPES]
HIDDEN, MIDDLE, VOCABULARY, HEADS, SHARED = 256, 288, 300, 4, 2
CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": MIDDLE, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": SHARED, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip


def byte_level_tokenizer(pre: dict[str, Any]) -> dict[str, Any]:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "Ġ": 5, "ab": 6, "Ġab": 7}
    special = [{"id": n, "content": t, "special": True} for t, n in vocab.items() if n < 3]
    return {
        "added_tokens": [*special, {"id": 8, "content": "<tool>", "special": False}],
        "pre_tokenizer": pre,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
            "pair": [{"Sequence": {"id": "A"}}, {"Sequence": {"id": "B"}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["Ġ", "ab"]], "byte_fallback": False},
    }


def make_model(folder: Path, architecture: str = "LlamaForCausalLM", **config: Any) -> Checkpoint:
    generator = torch.Generator().manual_seed(1)
    folder.mkdir(parents=True)
    size = config.get("head_dim") or HIDDEN // HEADS

    def matrix(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.05).bfloat16()

    tensors = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN), "model.norm.weight": matrix(HIDDEN)}
    if not config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = matrix(VOCABULARY, HIDDEN)
    for layer in range(2):
        base = f"model.layers.{layer}"
        shapes = {"q": (HEADS * size, HIDDEN), "k": (SHARED * size, HIDDEN), "v": (SHARED * size, HIDDEN)}
        for kind, shape in shapes.items():
            tensors[f"{base}.self_attn.{kind}_proj.weight"] = matrix(*shape)
            if architecture.startswith("Qwen2"):
                tensors[f"{base}.self_attn.{kind}_proj.bias"] = matrix(shape[0])
            if architecture.startswith("Qwen3") and kind != "v":
                tensors[f"{base}.self_attn.{kind}_norm.weight"] = matrix(size)
        tensors[f"{base}.self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * size)
        for kind in ("gate", "up"):
            tensors[f"{base}.mlp.{kind}_proj.weight"] = matrix(MIDDLE, HIDDEN)
        tensors[f"{base}.mlp.down_proj.weight"] = matrix(HIDDEN, MIDDLE)
        for kind in ("input", "post_attention"):
            tensors[f"{base}.{kind}_layernorm.weight"] = matrix(HIDDEN)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], **CONFIG, **config}))
    tokenizer = byte_level_tokenizer({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"})
    )
    return Checkpoint(folder)


def solve(source: Checkpoint, grid: GridConfig, only: str = "_proj") -> list[CodedLayer]:
    found = []
    for key in source.tensors:
        if key.endswith(".weight") and only in key:
            weight = source.read(key).float()
            name = key.removesuffix(".weight")
            FORMAT.check((weight.shape[0], weight.shape[1]), grid, name)
            laid = place_grid(weight, grid)
            FORMAT.check_grid(name, laid)
            q = torch.randint(0, 2**laid.num_bits, weight.shape, dtype=torch.uint8)
            found.append(CodedLayer(name, q, laid))
    return found


@pytest.mark.parametrize(
    "architecture, kind, more",
    [
        ("LlamaForCausalLM", "q4_0", {}),
        ("LlamaForCausalLM", "q3_k", {"tie_word_embeddings": True}),
        ("MistralForCausalLM", "uniform", {"head_dim": 32}),
        ("Qwen2ForCausalLM", "q4_1", {"tie_word_embeddings": True}),
        ("Qwen3ForCausalLM", "q4_k", {"head_dim": 96}),
        ("LlamaForCausalLM", "q5_0", {"tie_word_embeddings": True}),
        ("MistralForCausalLM", "q5_1", {}),
        ("LlamaForCausalLM", "q2_k", {}),
        ("Qwen2ForCausalLM", "q5_k", {}),
        ("Qwen3ForCausalLM", "q6_k", {}),
        ("LlamaForCausalLM", "iq4_nl", {}),
        ("Qwen2ForCausalLM", "iq4_xs", {}),
    ],
)
def test_a_written_model_is_what_the_package_reads(
    tmp_path: Path, architecture: str, kind: Any, more: dict[str, Any]
) -> None:
    source = make_model(tmp_path / "model", architecture, **more)
    layers = solve(source, GridConfig.of_kind(kind, bits=4, group_size=64))
    out = tmp_path / "out"
    manifest = FORMAT.write(
        source,
        out,
        layers,
        recipe={"seed": 1, "grid": asdict(GridConfig.of_kind(kind))},
        prove_from=lambda: layers,
    )
    assert json.loads((out / "discquant_proof.json").read_text())["layers"] == 14
    reader = gguf.GGUFReader(out / "model.gguf")
    meta = {key: field.contents() for key, field in reader.fields.items()}
    name = {"L": "llama", "M": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3"}[
        architecture[:5] if architecture[0] == "Q" else architecture[0]
    ]
    size = more.get("head_dim") or HIDDEN // HEADS
    expected = {
        "general.architecture": name, f"{name}.block_count": 2, f"{name}.embedding_length": HIDDEN,
        f"{name}.feed_forward_length": MIDDLE, f"{name}.attention.head_count": HEADS,
        f"{name}.attention.head_count_kv": SHARED, f"{name}.attention.key_length": size,
        f"{name}.rope.dimension_count": size, f"{name}.rope.freq_base": 10000.0, f"{name}.context_length": 128,
        f"{name}.vocab_size": VOCABULARY, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.merges": ["a b", "Ġ ab"], "tokenizer.chat_template": "{{ messages }}",
        "general.quantization_version": 2,
    }  # fmt: skip
    assert {key: meta.get(key) for key in expected} == expected
    assert meta[f"{name}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == VOCABULARY
    assert tokens[6:10] == ["ab", "Ġab", "<tool>", "[PAD9]"] and types[:4] + types[7:10] == [
        3,
        3,
        3,
        1,
        1,
        4,
        5,
    ]
    # Every weight, permuted by the converter's own formula.
    stored = {tensor.name: tensor for tensor in reader.tensors}
    by_name = {layer.name: layer for layer in layers}
    for key in source.tensors:
        module = key.rpartition(".")[0]
        layer = by_name.get(module) if key.endswith(".weight") else None
        wanted = source.read(key).float() if layer is None else layer.dequantize(torch.float32)
        if name == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = HEADS if module.endswith("q_proj") else SHARED
            wanted = wanted.reshape(heads, 2, -1, HIDDEN).swapaxes(1, 2).reshape(wanted.shape)
        tensor = stored.pop(layout_of(source.config()).place(key).tensor)
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(wanted.shape)
        np.testing.assert_array_equal(values, wanted.numpy(), err_msg=key)
        assert wanted.dim() > 1 or tensor.tensor_type.name == "F32"
    assert not stored
    # A row of 288 columns has no 256-column block.
    row = manifest["layers"]["model.layers.0.mlp.down_proj"]
    others = FALLBACK | {"uniform": "q4_0"}
    assert row["type"] == others.get(kind, kind).upper()
    assert row["fallback"] == (kind in SUPER_KINDS)
    mostly = reader.fields["general.file_type"].contents()
    names = {
        2: "q4_0",
        3: "q4_1",
        8: "q5_0",
        9: "q5_1",
        10: "q2_k",
        11: "q3_k",
        14: "q4_k",
        16: "q5_k",
        18: "q6_k",
    }
    names |= {25: "iq4_nl", 30: "iq4_xs"}
    assert names[mostly] == ("q4_0" if kind == "uniform" else kind)


@pytest.mark.parametrize(
    "grid",
    [*map(GridConfig.of_kind, GGUF_KINDS), GridConfig(3, 32), GridConfig(5, 32), GridConfig(6, 64)],
    ids=str,
)
def test_space_is_what_it_takes(grid: GridConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for covers the file and its spool, exact but for the header; planned, and from the grids."""
    source = make_model(tmp_path / "model")
    layers = solve(source, grid)
    asked: list[int] = []
    monkeypatch.setattr(gguf_write, "check_space", lambda out, needed: asked.append(needed))
    FORMAT.write(source, tmp_path / "out", layers)
    (spooled,) = asked
    file = (tmp_path / "out" / "model.gguf").stat().st_size
    planned = {layer.name: Scheme.planned((layer.q.shape[0], layer.q.shape[1]), grid) for layer in layers}
    for schemes in (planned, {layer.name: Scheme.of_grid(layer.grid) for layer in layers}):
        needed = FORMAT.space(source, schemes)
        # Where only values decide between Q4_1 and Q4_K, or Q5_1 and Q5_K, the larger counts.
        share = {"q4_k": 20 / 18, "q5_k": 24 / 22}.get(grid.kind, 1)
        assert file + spooled <= needed <= 2 * share * spooled + 1100 * len(source.tensors) + 16384
    assert needed < 0.8 * 2 * sum(info.num_bytes for info in source.tensors.values())


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_read_rest_and_rewrite(tmp_path: Path, kind: Any) -> None:
    source = make_model(tmp_path / "model")
    layers = {layer.name: layer for layer in solve(source, GridConfig.of_kind(kind))}
    FORMAT.write(source, tmp_path / "out", layers.values())
    assert FORMAT.detects(tmp_path / "out") and FORMAT.detects(tmp_path / "out" / "model.gguf")
    found = {layer.name: layer for layer in FORMAT.read(tmp_path / "out")}
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.equal(found[name].q, layer.q), name
        assert torch.equal(found[name].dequantize(torch.float32), layer.dequantize(torch.float32)), name
    rest = dict(FORMAT.plain_tensors(tmp_path / "out"))
    assert rest.keys() == {key for key in source.tensors if key.removesuffix(".weight") not in layers}
    for key, values in rest.items():
        assert torch.equal(values.float(), source.read(key).float()), key
    codes = {
        name: torch.randint(0, 2**layer.grid.num_bits, layer.q.shape, dtype=torch.uint8)
        for name, layer in layers.items()
        if "layers.1." in name
    }
    manifest = FORMAT.rewrite(tmp_path / "out" / "model.gguf", tmp_path / "new", codes)
    diff = manifest["byte_diff"]
    assert diff["outside"] == 0 and diff["layers"].keys() == codes.keys() and diff["changed"] > 0
    for layer in FORMAT.read(tmp_path / "new"):
        assert torch.equal(layer.q, codes.get(layer.name, layers[layer.name].q))
        assert torch.equal(layer.grid.scale, found[layer.name].grid.scale)
    again = FORMAT.rewrite(tmp_path / "out", tmp_path / "again", codes)
    assert again["byte_diff"] == diff and again["tensors"] == manifest["tensors"]
    assert (tmp_path / "again" / "model.gguf").read_bytes() == (tmp_path / "new" / "model.gguf").read_bytes()
    rows = {row.name: row for row in FORMAT.describe(tmp_path / "new").layers}
    assert rows.keys() == layers.keys() and rows["model.layers.0.mlp.up_proj"].kind == kind.upper()
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(UnrepresentableError, match=r"up_proj.*shape"):
        FORMAT.rewrite(tmp_path / "out", tmp_path / "bad", {name: layers[name].q[:1]})
    with pytest.raises(UnrepresentableError, match="no quantized layers"):
        FORMAT.rewrite(tmp_path / "out", tmp_path / "bad", {"nobody": layers[name].q})
    with pytest.raises(UnrepresentableError, match="below"):
        FORMAT.rewrite(tmp_path / "out", tmp_path / "bad", {name: layers[name].q | 0x80})
    assert not (tmp_path / "bad").exists()


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    layers = solve(source, GridConfig.of_kind("q4_0"))
    first = FORMAT.write(source, tmp_path / "a", layers)
    second = FORMAT.write(source, tmp_path / "b", reversed(layers))
    assert first["shards"] == second["shards"]


def test_a_package_made_file_is_read(tmp_path: Path) -> None:
    """The producer of the file is gguf's own quantizer and writer; nothing of ours."""
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    permuted = weight.reshape(2, 2, 2, 64).swapaxes(1, 2).reshape(8, 64)
    for name, values, qtype in (
        ("blk.0.attn_q.weight", permuted, "Q4_0"),
        ("blk.0.ffn_up.weight", weight, "Q4_1"),
        ("blk.0.ffn_gate.weight", weight, "Q5_0"),
        ("blk.0.attn_output.weight", weight, "Q5_1"),
        ("token_embd.weight", weight, "Q8_0"),
    ):
        kind = gguf.GGMLQuantizationType[qtype]
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {layer.name: layer for layer in FORMAT.read(tmp_path / "theirs.gguf")}
    types = {
        "self_attn.q_proj": "Q4_0",
        "mlp.up_proj": "Q4_1",
        "mlp.gate_proj": "Q5_0",
        "self_attn.o_proj": "Q5_1",
    }
    wanted_types = {f"model.layers.0.{name}": qtype for name, qtype in types.items()}
    assert found.keys() == wanted_types.keys()
    for name, qtype in wanted_types.items():
        kind = gguf.GGMLQuantizationType[qtype]
        wanted = gguf.dequantize(gguf.quantize(weight, kind), kind)
        np.testing.assert_array_equal(found[name].dequantize(torch.float32).numpy(), wanted)
    assert not list(FORMAT.plain_tensors(tmp_path / "theirs.gguf"))
    ((name, embedding),) = FORMAT.rest(tmp_path / "theirs.gguf")
    assert name == "model.embed_tokens.weight" and embedding.shape == (8, 64)
    assert FORMAT.describe(tmp_path / "theirs.gguf").notes == (
        "1 tensors are Q8_0: decoded for evaluation, never rewritten",
    )


def test_refuses_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UnrepresentableError, match=r"down_proj: Q4_0 .*ignore"):
        FORMAT.check((64, 172), GridConfig(bits=4, group_size=32), "down_proj")
    with pytest.raises(UnrepresentableError, match=r"Q3_K .*172"):
        FORMAT.check((64, 172), GridConfig.of_kind("q3_k"))
    with pytest.raises(UnrepresentableError, match="multiple of 32"):
        FORMAT.check((64, 256), GridConfig(bits=4, group_size=16))
    with pytest.raises(UnrepresentableError, match="no place for 8-bit asymmetric"):
        FORMAT.check((64, 256), GridConfig(bits=8, group_size=32, sym=False))
    with pytest.raises(UnrepresentableError, match="multiple of 32"):
        FORMAT.check((64, 256), GridConfig(bits=2, group_size=16, sym=False))
    with pytest.raises(UnrepresentableError, match="nvfp4"):
        FORMAT.check((64, 256), GridConfig.of_kind("nvfp4"))
    with pytest.raises(UnrepresentableError, match="no GGUF type holds a 4-bit mxfp4 grid with groups of 32"):
        FORMAT.check_grid("up_proj", place_grid(torch.randn(4, 64), GridConfig.of_kind("mxfp4")))
    strange = make_model(tmp_path / "falcon", "FalconForCausalLM")
    with pytest.raises(UnrepresentableError, match="FalconForCausalLM"):
        FORMAT.check_source(strange)
    scaled = make_model(tmp_path / "scaled", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(UnrepresentableError, match="dynamic"):
        FORMAT.check_source(scaled)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_asymmetric_codes_go_where_their_minima_do(tmp_path: Path, bits: int) -> None:
    """Those of 2 and 3 bits have a float16 minimum; most of 4 have 12 significant bits, which is known once laid."""
    source = make_model(tmp_path / "model", "LlamaForCausalLM")
    config = GridConfig(bits=bits, group_size=64, sym=False)
    if bits == 4:
        with pytest.raises(
            UnrepresentableError,
            match=r"not exactly one of Q4_1 .*; lay it with kind q4_1",
        ):
            solve(source, config)
        return
    layers = solve(source, config)
    FORMAT.write(source, tmp_path / "out", layers, recipe={}, prove_from=lambda: layers)
    stored = FORMAT.describe(tmp_path / "out").layers
    size = sum(row.stored_bytes for row in stored) * 8 / sum(row.shape[0] * row.shape[1] for row in stored)
    assert 4.5 <= size <= 5


def test_damaged_files_are_told_not_trusted(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    FORMAT.write(source, tmp_path / "out", solve(source, GridConfig.of_kind("q4_0"), "layers.0.mlp.up_proj"))
    good = (tmp_path / "out" / "model.gguf").read_bytes()
    header = GgufFile(tmp_path / "out" / "model.gguf").data_start
    generator = random.Random(0)
    file = tmp_path / "bad.gguf"
    told: list[str] = []
    for trial in range(150):
        data = bytearray(good)
        if trial % 3 == 0:
            del data[generator.randrange(len(data)) :]
        elif trial % 3 == 1:
            for _ in range(4):
                data[generator.randrange(header)] = generator.randrange(256)
        else:  # a count or length becomes huge
            at = generator.choice([8, 16, generator.randrange(24, header - 8)])
            data[at : at + 8] = generator.choice([2**63, 2**40, 2**31, 0]).to_bytes(8, "little")
        file.write_bytes(data)
        try:
            for layer in FORMAT.read(file):
                assert bool(torch.isfinite(layer.dequantize(torch.float32)).all())
            dict(FORMAT.rest(file))
        except (UserError, NotImplementedError) as problem:
            told.append(str(problem))
    assert len(told) > 75 and max(map(len, told)) < 1000
    file.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="truncated"):
        list(FORMAT.read(file))
    with pytest.raises(MissingModelError):
        list(FORMAT.read(tmp_path / "nothing"))
    assert not FORMAT.detects(tmp_path / "nothing") and not FORMAT.detects(tmp_path / "model")


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    FORMAT.write(source, tmp_path / "out", solve(source, GridConfig.of_kind("q4_0"), "layers.0.mlp.up_proj"))
    path = tmp_path / "out" / "model.gguf"
    tensor = GgufFile(path).tensors["blk.0.ffn_up.weight"]
    assert tensor.num_bytes == math.prod(tensor.shape) // 32 * 18
    data = bytearray(path.read_bytes())
    data[tensor.start : tensor.start + 2] = np.float16("nan").tobytes()
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up.*finite"):
        list(FORMAT.read(path))


def test_stories260k_where_its_shapes_allow(tmp_path: Path, shared_dir: Path) -> None:
    source = Checkpoint(shared_dir / "models" / "stories260k")
    grid = GridConfig.of_kind("q4_0")
    with pytest.raises(UnrepresentableError, match="172 columns"):
        solve(source, grid, "down_proj")
    layers = [layer for part in ("self_attn", "gate_proj", "up_proj") for layer in solve(source, grid, part)]
    manifest = FORMAT.write(source, tmp_path / "out", layers, prove_from=lambda: layers)
    assert len(manifest["layers"]) == len(layers) == 30 and "no tokenizer" in manifest["warnings"][0]
    meta = GgufFile(tmp_path / "out" / "model.gguf").metadata
    assert meta["tokenizer.ggml.model"] == "no_vocab" and meta["llama.vocab_size"] == 512
    assert {layer.name for layer in FORMAT.read(tmp_path / "out")} == {layer.name for layer in layers}
