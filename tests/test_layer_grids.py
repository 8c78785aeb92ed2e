# SPDX-License-Identifier: Apache-2.0
"""Grids of single layers: the rules, and that every part of the house keeps to them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import discquant
from discquant.config import (
    DataConfig,
    GridConfig,
    GridRules,
    LayerGrid,
    QuantizeConfig,
    SolverConfig,
    names_module,
    names_none,
    parse_grid,
)
from discquant.errors import ConfigError, UnrepresentableError
from discquant.formats import registry
from discquant.run.checks import check_groups
from discquant.run.directory import RunDirectory
from discquant.run.inspection import inspect
from discquant.run.pipeline import Pipeline
from discquant.solver.chain import DecoderChain
from discquant.solver.solve import lay_grids

BASE = GridConfig(3, 64, True, "absmax")


def llama(hidden: int = 64, middle: int = 96) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=61, hidden_size=hidden, intermediate_size=middle, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk whose rows fill the blocks of K types but for `down_proj`, and tokens."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("layers")
    llama(256, 320).to(torch.bfloat16).save_pretrained(path / "model")
    ids = torch.randint(3, 60, (12, 16), generator=torch.Generator().manual_seed(1))
    save_file({"text": ids.short()}, path / "tokens.safetensors")
    return path


def config_of(folder: Path, rules: tuple[str, ...], grid: GridConfig, **changes: Any) -> QuantizeConfig:
    return QuantizeConfig(
        grid=grid,
        layers=tuple(LayerGrid.parse(rule, grid) for rule in rules),
        data=DataConfig(f"{folder / 'tokens.safetensors'}:text", nsamples=8, seqlen=16),
        **{"method": "rtn", "baselines": (), **changes},
    )


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("4", GridConfig(4, 64, True, "absmax")),
        ("bits=8,group_size=32", GridConfig(8, 32, True, "absmax")),
        ("group_size=-1, sym=false", GridConfig(3, -1, False, "absmax")),
        ("5g-1", GridConfig(5, -1, True, "absmax")),
        ("4g32,sym=false", GridConfig(4, 32, False, "absmax")),
        ("4,grid=search", GridConfig(4, 64, True, "search")),
        ("q4_k", GridConfig(4, 32, False, "absmax", "q4_k")),
        ("kind=nvfp4,grid=search", GridConfig(4, 16, True, "search", "nvfp4")),
        ("kind=uniform,bits=2", GridConfig(2, 64, True, "absmax")),
    ],
)
def test_specs(spec: str, expected: GridConfig) -> None:
    assert parse_grid(spec, BASE) == expected
    assert LayerGrid.parse(f"*.0.down_proj:{spec}", BASE) == LayerGrid("*.0.down_proj", expected)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("down_proj", "PATTERN:SPEC"),
        (":4", "PATTERN:SPEC"),
        ("down_proj:", "PATTERN:SPEC"),
        ("down_proj:four", "kind must be one of"),
        ("down_proj:bits=x", "bits must be an integer"),
        ("down_proj:bits=²", "bits must be an integer, got '²'"),
        ("down_proj:²", "kind must be one of"),
        ("down_proj:4,bits=3", "a width"),
        ("down_proj:4g32,group_size=64", "a width"),
        ("down_proj:group_size=64,4g32", "a width"),
        ("down_proj:4g", "kind must be one of"),
        ("down_proj:width=4", "a width"),
        ("down_proj:sym=yes", "sym must be true or false"),
        ("down_proj:9", "bits must be an integer from 2 to 8"),
        ("down_proj:4,group_size=7", "group_size must be"),
        ("down_proj:q4_k,group_size=64", "of kind q4_k"),
        ("down_proj:4,", "a width"),
    ],
)
def test_rules_that_cannot_be_read(rule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerGrid.parse(rule, BASE)


def test_the_last_rule_that_names_a_module_counts() -> None:
    widths = {"down_proj": 4, "a.0.*": 5, "a.0.mlp.down_proj": 6, "a.1.mlp.down_proj": 7, "*": 8}
    rules = [LayerGrid(pattern, GridConfig(bits, 64)) for pattern, bits in widths.items()]
    of = GridRules(GridConfig(3, 64), rules[:-1])
    names = (
        "a.0.mlp.down_proj",
        "a.0.mlp.up_proj",
        "a.1.mlp.down_proj",
        "a.2.mlp.down_proj",
        "a.2.mlp.up_proj",
    )
    assert [of(name).bits for name in names] == [6, 5, 7, 4, 3]
    turned = GridRules(GridConfig(3, 64), rules[-2::-1])  # now the wider patterns count
    assert [turned(name).bits for name in names] == [4, 5, 4, 4, 3]
    assert GridRules(GridConfig(3, 64), rules)(names[0]).bits == 8
    assert dict(of.shares(names)) == {GridConfig(bits, 64): 0.2 for bits in (6, 5, 7, 4, 3)}
    assert of.shares(()) == GridRules(GridConfig(3, 64)).shares(names) == ((GridConfig(3, 64), 1.0),)
    config = QuantizeConfig(grid=GridConfig(3, 64), layers=tuple(rules[:-1]))
    again = GridRules.of_dict(json.loads(json.dumps(config.to_dict())))
    assert all(again(name) == config.grid_of(name) for name in names)
    assert [grid.bits for grid in config.grids] == [3, 4, 5, 6, 7]


def test_a_rule_covers_what_is_below_a_module() -> None:
    """The last that covers a layer counts, be it by the layer's own name or by that of a module around it."""
    base = GridConfig(3, 64)
    rules = [
        LayerGrid(pattern, GridConfig(bits, 64))
        for bits, pattern in enumerate(("a.0.mlp", "up", "mlp", "a.1.mlp.up", "*.[2]", "a.3"), 2)
    ]
    of = GridRules(base, rules)
    names = ("a.0.mlp.up", "a.1.mlp.up", "a.2.mlp.up", "a.3.mlp.up", "a.30.mlp.up", "a.30.up", "a.30.down")
    assert [of(name).bits for name in names] == [4, 5, 6, 7, 4, 3, 3]
    assert [GridRules(base, rules[::-1])(name).bits for name in names] == [2, 3, 3, 3, 3, 3, 3]
    for name in names:
        last = next((rule.grid for rule in rules[::-1] if names_module(rule.modules, name)), base)
        assert of(name) == last
    assert names_none(("mlp", "*.3", "0.mlp", "a.4", "a.3*", "*.x", "up"), names) == ["0.mlp", "a.4", "*.x"]


def test_plain_names_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """`allocate` writes a rule per layer: matching each with each took minutes for thousands of experts."""

    def never(*_: str) -> bool:
        raise AssertionError("matched a plain name")

    monkeypatch.setattr("discquant.config.layers.fnmatch", never)
    chain = DecoderChain(llama())
    names = [ref.name for refs in chain.weights for ref in refs]
    config = QuantizeConfig(layers=tuple(LayerGrid(name, GridConfig(4, 32)) for name in names))
    check_groups(chain, dataclasses.replace(config, grid=GridConfig(3, 32)))
    assert {config.grid_of(name).bits for name in names} == {4}


def test_configurations_are_validated() -> None:
    with pytest.raises(ValueError, match="layers must be a tuple of LayerGrid"):
        QuantizeConfig(layers=["down_proj:4"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale_iters with kind q4_k"):
        QuantizeConfig(layers=(LayerGrid.parse("down_proj:q4_k", BASE),), solver=SolverConfig(scale_iters=4))
    with pytest.raises(ValueError, match="modules must be"):
        LayerGrid("", BASE)
    with pytest.raises(ValueError, match="grid must be a GridConfig"):
        LayerGrid("down_proj", {"bits": 4})  # type: ignore[arg-type]


def test_grids_are_laid_by_the_rules() -> None:
    chain = DecoderChain(llama())
    config = QuantizeConfig(
        grid=GridConfig(3, 32),
        layers=(LayerGrid.parse("v_proj:nvfp4", BASE), LayerGrid.parse("*.layers.1.*:8", BASE)),
    )
    grids = lay_grids(chain, config.grid_of)
    bits = {name: grid.num_bits for name, grid in grids.items()}
    assert all((number == 8) == (".layers.1." in name) for name, number in bits.items())
    assert bits["model.layers.0.self_attn.v_proj"] == 4 and bits["model.layers.0.self_attn.q_proj"] == 3
    # Alone among those it would be fused with, it has its own global scale.
    alone = lay_grids(chain, GridConfig.of_kind("nvfp4"))["model.layers.0.self_attn.v_proj"]
    laid = grids["model.layers.0.self_attn.v_proj"]
    assert not torch.equal(laid.tensor_scale, alone.tensor_scale)  # type: ignore[attr-defined]


def test_in_memory() -> None:
    ids = torch.randint(3, 61, (8, 16))
    solver = SolverConfig(iters=3, batch_size=4, micro_batch=2, warmup=1)
    config = QuantizeConfig(
        grid=GridConfig(3, 32), layers=(LayerGrid("down_proj", GridConfig(5, 32)),), solver=solver
    )
    result = discquant.quantize(llama(), config=config, calibration=ids)
    assert {layer.name.rpartition(".")[2]: layer.num_bits for layer in result.layers()}["down_proj"] == 5
    assert all(grid.num_bits == (5 if "down" in name else 3) for name, grid in result.grids.items())
    part = dataclasses.replace(
        config,
        layers=(LayerGrid("mlp", GridConfig(5, 32)),),
        ignore=("lm_head", "model.layers.1", "self_attn"),
    )
    grids = discquant.quantize(llama(), config=part, calibration=ids).grids
    assert len(grids) == 3 and {grid.num_bits for grid in grids.values()} == {5}
    wrong = dataclasses.replace(config, layers=(LayerGrid("mpl", GridConfig(5, 32)),))
    with pytest.raises(
        ConfigError, match=r"no quantized layer matches --layer-grid 'mpl'; last names here: down_proj"
    ):
        discquant.quantize(llama(), config=wrong, calibration=ids)
    for nothing in ("mpl", "layers.1"):
        with pytest.raises(ConfigError, match=r"no module matches --ignore"):
            discquant.quantize(
                llama(), config=dataclasses.replace(config, ignore=("lm_head", nothing)), calibration=ids
            )
    wide = dataclasses.replace(config, layers=(LayerGrid("q_proj", GridConfig(5, 96)),))
    with pytest.raises(ConfigError, match=r"widest row = 64, .* got 96"):
        discquant.quantize(llama(), config=wide, calibration=ids)
    found = discquant.allocate(
        llama(), average_bits=3.75, choices=("2", "4", GridConfig(3, 32)), calibration=ids
    )
    assert {unit.chosen for unit in found.units} <= {"2", "4", "uniform 3g32"}
    again = discquant.quantize(
        llama(), config=dataclasses.replace(config, layers=found.layers), calibration=ids
    )
    assert all(again.grids[rule.modules].num_bits == rule.grid.bits for rule in found.layers)


def test_every_file_states_every_layer(folder: Path, tmp_path: Path) -> None:
    """A run, its files in five formats, and what reads them back."""
    formats = "compressed-tensors,gptq,autoround,mlx,gguf"
    config = config_of(
        folder, ("down_proj:4", "*.layers.0.*:bits=8,group_size=32"), GridConfig(3, 64), format=formats
    )
    out = tmp_path / "out"
    summary = Pipeline(folder / "model", out, config).execute()
    expected = {layer.name: layer.grid.num_bits for layer in RunDirectory(out).coded_layers()}
    assert set(expected.values()) == {3, 4, 8}
    for name in formats.split(",")[:-1]:
        facts = {row.name: row.num_bits for row in registry.by_name(name).describe(out / name).layers}
        assert facts == expected, name
    types = {row.name: row.kind for row in registry.by_name("gguf").describe(out / "gguf").layers}
    assert set(types.values()) == {"Q4_0", "Q8_0"}
    weights = {name: rows * columns for name, (rows, columns) in (
        (layer.name, layer.q.shape) for layer in RunDirectory(out).coded_layers()
    )}  # fmt: skip
    extra = {8: 16 / 32, 4: 16 / 64, 3: 16 / 64}
    own = sum(weights[name] * (bits + extra[bits]) for name, bits in expected.items()) / sum(weights.values())
    assert summary["sizes"]["bits_per_weight"] == inspect(out)["bits_per_weight"] == pytest.approx(own)
    report = (out / "report.md").read_text()
    assert "on 3 grids: 8 bits, symmetric, groups of 32, search scales (7 layers, " in report
    assert "| `layers` | 2 rules |" in report and "in groups of" not in report
    ids = torch.randint(3, 60, (1, 12))
    with torch.no_grad():
        loaded = [discquant.load(out / name)(ids).logits for name in ("compressed-tensors", "gptq")]
    assert torch.equal(*loaded)


def test_kinds_beside_each_other(folder: Path, tmp_path: Path) -> None:
    """GGUF mixes its own types; what a row's length makes of them is marked; sizes are the file's."""
    config = config_of(
        folder, ("v_proj:q3_k", "o_proj:8", "o_proj:q4_0"), GridConfig.of_kind("q4_k"), format="gguf"
    )
    summary = Pipeline(folder / "model", tmp_path / "out", config).execute()
    manifest = json.loads((tmp_path / "out" / "gguf" / "discquant_manifest.json").read_text())
    rows = {
        name.rpartition(".")[2]: (row["type"], row["fallback"]) for name, row in manifest["layers"].items()
    }
    assert rows == {
        "q_proj": ("Q4_K", False), "k_proj": ("Q4_K", False), "v_proj": ("Q3_K", False), "o_proj": ("Q4_0", False),
        "gate_proj": ("Q4_K", False), "up_proj": ("Q4_K", False), "down_proj": ("Q4_1", True),
    }  # fmt: skip
    assert inspect(tmp_path / "out" / "gguf")["bits_per_weight"] == summary["sizes"]["bits_per_weight"]
    bare = dataclasses.replace(config, format="none")
    Pipeline(folder / "model", tmp_path / "bare", bare).execute()
    assert inspect(tmp_path / "bare")["bits_per_weight"] == summary["sizes"]["bits_per_weight"]
    # A rule's kind counts where the format cannot hold it, too.
    wrong = config_of(folder, ("v_proj:q3_k",), GridConfig(4, 32), format="gptq")
    with pytest.raises(UnrepresentableError, match=r"--kind uniform and q3_k; give one that can \(gguf"):
        Pipeline(folder / "model", tmp_path / "wrong", wrong).execute()
    assert not (tmp_path / "wrong").exists()


def test_a_run_continues_with_its_own_rules_alone(folder: Path, tmp_path: Path) -> None:
    """And one from before there were any is one without."""
    config = config_of(folder, ("down_proj:4",), GridConfig(3, 64), format="none")
    Pipeline(folder / "model", tmp_path / "out", config).execute()
    Pipeline(folder / "model", tmp_path / "out", config).execute()
    with pytest.raises(discquant.errors.ResumeError, match=r"config\.layers: 1 rule differs"):
        Pipeline(folder / "model", tmp_path / "out", dataclasses.replace(config, layers=())).execute()
    plain = dataclasses.replace(config, layers=())
    Pipeline(folder / "model", tmp_path / "older", plain).execute()
    record = json.loads((tmp_path / "older" / "config.json").read_text())
    assert record["identity"]["config"].pop("layers") == []
    (tmp_path / "older" / "config.json").write_text(json.dumps(record))
    said: list[str] = []
    pipeline = Pipeline(folder / "model", tmp_path / "older", plain)
    pipeline.events = dataclasses.replace(pipeline.events, message=said.append)
    pipeline.execute()
    assert any("complete already" in line for line in said)


def test_plan_counts_what_each_layer_takes(folder: Path) -> None:
    from typer.testing import CliRunner

    from discquant.cli import app

    def planned(*rules: str) -> dict[str, Any]:
        line = [
            "plan",
            str(folder / "model"),
            "--bits",
            "4",
            "--group-size",
            "64",
            "--gpu",
            "4090",
            "--seqlen",
            "32",
            "--json",
        ]
        for rule in rules:
            line += ["--layer-grid", rule]
        done = CliRunner().invoke(app, line)
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.output)
        return found

    def disk(plan: dict[str, Any]) -> float:
        return max(float(phase["items"]["disk"].get("exported models", 0)) for phase in plan["phases"])

    plain, wide = planned(), planned("*:8")
    half = planned("*.layers.1.*:8")
    # Codes of more than four bits take a byte in place of half a one in u8 state; files grow by the bits.
    assert wide["state_bytes_per_weight"] > plain["state_bytes_per_weight"] + 0.4
    middle = (wide["state_bytes_per_weight"] + plain["state_bytes_per_weight"]) / 2
    assert half["state_bytes_per_weight"] == pytest.approx(middle)
    assert disk(wide) - disk(plain) == pytest.approx(plain["quantized_weights"] / 2)
    assert disk(half) == pytest.approx((disk(plain) + disk(wide)) / 2)
    done = CliRunner().invoke(
        app, ["plan", str(folder / "model"), "--seqlen", "32", "--layer-grid", "nothing:8"]
    )
    assert done.exit_code != 0 and "no quantized layer matches" in str(done.exception)


def test_refine_has_the_rules_of_the_file(folder: Path, tmp_path: Path) -> None:
    """A file of several grids is refined on those, whatever the configuration says of layers."""
    from discquant.run.refine import RefinePipeline

    config = config_of(folder, ("down_proj:4",), GridConfig(3, 64), format="gptq")
    Pipeline(folder / "model", tmp_path / "out", config).execute()
    solver = SolverConfig(iters=2, batch_size=4, micro_batch=2, warmup=1)
    other = config_of(folder, ("q_proj:8",), GridConfig(3, 64), solver=solver, method="discquant")
    pipeline = RefinePipeline(tmp_path / "out" / "gptq", tmp_path / "refined", folder / "model", other)
    summary = pipeline.execute()
    assert summary["refine"]["codes"] > 0 and pipeline.config.layers == ()
    facts = {row.name: row.num_bits for row in registry.find(tmp_path / "refined" / "gptq").describe(
        tmp_path / "refined" / "gptq"
    ).layers}  # fmt: skip
    assert {name.rpartition(".")[2]: bits for name, bits in facts.items()}["down_proj"] == 4
    assert set(facts.values()) == {3, 4}
