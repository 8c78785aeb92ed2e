# SPDX-License-Identifier: Apache-2.0
"""Stored tensors of one layer: round trip, the shapes the format fixes, the older layout, and refusals."""

from __future__ import annotations

import copy
import time

import pytest
import torch

from discquant.errors import CheckpointError, ProofError, UnrepresentableError
from discquant.formats import QuantizedLinear, Scheme
from discquant.formats.compressed_tensors import (
    check_representable,
    decode,
    encode,
    encoded_bytes,
    parse_config,
    quantization_config,
)
from discquant.formats.proof import prove_configuration


def layer(rows: int, columns: int, num_bits: int, group_size: int, symmetric: bool) -> QuantizedLinear:
    groups = 1 if group_size == -1 else columns // group_size
    q = torch.randint(0, 1 << num_bits, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(rows, groups) + 0.01).bfloat16()
    zero = None if symmetric else torch.randint(0, 1 << num_bits, (rows, groups), dtype=torch.uint8)
    return QuantizedLinear("layer", q, scale, zero, num_bits, group_size)


def reader(stored: dict[str, torch.Tensor]):  # type: ignore[no-untyped-def]
    return lambda suffix: stored.get(f"layer.{suffix}")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 11])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 5, 6, 7, 8])
def test_round_trip(num_bits: int, group_size: int, symmetric: bool) -> None:
    """Odd sizes: 37 rows, and 352 = 11 * 32 columns."""
    given = layer(37, 352, num_bits, group_size, symmetric)
    stored = encode(given)
    assert stored["layer.weight_packed"].shape == (37, -(-352 * num_bits // 32))
    assert stored["layer.weight_shape"].tolist() == [37, 352]
    assert stored["layer.weight_scale"].dtype == torch.bfloat16
    if not symmetric:
        assert stored["layer.weight_zero_point"].shape == (-(-37 * num_bits // 32), given.scale.shape[1])
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert size == encoded_bytes((37, 352), Scheme.of(given))
    found = decode("layer", reader(stored), Scheme.of(given))
    assert torch.equal(found.q, given.q)
    assert torch.equal(found.scale, given.scale)
    assert (found.zero_point is None) == symmetric
    assert symmetric or torch.equal(found.zero_point, given.zero_point)
    assert torch.equal(found.dequantize(torch.float32), given.dequantize(torch.float32))


@pytest.mark.parametrize("num_bits", [3, 5, 6, 7])
def test_reads_the_layout_before_0_18(num_bits: int) -> None:
    given = layer(8, 64, num_bits, 32, symmetric=False)
    stored, held = encode(given), 32 // num_bits

    def old(codes: torch.Tensor) -> torch.Tensor:
        rows, columns = codes.shape
        words = torch.zeros(rows, -(-columns // held), dtype=torch.int64)
        for column in range(columns):
            words[:, column // held] |= codes[:, column].long() << (column % held * num_bits)
        return words.to(torch.int32)

    stored["layer.weight_packed"] = old(given.q)
    assert given.zero_point is not None
    stored["layer.weight_zero_point"] = old(given.zero_point.T).T.contiguous()
    assert stored["layer.weight_packed"].shape != encode(given)["layer.weight_packed"].shape
    found = decode("layer", reader(stored), Scheme.of(given))
    assert torch.equal(found.q, given.q)
    assert torch.equal(found.zero_point, given.zero_point)


def test_reads_unpacked_signed_zero_points() -> None:
    given = layer(8, 64, 4, 32, symmetric=False)
    assert given.zero_point is not None
    stored = encode(given) | {
        "layer.weight_zero_point": (given.zero_point.to(torch.int16) - 8).to(torch.int8)
    }
    found = decode("layer", reader(stored), Scheme.of(given))
    assert torch.equal(found.zero_point, given.zero_point)


def test_library_decodes_the_same_weight() -> None:
    """The library's decompressor, in bfloat16: q - z and the product are exact in float32, so one rounding each."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    for num_bits in range(2, 9):
        for symmetric in (True, False):
            given = layer(37, 352, num_bits, 32, symmetric)
            args = QuantizationArgs(num_bits=num_bits, symmetric=symmetric, strategy="group", group_size=32)
            scheme = QuantizationScheme(targets=["Linear"], weights=args)
            stored = {key.removeprefix("layer."): tensor for key, tensor in encode(given).items()}
            compressor = compressors.PackedQuantizationCompressor
            found = compressor.decompress(stored, scheme)["weight"]
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, given.dequantize(torch.bfloat16))


def test_float16_scales() -> None:
    q = torch.zeros(1, 32, dtype=torch.uint8)
    fine = QuantizedLinear("layer", q, torch.tensor([[1.0009765625]]), None, 4, 32)  # exact in float16 only
    assert encode(fine, torch.float16)["layer.weight_scale"].dtype == torch.float16
    with pytest.raises(UnrepresentableError, match=r"layer: scale must be exact in torch\.bfloat16"):
        encode(fine)
    with pytest.raises(UnrepresentableError, match=r"layer: scale must be exact in torch\.float16"):
        encode(QuantizedLinear("layer", q, torch.tensor([[2.0**-30]]), None, 4, 32), torch.float16)


def test_unrepresentable_names_the_module() -> None:
    with pytest.raises(
        ValueError, match=r"cannot hold a\.b: its 172 input columns are no multiple of the group size 32"
    ):
        check_representable("a.b", (64, 172), Scheme(3, 32, True))
    with pytest.raises(ValueError, match=r"a\.b: num_bits must be in 2\.\.8, got 9"):
        check_representable("a.b", (64, 172), Scheme(9, -1, True))
    check_representable("a.b", (64, 172), Scheme(3, -1, True))
    ragged = QuantizedLinear("a.b", torch.zeros(2, 172, dtype=torch.uint8), torch.ones(2, 6), None, 3, 32)
    with pytest.raises(UnrepresentableError, match=r"a\.b"):
        encode(ragged)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layer.weight_packed": None}, CheckpointError, r"layer\.weight_packed is missing"),
        (
            {"layer.weight_scale": torch.ones(8, 3)},
            CheckpointError,
            r"must have shape \[8, 2\], got \[8, 3\]",
        ),
        (
            {"layer.weight_packed": torch.zeros(8, 5, dtype=torch.int32)},
            CheckpointError,
            r"cannot hold \[8, 64\] codes",
        ),
        ({"layer.weight_packed": torch.zeros(8, 6)}, CheckpointError, "cannot hold"),
        (
            {"layer.weight_shape": torch.tensor([8])},
            CheckpointError,
            r"must hold \[out_features, in_features\]",
        ),
    ],
)
def test_decode_rejects(change: dict[str, torch.Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decode("layer", reader(encode(layer(8, 64, 3, 32, True)) | change), Scheme(3, 32, True))


def test_config_round_trip() -> None:
    one = {"a": Scheme(3, 64, True), "b": Scheme(3, 64, True)}
    config = quantization_config(one, ["lm_head"])
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]
    assert config["ignore"] == ["lm_head"]
    mixed = {"a": Scheme(3, 64, True), "b": Scheme(4, -1, False), "c": Scheme(3, 64, True)}
    for schemes in (one, mixed):
        scheme_of = parse_config(quantization_config(schemes, []), "config.json")
        assert {name: scheme_of(name) for name in schemes} == schemes
    with pytest.raises(CheckpointError, match="no group of quantization_config covers d"):
        parse_config(quantization_config(mixed, []), "config.json")("d")


def test_config_priority_of_targets() -> None:
    config = quantization_config({"x": Scheme(3, 64, True)}, [])
    weights = config["config_groups"]["group_0"]["weights"]
    for target, bits in (("re:.*mlp.*", 4), ("model.mlp.up", 8)):
        config["config_groups"][target] = {"targets": [target], "weights": {**weights, "num_bits": bits}}
    scheme_of = parse_config(config, "config.json")
    assert [scheme_of(name).num_bits for name in ("attn.q", "model.mlp.down", "model.mlp.up")] == [3, 4, 8]


def experts(block: str, *last: str) -> list[str]:
    return [f"{block}.experts.{number}.{name}" for number in (0, 10) for name in last]


def test_experts_go_by_one_pattern_where_they_agree() -> None:
    """vLLM asks for gate_proj, up_proj and down_proj whatever the file calls them; transformers wants a pattern."""
    three, four = Scheme(3, 64, True), Scheme(4, 64, True)
    alike, mixed, plain = (f"m.{number}.moe" for number in range(3))
    schemes = {"m.0.q": four, **dict.fromkeys(experts(alike, "w1", "w2", "w3"), three)}
    schemes |= dict.fromkeys(experts(mixed, "w1"), three) | dict.fromkeys(experts(mixed, "w2"), four)
    half = f"{mixed}.experts.3.w1"
    config = quantization_config(schemes, ["lm_head", *experts(plain, "w1", "w2"), half])
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets == [
        ["m.0.q", *experts(mixed, "w2")],
        [r"re:^m\.0\.moe\.experts\..*", *experts(mixed, "w1")],
    ]
    assert config["ignore"] == ["lm_head", *experts(plain, "w1", "w2"), half, r"re:^m\.2\.moe\.experts\..*"]
    scheme_of = parse_config(config, "config.json")
    assert {name: scheme_of(name) for name in schemes} == schemes
    prove_configuration({"quantization_config": config}, schemes, dict.fromkeys(schemes, (64, 64)))
    assert scheme_of(f"{alike}.experts.0.gate_proj") == three  # vLLM's name
    for name in (*experts(plain, "w1"), f"{plain}.experts.0.up_proj"):
        with pytest.raises(ProofError, match="tells engines to ignore"):
            prove_configuration({"quantization_config": config}, {name: four}, {name: (64, 64)})


def test_transformers_finds_the_scheme_of_the_experts() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    integration = pytest.importorskip("transformers.integrations.compressed_tensors")
    schemes = {"m.0.q": Scheme(4, 64, True), **dict.fromkeys(experts("m.0.moe", "w1"), Scheme(3, 64, True))}
    parsed = quantization.QuantizationConfig.model_validate(quantization_config(schemes, []))
    assert integration.get_experts_scheme(parsed).weights.num_bits == 3


def test_experts_are_looked_up_in_linear_time() -> None:
    """Of experts that differ within a layer, and so go by their names."""
    names = [
        f"m.{layer}.experts.{expert}.w{part}" for layer in range(40) for expert in range(50) for part in "12"
    ]
    schemes = {name: Scheme(3 + (place % 2), 64, True) for place, name in enumerate(names)}
    start = time.process_time()
    scheme_of = parse_config(quantization_config(schemes, []), "config.json")
    assert {name: scheme_of(name) for name in names} == schemes
    assert time.process_time() - start < 1


def test_config_is_what_the_library_reads() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = quantization_config({"a": Scheme(3, 64, True), "b": Scheme(4, -1, False)}, ["lm_head"])
    parsed = quantization.QuantizationConfig.model_validate(copy.deepcopy(config))
    groups = list(parsed.config_groups.values())
    assert [group.weights.num_bits for group in groups] == [3, 4]
    assert [group.weights.strategy for group in groups] == ["group", "channel"]
    assert [group.weights.symmetric for group in groups] == [True, False]
    assert parsed.ignore == ["lm_head"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"quant_method": "gptq"},
            NotImplementedError,
            "of compressed-tensors only .* are read, got gptq",
        ),
        (
            {"config_groups": {"g": {}}},
            CheckpointError,
            "quantization_config is malformed: KeyError 'weights'",
        ),
        ({"config_groups": None}, CheckpointError, "malformed"),
        (
            {"config_groups": {"g": {"weights": {}, "input_activations": 8}}},
            CheckpointError,
            "malformed: ValueError input_activations 8",
        ),
    ],
)
def test_parse_config_rejects(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_config(quantization_config({"a": Scheme(3, 64, True)}, []) | change, "config.json")


@pytest.mark.parametrize(
    "change",
    [{"type": "float"}, {"strategy": "tensor"}],
    ids=["float", "tensor"],
)
def test_parse_config_refuses_other_weights(change: dict[str, object]) -> None:
    config = quantization_config({"a": Scheme(3, 64, True)}, [])
    config["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(NotImplementedError, match=r"config\.json"):
        parse_config(config, "config.json")
