# SPDX-License-Identifier: Apache-2.0
"""What configurations tell engines of layers that differ, lie outside the blocks, or stay as they are.

Engines' own rules of matching names are written down here once more, from vLLM's and auto-round's sources.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from discquant.errors import ProofError, UnrepresentableError
from discquant.formats import Checkpoint, CodedLayer, Scheme, plan_export
from discquant.formats.proof import prove_configuration
from discquant.formats.registry import by_name
from discquant.formats.write import unquantized
from discquant.grids import UniformGrid
from discquant.grids.fused import JOINED

THREE, FOUR, ODD = Scheme(3, 32, True), Scheme(4, 32, True), Scheme(4, 32, False)
BLOCK = "model.layers.0"
ATTENTION = [f"{BLOCK}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
OTHERS = [
    f"{BLOCK}.self_attn.o_proj",
    *(f"{BLOCK}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
]
EXPERTS = [
    f"model.layers.1.mlp.experts.{expert}.{name}"
    for expert in range(2)
    for name in ("gate_proj", "up_proj", "down_proj")
]


def stated(name: str, schemes: dict[str, Scheme], ignored: list[str], **config: Any) -> dict[str, Any]:
    """The configuration that a format writes."""
    by_name(name).configure(config, schemes, ignored)  # type: ignore[attr-defined]
    return config


def vllm_rule(dynamic: dict[str, Any], prefix: str) -> dict[str, Any] | None:
    """What vLLM takes from GPTQ's `dynamic` for a module by its own name: the first match; None is not quantized."""
    for pattern, entries in dynamic.items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), prefix):
            return None if pattern.startswith("-:") else entries
    return {}


def test_gptq_rules_reach_joined_modules() -> None:
    """vLLM asks for qkv_proj and for the experts of a block, never for their parts; gptqmodel for the parts."""
    schemes = dict.fromkeys(ATTENTION, THREE) | dict.fromkeys(OTHERS, FOUR)
    config = stated("gptq", schemes, ["lm_head", *EXPERTS, "model.layers.1.mlp.gate"])
    dynamic = config["quantization_config"]["dynamic"]
    three = {"bits": 3, "group_size": 32, "sym": True}
    for name in (*ATTENTION, f"{BLOCK}.self_attn.qkv_proj"):
        assert vllm_rule(dynamic, name) == three
    for name in (
        *OTHERS,
        f"{BLOCK}.mlp.gate_up_proj",
        "model.layers.0.self_attn.q_norm",
        "model.layers.10.mlp.gate",
    ):
        assert vllm_rule(dynamic, name) == {}
    for name in (*EXPERTS, "model.layers.1.mlp.experts", "model.layers.1.mlp.gate"):
        assert vllm_rule(dynamic, name) is None
    assert vllm_rule(dynamic, "model.layers.1.mlp.gate_up_proj") == {}
    assert len(dynamic) == 3
    prove_configuration(config, schemes, dict.fromkeys(schemes, (64, 64)))


@pytest.mark.parametrize(("whole", "members"), JOINED)
def test_gptq_rules_of_every_set_that_engines_join(whole: str, members: tuple[str, ...]) -> None:
    names = [f"{BLOCK}.x.{member}" for member in members]
    alike = stated("gptq", dict.fromkeys(OTHERS, FOUR), names)["quantization_config"]["dynamic"]
    assert [vllm_rule(alike, name) for name in (*names, f"{BLOCK}.x.{whole}")] == [None] * (len(names) + 1)
    # Where its parts differ no rule is right for the whole.
    mixed = stated("gptq", dict.fromkeys([*OTHERS, names[0]], FOUR), names[1:])["quantization_config"][
        "dynamic"
    ]
    assert vllm_rule(mixed, names[0]) == {} == vllm_rule(mixed, f"{BLOCK}.x.{whole}")
    assert vllm_rule(mixed, names[1]) is None


def test_the_proof_reads_rules_as_engines_do() -> None:
    schemes, shapes = dict.fromkeys(OTHERS, FOUR), dict.fromkeys(OTHERS, (64, 64))
    config = stated("gptq", schemes, [])
    for rule, message in (
        ({"-:^*\\.o_proj$": {}}, "no regular expression"),
        ({"-:.*o_proj": {}}, "tells engines to ignore"),
        ({"+:.*o_proj": {"bits": 8}}, "says num_bits = 8"),
    ):
        config["quantization_config"]["dynamic"] = rule
        with pytest.raises(ProofError, match=message):
            prove_configuration(config, schemes, shapes)


@pytest.fixture(scope="module")
def routed(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama with a router beside the gate of its dense MLP, which no real model has."""
    path = tmp_path_factory.mktemp("routed") / "model"
    shutil.copytree(llama_dir, path)
    tensors = load_file(path / "model.safetensors")
    tensors[f"{BLOCK}.mlp.gate.weight"] = torch.zeros(8, 64, dtype=torch.bfloat16)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("name", ["awq", "autoround"])
def test_names_that_engines_find_in_others(name: str, routed: Path, tmp_path: Path) -> None:
    """vLLM skips by parts of names, and auto-round searches a router's name in others: refused before any work."""
    schemes = {f"{BLOCK}.mlp.up_proj": FOUR}
    plan_export(routed, tmp_path / "out", schemes, name)
    with pytest.raises(UnrepresentableError, match=r"ignore .*mlp\.gate_proj, which contains .*mlp\.gate$"):
        plan_export(routed, tmp_path / "out", {**schemes, f"{BLOCK}.mlp.gate_proj": FOUR}, name)


def test_only_full_names_of_what_could_be_linear(routed: Path) -> None:
    found = unquantized(Checkpoint(routed), dict.fromkeys([*ATTENTION, *OTHERS], FOUR))
    linear = {f"model.layers.1.{name.removeprefix(BLOCK)[1:]}" for name in (*ATTENTION, *OTHERS)}
    assert set(found) == linear | {"lm_head", f"{BLOCK}.mlp.gate"}


def test_fused_experts_are_left_alone(tmp_path: Path) -> None:
    """gpt-oss keeps a block's experts in tensors of three dimensions; vLLM asks for each, or for all at once."""
    from transformers import GptOssConfig, GptOssForCausalLM

    made = GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=32,
    )  # fmt: skip
    GptOssForCausalLM(made).bfloat16().save_pretrained(tmp_path / "model")
    source, experts = Checkpoint(tmp_path / "model"), f"{BLOCK}.mlp.experts"
    schemes = dict.fromkeys([*ATTENTION, f"{BLOCK}.self_attn.o_proj"], FOUR)
    found = unquantized(source, schemes)
    assert set(found) == {"lm_head", experts, f"{BLOCK}.mlp.router"}
    ignore = stated("compressed-tensors", schemes, found)["quantization_config"]["ignore"]
    asked = (f"{experts}.0.gate_proj", f"{experts}.3.w1")
    for name in asked:
        assert any(rule.startswith("re:") and re.match(rule[3:], name) for rule in ignore)
    assert experts in ignore and not any(re.match(rule[3:], f"{BLOCK}.mlp.expertsx") for rule in ignore)
    dynamic = stated("gptq", schemes, found)["quantization_config"]["dynamic"]
    assert all(vllm_rule(dynamic, name) is None for name in (experts, *asked))
    assert vllm_rule(dynamic, f"{BLOCK}.self_attn.q_proj") == {}
    for name in ("compressed-tensors", "gptq", "autoround", "awq"):
        plan_export(tmp_path / "model", tmp_path / "out", schemes, name)
    with pytest.raises(
        UnrepresentableError, match=r"experts of .*gate_up_proj in one tensor.*--ignore experts"
    ):
        plan_export(tmp_path / "model", tmp_path / "out", {f"{experts}.0.gate_up_proj": FOUR}, "gptq")


def test_the_head_of_gpt_neox_is_left_alone(tmp_path: Path) -> None:
    """`embed_out` is a linear layer whatever it is called, and engines would look for its codes; `embed_in` is none."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    made = GPTNeoXConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    GPTNeoXForCausalLM(made).bfloat16().save_pretrained(tmp_path / "model")
    source, block = Checkpoint(tmp_path / "model"), "gpt_neox.layers.0"
    assert {"embed_out.weight", "gpt_neox.embed_in.weight"} <= source.tensors.keys()
    layers = []
    for name in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"):
        rows, columns = source.tensors[f"{block}.{name}.weight"].shape
        grid = UniformGrid(4, 32, True, torch.ones(rows, columns // 32).bfloat16())
        layers.append(CodedLayer(f"{block}.{name}", torch.ones(rows, columns, dtype=torch.uint8), grid))
    assert set(unquantized(source, {layer.name: FOUR for layer in layers})) == {"embed_out", "lm_head"}
    by_name("compressed-tensors").write(source, tmp_path / "out", layers, prove_from=lambda: layers)
    said = Checkpoint(tmp_path / "out").config()["quantization_config"]
    assert "embed_out" in said["ignore"] and not any("embed_in" in name for name in said["ignore"])
    by_name("gptq").write(source, tmp_path / "gptq", layers, prove_from=lambda: layers)
    dynamic = Checkpoint(tmp_path / "gptq").config()["quantization_config"]["dynamic"]
    assert vllm_rule(dynamic, "embed_out") is None


def test_autoround_states_a_quantized_head(llama_dir: Path, tmp_path: Path) -> None:
    """Its loader quantizes what lies in blocks, and besides only what has an entry of its own."""
    source = Checkpoint(llama_dir)
    names = ["lm_head", f"{BLOCK}.mlp.up_proj"]
    layers = []
    for name in names:
        rows, columns = source.tensors[f"{name}.weight"].shape
        grid = UniformGrid(4, 32, True, torch.ones(rows, columns // 32).bfloat16())
        layers.append(CodedLayer(name, torch.ones(rows, columns, dtype=torch.uint8), grid))
    by_name("autoround").write(source, tmp_path / "out", layers, prove_from=lambda: layers)
    config = Checkpoint(tmp_path / "out").config()
    extra = config["quantization_config"]["extra_config"]
    assert extra["lm_head"] == {"bits": 4, "group_size": 32, "sym": True}
    assert f"{BLOCK}.mlp.up_proj" not in extra
    del extra["lm_head"]
    with pytest.raises(ProofError, match="does not tell engines to quantize lm_head"):
        prove_configuration(config, {"lm_head": FOUR}, {"lm_head": (96, 64)})
    with pytest.raises(UnrepresentableError, match="awq: engines do not quantize lm_head"):
        plan_export(llama_dir, tmp_path / "no", {"lm_head": FOUR}, "awq")
    assert stated("gptq", {"lm_head": FOUR}, [])["quantization_config"]["lm_head"] is True


@pytest.mark.parametrize(
    ("name", "scheme", "message"),
    [
        ("awq", Scheme(4, -1, True), r"one group size for all layers; .*q_proj is int4 per row"),
        ("autoround", ODD, "one packing for all layers"),
    ],
)
def test_what_fits_alone_but_not_together(
    name: str, scheme: Scheme, message: str, llama_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnrepresentableError, match=message):
        plan_export(llama_dir, tmp_path / "out", {**dict.fromkeys(OTHERS, FOUR), ATTENTION[0]: scheme}, name)


def test_mlx_has_experts_where_mlx_lm_stacks_their_scales() -> None:
    schemes = dict.fromkeys(EXPERTS, FOUR)
    stated("mlx", schemes, [], model_type="mixtral")
    stated("mlx", dict.fromkeys(OTHERS, FOUR), EXPERTS, model_type="qwen3_moe")
    with pytest.raises(
        UnrepresentableError, match=r"does not load quantized experts of qwen3_moe .*experts\.0\.gate_proj"
    ):
        stated("mlx", schemes, [], model_type="qwen3_moe")


def test_mlx_states_the_experts_as_mlx_lm_stacks_them() -> None:
    """It asks for one module per projection of a layer; what is not named there would get the file's base."""
    mixtral = [
        f"{BLOCK}.block_sparse_moe.experts.{expert}.w{part}" for expert in range(2) for part in (1, 2, 3)
    ]
    dense = [*OTHERS, *ATTENTION]
    schemes = dict.fromkeys(dense, FOUR) | {name: THREE if name[-1] == "2" else FOUR for name in mixtral}
    said = stated("mlx", schemes, [], model_type="mixtral")["quantization"]
    three = {"bits": 3, "group_size": 32}
    assert said[f"{BLOCK}.block_sparse_moe.switch_mlp.down_proj"] == three == said[mixtral[1]]
    assert not any("switch_mlp.gate" in name or "switch_mlp.up" in name for name in said)
    schemes = dict.fromkeys(dense, FOUR) | dict.fromkeys(EXPERTS, THREE)
    for kind, folder in (("qwen2_moe", "switch_mlp"), ("afmoe", "experts")):
        said = stated("mlx", schemes, [], model_type=kind)["quantization"]
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert said[f"model.layers.1.mlp.{folder}.{name}"] == three
    with pytest.raises(
        UnrepresentableError, match=r"mlx-lm joins up_proj .*0\.up_proj and .*1\.up_proj differ"
    ):
        stated("mlx", {**schemes, EXPERTS[4]: FOUR}, [], model_type="qwen2_moe")
    with pytest.raises(UnrepresentableError, match=r"1\.down_proj differ"):
        stated("mlx", dict.fromkeys(EXPERTS[:-1], FOUR), EXPERTS[-1:], model_type="qwen2_moe")


def test_autoround_states_experts_by_their_layer() -> None:
    """vLLM looks up the module that holds them; auto-round, which searches that name in others, finds their own."""

    def extra(schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
        config = stated("autoround", schemes, ignored)
        prove_configuration(config, schemes, dict.fromkeys(schemes, (64, 64)))
        found: dict[str, Any] = config["quantization_config"]["extra_config"]
        return found

    whole, dense = "model.layers.1.mlp.experts", dict.fromkeys([*OTHERS, *ATTENTION], FOUR)
    found = extra(dense | dict.fromkeys(EXPERTS, THREE), [])
    assert found == {name: {"bits": 3, "group_size": 32, "sym": True} for name in (*EXPERTS, whole)}
    assert extra(dense, EXPERTS)[whole]["bits"] == 16
    assert whole not in extra(dense | dict.fromkeys(EXPERTS, FOUR), [])
    assert whole not in extra(dense | {**dict.fromkeys(EXPERTS, THREE), EXPERTS[0]: FOUR}, [])
