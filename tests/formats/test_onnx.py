# SPDX-License-Identifier: Apache-2.0
"""ONNX: MatMulNBits against ONNX Runtime, whole decoders against transformers, rewriting, damage."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from discquant.config import GridConfig
from discquant.errors import CheckpointError, MissingModelError, UnrepresentableError, UserError
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.formats.onnx import FORMAT
from discquant.formats.onnx_blocks import block_size, decode, encode
from discquant.grids import AffineGrid, UniformGrid, place_grid

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


def random_grid(
    bits: int, group: int, symmetric: bool, rows: int, columns: int, seed: int
) -> tuple[UniformGrid, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else -(-columns // group)
    scale = (torch.rand(rows, groups, generator=generator) + 0.01).bfloat16()
    zero = None
    if not symmetric:
        zero = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    q = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    return UniformGrid(bits, group, symmetric, scale, zero), q


@settings(max_examples=40)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([-1, 16, 32, 48, 64, 128]),
    symmetric=st.booleans(),
    rows=st.integers(1, 4),
    columns=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(bits: int, group: int, symmetric: bool, rows: int, columns: int, seed: int) -> None:
    grid, q = random_grid(bits, group, symmetric, rows, columns, seed)
    stored = encode(grid, q)
    back, wide = decode(
        stored.packed,
        stored.scales,
        stored.zero_points,
        bits=stored.bits,
        block=stored.block,
        columns=columns,
        name="layer",
    )
    assert torch.equal(back - stored.offset, q)
    assert torch.equal(wide.dequantize(back, torch.float32), grid.dequantize(q, torch.float32))
    assert wide.group_size == (-1 if stored.block >= columns else stored.block)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group, columns", [(32, 96), (64, 100), (-1, 200), (48, 144)])
def test_the_runtime_computes_with_our_weights(bits: int, symmetric: bool, group: int, columns: int) -> None:
    """3-bit codes go through as 4-bit ones; the bound is the error of the same product in float32."""
    from onnx import TensorProto, helper, numpy_helper

    rows = 24
    grid, q = random_grid(bits, group, symmetric, rows, columns, bits)
    stored = encode(grid, q)
    parts = {"B": stored.packed, "scales": stored.scales}
    if stored.zero_points is not None:
        parts["zero_points"] = stored.zero_points
    node = helper.make_node(
        "MatMulNBits", ["x", *parts], ["y"], domain="com.microsoft", K=columns, N=rows, bits=stored.bits,
        block_size=stored.block, accuracy_level=0,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, rows])],
        initializer=[numpy_helper.from_array(values.numpy(), name) for name, values in parts.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(5, columns)
    (y,) = session.run(None, {"x": x.numpy()})
    weight = grid.dequantize(q, torch.float32)
    oracle = x.double() @ weight.double().T
    baseline = x @ weight.T
    # A dot product of K terms may be summed in any order: K eps times the sum of magnitudes bounds that.
    slack = columns * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T)
    bound = 2 * ((baseline - oracle).abs() + slack)
    assert bool(((torch.from_numpy(y).double() - oracle).abs() <= bound).all())


def tiny_config(architecture: str, **more: Any) -> Any:
    import transformers

    kinds = {
        "LlamaForCausalLM": transformers.LlamaConfig,
        "MistralForCausalLM": transformers.MistralConfig,
        "Qwen2ForCausalLM": transformers.Qwen2Config,
        "Qwen3ForCausalLM": transformers.Qwen3Config,
    }
    if architecture == "MistralForCausalLM":
        more["sliding_window"] = None
    return kinds[architecture](
        vocab_size=96,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **more,
    )


def make_model(folder: Path, architecture: str = "LlamaForCausalLM", **more: Any) -> Any:
    import transformers

    config = tiny_config(architecture, **more)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Biases and norms start at 0 and 1, which would hide a forgotten one.
            spread = 0.3 if value.dim() == 1 else 0.08
            value.copy_(torch.randn_like(value) * spread + (1.0 if "norm" in name else 0.0))
            value.copy_(value.bfloat16())
    # A copy, since the cast also rounds the rotary frequencies, which no served model has in bfloat16.
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    return model


def solve(source: Checkpoint, grid: GridConfig) -> list[CodedLayer]:
    found = []
    for key in source.tensors:
        if key.endswith("_proj.weight"):
            weight = source.read(key).float()
            FORMAT.check((weight.shape[0], weight.shape[1]), grid, key)
            laid = place_grid(weight, grid)
            FORMAT.check_grid(key, laid)
            found.append(CodedLayer(key.removesuffix(".weight"), laid.nearest(weight), laid))
    return found


@pytest.mark.parametrize(
    "architecture, grid, more",
    [
        ("LlamaForCausalLM", GridConfig(bits=3, group_size=64), {}),
        ("LlamaForCausalLM", GridConfig(bits=4, group_size=32, sym=False), {"tie_word_embeddings": True}),
        ("MistralForCausalLM", GridConfig(bits=8, group_size=-1), {"head_dim": 24}),
        ("Qwen2ForCausalLM", GridConfig(bits=2, group_size=16), {}),
        ("Qwen3ForCausalLM", GridConfig(bits=4, group_size=32), {"head_dim": 32}),
        (
            "LlamaForCausalLM",
            GridConfig(bits=4, group_size=128),
            {
                "rope_parameters": {
                    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
                }
            },
        ),
    ],
)  # fmt: skip
def test_a_whole_decoder_gives_the_logits_of_transformers(
    tmp_path: Path, architecture: str, grid: GridConfig, more: dict[str, Any]
) -> None:
    model = make_model(tmp_path / "model", architecture, **more)
    source = Checkpoint(tmp_path / "model")
    layers = solve(source, grid)
    manifest = FORMAT.write(source, tmp_path / "out", layers, prove_from=lambda: layers)
    assert json.loads((tmp_path / "out" / "discquant_proof.json").read_text())["layers"] == 14
    assert manifest["quantized_weights"] == sum(layer.q.numel() for layer in layers)
    state = model.state_dict()
    for layer in layers:
        state[f"{layer.name}.weight"].copy_(layer.dequantize(torch.float32))
    ids = torch.randint(0, 96, (2, 19))
    with torch.no_grad():
        baseline = model(ids).logits
        oracle = model.double()(ids).logits
    session = runtime.InferenceSession(
        str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    logits = torch.from_numpy(session.run(["logits"], {"input_ids": ids.numpy()})[0])
    # Twice the error that transformers itself makes in float32, and an eps for every layer of sums.
    eps = torch.finfo(torch.float32).eps
    bound = 2 * (float((baseline - oracle).abs().max()) + 100 * eps * float(oracle.abs().max()))
    assert float((logits.double() - oracle).abs().max()) <= bound
    plain = dict(FORMAT.plain_tensors(tmp_path / "out"))
    assert plain.keys() == {key for key in source.tensors if not key.endswith("_proj.weight")}
    for key, values in plain.items():
        assert values.dtype == torch.bfloat16 and torch.equal(values, source.read(key))
    back = {layer.name: layer for layer in FORMAT.read(tmp_path / "out")}
    assert back.keys() == {layer.name for layer in layers}
    for layer in layers:
        assert torch.equal(back[layer.name].q, layer.q)
        assert torch.equal(back[layer.name].dequantize(torch.float32), layer.dequantize(torch.float32))


@pytest.mark.parametrize("bits, needed", [(2, "1.24"), (3, "1.22"), (4, "1.22"), (5, "1.23"), (8, "1.23")])
def test_the_runtime_that_has_the_width(bits: int, needed: str, tmp_path: Path) -> None:
    """Seen on CPUs: 1.22.1 takes 4 bits alone, 1.23.0 also 8, 1.24.1 also 2; CUDA never takes 2."""
    make_model(tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    layers = solve(source, GridConfig(bits=bits, group_size=32))
    manifest = FORMAT.write(source, tmp_path / "out", layers)
    assert manifest["requires"] == {"onnxruntime": needed}
    assert ("not on CUDA" in " ".join(manifest["warnings"])) == (bits == 2)
    assert ("not CUDA" in manifest["engines"][0]["note"]) == (bits == 2)


@pytest.mark.parametrize("bits, symmetric", [(3, True), (4, False)])
def test_rewrite_changes_code_bytes_only(tmp_path: Path, bits: int, symmetric: bool) -> None:
    make_model(tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    layers = {
        layer.name: layer for layer in solve(source, GridConfig(bits=bits, group_size=32, sym=symmetric))
    }
    FORMAT.write(source, tmp_path / "out", layers.values())
    assert FORMAT.detects(tmp_path / "out") and not FORMAT.detects(tmp_path / "model")
    codes = {
        name: torch.randint(0, 2**bits, layer.q.shape, dtype=torch.uint8)
        for name, layer in layers.items()
        if "layers.1." in name
    }
    diff = FORMAT.rewrite(tmp_path / "out", tmp_path / "new", codes)["byte_diff"]
    assert diff["outside"] == 0 and diff["layers"].keys() == codes.keys()
    for layer in FORMAT.read(tmp_path / "new"):
        assert torch.equal(layer.q, codes.get(layer.name, layers[layer.name].q))
    runtime.InferenceSession(str(tmp_path / "new" / "model.onnx"), providers=["CPUExecutionProvider"])
    rows = FORMAT.describe(tmp_path / "new").layers
    assert len(rows) == 14 and {row.num_bits for row in rows} == {bits}
    name = next(iter(layers))
    for wrong, message in ((layers[name].q[:1], "shape"), (layers[name].q + 2**bits, "below")):
        with pytest.raises(UnrepresentableError, match=message):
            FORMAT.rewrite(tmp_path / "out", tmp_path / "bad", {name: wrong})
    with pytest.raises(UnrepresentableError, match="no quantized layers"):
        FORMAT.rewrite(tmp_path / "out", tmp_path / "bad", {"nobody": layers[name].q})


def test_refuses_before_any_work(tmp_path: Path) -> None:
    assert [block_size(group) for group in (-1, 16, 48, 64, 96, 1024)] == [128, 16, 16, 64, 32, 256]
    with pytest.raises(UnrepresentableError, match="multiple of 16"):
        FORMAT.check((8, 64), GridConfig(bits=4, group_size=8))
    for kind in ("nf4", "q2_k", "q4_k", "q5_1", "q5_k"):
        with pytest.raises(UnrepresentableError, match=kind):
            FORMAT.check((8, 256), GridConfig.of_kind(kind))
    with pytest.raises(UnrepresentableError, match="AffineGrid"):
        FORMAT.check_grid("up", AffineGrid(4, 32, torch.ones(1, 1), torch.ones(1, 1)))
    for more, message in (
        ({"architectures": ["GemmaForCausalLM"]}, "Gemma"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
    ):
        folder = tmp_path / message
        make_model(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | more))
        with pytest.raises(UnrepresentableError, match=message):
            FORMAT.check_source(Checkpoint(folder))


def test_damaged_files_are_told_not_trusted(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    FORMAT.write(source, tmp_path / "out", solve(source, GridConfig(bits=4, group_size=32, sym=False)))
    path = tmp_path / "out" / "model.onnx"
    good = path.read_bytes()
    generator = random.Random(0)
    told: list[str] = []
    for trial in range(200):
        data = bytearray(good)
        if trial % 3 == 0:
            del data[generator.randrange(len(data)) :]
        else:
            for _ in range(1 + trial % 5):
                data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        try:
            for layer in FORMAT.read(path):
                assert bool(torch.isfinite(layer.dequantize(torch.float32)).all())
        except (UserError, NotImplementedError) as problem:
            told.append(str(problem))
    assert len(told) > 60
    path.write_bytes(good)
    model = onnx.load(str(path), load_external_data=False)
    tensor = next(row for row in model.graph.initializer if row.name.endswith("qweight"))

    def reading(key: str, value: str) -> None:
        for row in tensor.external_data:
            if row.key == key:
                row.value = value
        path.write_bytes(model.SerializeToString())
        list(FORMAT.read(path))

    with pytest.raises(CheckpointError, match="no file name in this folder"):
        reading("location", "../model/model.safetensors")
    with pytest.raises(MissingModelError, match="incomplete"):
        reading("location", "elsewhere")
    reading("location", "model.onnx.data")
    with pytest.raises(CheckpointError, match="are needed"):
        reading("offset", str(2**60))
    with pytest.raises(CheckpointError, match="numbers"):
        reading("offset", "soon")


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    FORMAT.write(source, tmp_path / "out", solve(source, GridConfig(bits=4, group_size=32)))
    model = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False)
    tensor = next(row for row in model.graph.initializer if row.name.endswith("scales"))
    offset = next(int(row.value) for row in tensor.external_data if row.key == "offset")
    with (tmp_path / "out" / "model.onnx.data").open("r+b") as stream:
        stream.seek(offset)
        stream.write(np.float32("inf").tobytes())
    with pytest.raises(CheckpointError, match="finite"):
        list(FORMAT.read(tmp_path / "out"))
