# SPDX-License-Identifier: Apache-2.0
"""A whole run of a mixture of experts: per-expert tensors in the export, the same logits after loading it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from discquant.api import load
from discquant.config import DataConfig, GridConfig, LayerGrid, Method, QuantizeConfig, SolverConfig
from discquant.errors import UnrepresentableError
from discquant.formats import registry
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.grids import place_grid
from discquant.run.directory import RunDirectory
from discquant.run.events import Events
from discquant.run.pipeline import Pipeline
from discquant.run.refine import RefinePipeline
from discquant.run.served import apply_layers
from discquant.solver.engine import Engine

FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 32},
    "Qwen3Moe": {
        "num_experts": 12,
        "moe_intermediate_size": 32,
        "intermediate_size": 64,
        "mlp_only_layers": [0],
    },
}
# Its shared expert has a gate that is a linear layer.
GATED: dict[str, dict[str, Any]] = {
    "Qwen2Moe": {
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "intermediate_size": 64,
    },
}


def make_model(family: str, folder: Path) -> Any:
    """Write a random model without a tokenizer; return it."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts_per_tok=2, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        **(FAMILIES | GATED)[family],
    )  # fmt: skip
    torch.manual_seed(5)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(std=0.12)
        if family == "Qwen3Moe":  # logit 0: with this seed two of the 11 others are above it at every token
            model.model.layers[1].mlp.gate.weight[-1] = 0
    model.save_pretrained(folder)
    return model


def write_config(ids: torch.Tensor, folder: Path, baselines: tuple[Method, ...]) -> QuantizeConfig:
    """Write calibration ids; return a short run on them."""
    save_file({"ids": ids.int()}, folder / "ids.safetensors")
    return QuantizeConfig(
        grid=GridConfig(bits=4, group_size=16),
        solver=SolverConfig(iters=2, batch_size=2, micro_batch=2, warmup=1),
        data=DataConfig(f"{folder / 'ids.safetensors'}:ids", 4, 8),
        gptq_samples=2,
        validation_windows=2,
        baselines=baselines,
    )


@pytest.mark.parametrize("family", list(FAMILIES))
def test_quantize_export_load(family: str, tmp_path: Path) -> None:
    """The export holds every expert under the name it has in the original; loaded, it computes what was solved."""
    model = make_model(family, tmp_path / "model")
    ids = torch.randint(3, 61, (6, 8), generator=torch.Generator().manual_seed(3))
    config = write_config(ids, tmp_path, ("rtn",))
    summary = Pipeline(tmp_path / "model", tmp_path / "run", config).execute()
    exported = tmp_path / "run" / "compressed-tensors"
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = set(load_file(exported / "model.safetensors"))
    experts = {name.removesuffix(".weight") for name in before if ".experts." in name}
    assert experts
    for name in experts:
        assert f"{name}.weight_packed" in after and f"{name}.weight" not in after
    routers = [name for name in before if name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight"))]
    assert routers and set(routers) <= after
    entry = json.loads((exported / "config.json").read_text())["quantization_config"]
    assert {name.removesuffix(".weight") for name in routers} <= set(entry["ignore"])

    solved = apply_layers(model, RunDirectory(tmp_path / "run").layers(), torch.float32)
    loaded = load(exported)
    with torch.no_grad():
        expected = solved(input_ids=ids, use_cache=False).logits
        actual = loaded(input_ids=ids, use_cache=False).logits
    assert torch.equal(actual, expected)
    rows = {row["name"] for row in summary["layers"]}
    assert experts <= rows
    if family == "Qwen3Moe":  # experts that stay unseen are named, and none of their weights may move
        unseen = set(summary["experts_unseen"])
        assert unseen and unseen < experts
        report = (tmp_path / "run" / "report.md").read_text()
        assert "saw no calibration token" in report
        for row in summary["layers"]:
            assert (row["live"] == 0) == (row["name"] in unseen), row
            assert row["moved"] == 0 or row["name"] not in unseen
            if row["name"] in unseen:
                assert f"| `{row['name']}` | 4 | {row['weights']:,} | 0.0% | 0.00% |" in report


@pytest.mark.parametrize("rule", ["*.experts.*:8", "*.experts.*:nvfp4", "experts:q4_0"])
def test_experts_in_one_tensor_are_refused_on_any_grid(rule: str, tmp_path: Path) -> None:
    """No format writes them; the refusal names what to ignore."""
    import transformers

    config = transformers.GptOssConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.GptOssForCausalLM(config).save_pretrained(tmp_path / "model")
    options = write_config(torch.randint(3, 61, (6, 8)), tmp_path, ())
    options = dataclasses.replace(options, layers=(LayerGrid.parse(rule, options.grid),))
    with pytest.raises(
        UnrepresentableError, match=r"holds the experts of .* in one tensor, .* --ignore experts"
    ):
        Pipeline(tmp_path / "model", tmp_path / "run", options).execute()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_streamed_experts_give_the_same_bytes(family: str, tmp_path: Path) -> None:
    """State on disk, original weights read from the checkpoint block by block; baselines included."""
    make_model(family, tmp_path / "model")
    ids = torch.randint(3, 61, (6, 8), generator=torch.Generator().manual_seed(3))
    config = write_config(ids, tmp_path, ("rtn", "gptq", "greedy"))
    found = []
    for where in ("resident", "disk"):
        said: list[str] = []
        out, events = tmp_path / where, Events(message=said.append)
        summary = Pipeline(tmp_path / "model", out, config, engine=Engine(where), events=events).execute()
        assert not any("block by block" in line for line in said)
        exported = (out / "compressed-tensors" / "model.safetensors").read_bytes()
        kl = {name: row["kl_mean"] for name, row in summary["methods"].items()}
        found.append(((out / "codes.safetensors").read_bytes(), exported, kl))
    assert found[0] == found[1]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_engines_get_full_names_of_what_is_ignored(family: str, tmp_path: Path) -> None:
    """A last part or a glob means something else in each format: AWQ's and AutoRound's `gate` is in `gate_proj`."""
    make_model(family, tmp_path / "model")
    ids = torch.randint(3, 61, (6, 8), generator=torch.Generator().manual_seed(3))
    names = ("awq", "autoround", "gptq", "compressed-tensors")
    plain = dataclasses.replace(write_config(ids, tmp_path, ()), method="rtn", grid=GridConfig(4, 32))
    config = dataclasses.replace(plain, format=",".join(names), ignore=("lm_head", "gate", "*.k_proj"))
    Pipeline(tmp_path / "model", tmp_path / "run", config).execute()
    said = {
        name: json.loads((tmp_path / "run" / name / "config.json").read_text())["quantization_config"]
        for name in names
    }
    quantized = {layer.name for layer in RunDirectory(tmp_path / "run").coded_layers()}
    matrices = {
        name.removesuffix(".weight")
        for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items()
        if tensor.dim() == 2 and "embed" not in name
    }
    left = matrices - quantized
    assert any(name.endswith(".gate") for name in left) and any(name.endswith(".k_proj") for name in left)
    assert set(said["awq"]["modules_to_not_convert"]) == set(said["compressed-tensors"]["ignore"]) == left
    assert set(said["autoround"]["extra_config"]) == left - {"lm_head"}
    for name in matrices - {"lm_head"}:
        rules = [rule for rule in said["gptq"]["dynamic"] if re.match(rule[2:], name)]
        assert [rule[:2] for rule in rules] == ["-:"] * (name in left)
    # mlx-lm stacks the scales of Mixtral's experts, not those of Qwen3's.
    mlx = dataclasses.replace(plain, format="mlx")
    if family == "Qwen3Moe":
        with pytest.raises(UnrepresentableError, match="does not load quantized experts of qwen3_moe"):
            Pipeline(tmp_path / "model", tmp_path / "mlx", mlx).execute()
        assert not (tmp_path / "mlx").exists()
    else:
        Pipeline(tmp_path / "model", tmp_path / "mlx", mlx).execute()


def test_gate_of_a_shared_expert(tmp_path: Path) -> None:
    """It stays in full precision, which is said; a file of another tool that rounded it is refined with it."""
    make_model("Qwen2Moe", tmp_path / "model")
    ids = torch.randint(3, 61, (6, 8), generator=torch.Generator().manual_seed(3))
    config = write_config(ids, tmp_path, ())
    said: list[str] = []
    summary = Pipeline(
        tmp_path / "model", tmp_path / "run", config, events=Events(message=said.append)
    ).execute()
    gates = [f"model.layers.{index}.mlp.shared_expert_gate" for index in range(2)]
    rows = [row["name"] for row in summary["layers"]]
    assert not set(gates) & set(rows)
    assert [line for line in said if "stay in full precision" in line and gates[0] in line]
    exported = tmp_path / "run" / "compressed-tensors"
    entry = json.loads((exported / "config.json").read_text())["quantization_config"]
    assert set(gates) <= set(entry["ignore"])

    source = Checkpoint(tmp_path / "model")
    for rounded in (rows, [*rows, *gates]):
        layers, file = [], tmp_path / f"file-{len(rounded)}"
        for name in rounded:
            weight = source.read(f"{name}.weight").float()
            grid = place_grid(weight, config.grid)
            layers.append(CodedLayer(name, grid.nearest(weight), grid))
        registry.by_name("compressed-tensors").write(source, file, layers)
        out = tmp_path / f"refined-{len(rounded)}"
        summary = RefinePipeline(file, out, tmp_path / "model", config).execute()
        assert {layer.name for layer in RunDirectory(out).coded_layers()} == set(rounded)
        assert {row["name"] for row in summary["layers"]} == set(rounded)
