# SPDX-License-Identifier: Apache-2.0
"""Grids for each layer: shared where engines join layers, within the size, written and read again."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from discquant.allocation import allocate
from discquant.allocation.allocate import Measured
from discquant.allocation.units import unit_of, units_of
from discquant.config import DataConfig, GridConfig, LayerGrid, QuantizeConfig
from discquant.errors import (
    CheckpointError,
    ConfigError,
    MissingModelError,
    NonFiniteError,
    OutputExistsError,
    ResumeError,
)
from discquant.run.allocate import allocate_model, choose_again, read_layers
from discquant.solver.chain import DecoderChain
from discquant.solver.engine import Engine
from discquant.solver.rows import TokenRows

CHOICES = {str(bits): GridConfig(bits, 32) for bits in (2, 3, 4, 8)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks, the first with much larger weights before attention, and tokens for it."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("allocate")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=53, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(8 if "layers.0.self_attn.v" in name else 3)
    model.to(torch.bfloat16).save_pretrained(path / "model")
    ids = torch.randint(3, 50, (16, 24), generator=torch.Generator().manual_seed(1))
    save_file({"text": ids.short()}, path / "tokens.safetensors")
    return path


def chain_of(folder: Path) -> tuple[DecoderChain, TokenRows]:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    chain = DecoderChain(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval())
    ids = load_file(folder / "tokens.safetensors")["text"].long()
    return chain, TokenRows(chain, ids, None, 8)


def test_joined_layers_and_experts_are_one_unit() -> None:
    names = [
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj",
        "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.experts.0.gate_proj",
        "model.layers.1.mlp.experts.12.down_proj", "model.layers.1.mlp.shared_expert.up_proj", "fc",
    ]  # fmt: skip
    assert [len(members) for members in units_of(names).values()] == [3, 1, 2, 1, 2, 1, 1]
    assert unit_of(names[1]) == "model.layers.0.self_attn.qkv_proj"
    assert unit_of(names[8]) == unit_of(names[7]) == "model.layers.1.mlp.experts"
    assert unit_of("fc") == "fc"


@pytest.mark.parametrize("codes", ["gptq", "rtn"])
def test_bits_go_where_they_count_within_the_size(folder: Path, codes: Any) -> None:
    chain, rows = chain_of(folder)
    found = allocate(chain, rows, CHOICES, 3.75, codes=codes)
    bits = found.bits()
    assert bits is not None and 3.5 < bits <= 3.75
    assert found.bits("3") == 3.5 and found.bits("8") == 8.5
    # Damage falls with every bit, by about four, and what was chosen costs less than the same size everywhere.
    everywhere = [found.damage(choice) for choice in CHOICES]
    assert all(
        one is not None and two is not None and 2 * two < one for one, two in itertools.pairwise(everywhere)
    )
    damage = found.damage()
    assert damage is not None and everywhere[1] is not None and damage < everywhere[1]
    by_name = {unit.name: unit for unit in found.units}
    assert len(by_name) == 8 and sum(len(unit.modules) for unit in found.units) == 14
    widest = max(found.units, key=lambda unit: unit.damage["3"] / unit.weights)
    narrowest = min(found.units, key=lambda unit: unit.damage["3"] / unit.weights)
    assert int(widest.chosen) > int(narrowest.chosen)
    # The rules name every layer, those of a unit alike.
    config = QuantizeConfig(layers=found.layers)
    for unit in found.units:
        assert {config.grid_of(name) for name in unit.modules} == {CHOICES[unit.chosen]}
    assert found.to_dict()["predicted_kl"] == damage


def test_gptq_s_codes_are_damaged_less_and_labels_are_seeded(folder: Path) -> None:
    chain, rows = chain_of(folder)
    made = [allocate(chain, rows, CHOICES, 3.75, codes=codes, seed=seed) for codes, seed in (
        ("rtn", 0), ("gptq", 0), ("gptq", 0), ("gptq", 1),
    )]  # type: ignore[arg-type]  # fmt: skip
    rtn, gptq, again, other = (found.damage("3") for found in made)
    assert rtn is not None and gptq is not None and gptq < rtn
    assert again == gptq and other != gptq


def test_choices_that_are_not_allowed_are_not_taken(folder: Path) -> None:
    chain, rows = chain_of(folder)

    def allowed(name: str, shape: tuple[int, int], grid: GridConfig) -> bool:
        return grid.bits == 4 if name.endswith("k_proj") else grid.bits != 2

    found = allocate(chain, rows, CHOICES, 4.25, codes="rtn", allowed=allowed)
    for unit in found.units:
        joined = unit.name.endswith("qkv_proj")
        assert set(unit.bits) == ({"4"} if joined else {"3", "4", "8"}) and (not joined or unit.chosen == "4")
    assert found.bits("2") is None and found.damage("3") is None
    with pytest.raises(ConfigError, match=r"none of the choices 2, 3, 4, 8 can be held for .*qkv_proj"):
        allocate(
            chain, rows, CHOICES, 4.25, codes="rtn", allowed=lambda name, shape, grid: "q_proj" not in name
        )


def test_sizes_that_cannot_be_are_refused(folder: Path) -> None:
    chain, rows = chain_of(folder)
    with pytest.raises(
        ConfigError, match=r"narrowest choices take 2\.500 bits per weight, .* 2\.4 were asked for"
    ):
        allocate(chain, rows, CHOICES, 2.4, codes="rtn")
    with pytest.raises(ConfigError, match="gptq or rtn, got 'awq'"):
        allocate(chain, rows, CHOICES, 4, codes="awq")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least one choice"):
        allocate(chain, rows, {}, 4)
    for size in (float("nan"), float("inf"), 0, -3):
        with pytest.raises(ConfigError, match="average bits must be above 0 and finite"):
            allocate(chain, rows, CHOICES, size)


def config_of(folder: Path, **changes: Any) -> QuantizeConfig:
    data = DataConfig(f"{folder / 'tokens.safetensors'}:text", nsamples=16, seqlen=24)
    return QuantizeConfig(data=data, **{"format": "none", **changes})


def test_placements_write_the_same_file(folder: Path, tmp_path: Path) -> None:
    files = []
    for where in ("resident", "host", "disk"):
        out = tmp_path / f"{where}.json"
        allocate_model(folder / "model", out, config_of(folder), CHOICES, 3.75, engine=Engine(where))  # type: ignore[arg-type]
        files.append(out.read_bytes())
    assert files[0] == files[1] == files[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.json", "host.json", "resident.json"]
    rules = read_layers(tmp_path / "host.json")
    assert len(rules) == 14 and all(isinstance(rule, LayerGrid) for rule in rules)
    written = json.loads(files[0])
    assert written["text"]["windows"] == 16 and len(written["units"]) == 8
    with pytest.raises(OutputExistsError, match=r"host\.json exists"):
        allocate_model(folder / "model", tmp_path / "host.json", config_of(folder), CHOICES, 3.75)
    with pytest.raises(ConfigError, match="no folder"):
        allocate_model(folder / "model", tmp_path / "no" / "x.json", config_of(folder), CHOICES, 3.75)


def test_a_format_s_limits_are_kept(folder: Path, tmp_path: Path) -> None:
    """ONNX holds every width, AWQ four bits alone: the others are not chosen however much room there is."""
    out = tmp_path / "grids.json"
    found = allocate_model(
        folder / "model", out, config_of(folder, format="awq,onnx"), CHOICES, 8, codes="rtn"
    )
    assert {unit.chosen for unit in found.units} == {"4"}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", CheckpointError, "is no JSON"),
        ("[]", CheckpointError, "no file of `discquant allocate`"),
        ('{"layers": []}', CheckpointError, "no file of `discquant allocate`"),
        ('{"discquant_allocation": 1, "layers": [{}]}', CheckpointError, "cannot be read"),
        (
            '{"discquant_allocation": 1, "layers": [{"modules": "a", "grid": {"bits": 99}}]}', CheckpointError,
            "bits must be an integer from 2 to 8",
        ),
        (None, MissingModelError, "cannot be read"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path: Path, text: str | None, error: type, message: str) -> None:
    path = tmp_path / "grids.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=message):
        read_layers(path)


def test_the_file_is_what_quantize_takes(folder: Path, tmp_path: Path) -> None:
    """From the command line: allocate, quantize with it, and the file holds each layer on its grid."""
    from typer.testing import CliRunner

    from discquant.cli import app
    from discquant.formats import registry

    text = f"{folder / 'tokens.safetensors'}:text"
    grids, out = tmp_path / "grids.json", tmp_path / "out"
    common = ["--dataset", text, "--seqlen", "24", "--device", "cpu"]
    line = [
        "allocate", str(folder / "model"), str(grids), "--average-bits", "3.75", "--choices", "2,3,4,8g32",
        "--group-size", "32", "--format", "gptq", "--nsamples", "16", *common,
    ]  # fmt: skip
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert "as chosen" in done.output and "8g32" in done.output
    rules = {rule.modules: rule.grid for rule in read_layers(grids)}
    line = [
        "quantize", str(folder / "model"), str(out), "--layer-grid", f"@{grids}", "--nsamples", "8", "--iters", "2",
        "--format", "gptq,compressed-tensors", "--baselines", "none", *common,
    ]  # fmt: skip
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    for name in ("gptq", "compressed-tensors"):
        facts = {row.name: row.num_bits for row in registry.find(out / name).describe(out / name).layers}
        assert facts == {name: grid.bits for name, grid in rules.items()} and len(set(facts.values())) > 1
    shutil.rmtree(out)


def test_killed_between_two_blocks_it_goes_on(folder: Path, tmp_path: Path) -> None:
    """To the same file, with the blocks measured before taken as they are; other work is refused there."""
    whole, out = tmp_path / "whole.json", tmp_path / "grids.json"
    allocate_model(folder / "model", whole, config_of(folder), CHOICES, 3.75)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        allocate_model(folder / "model", out, config_of(folder), CHOICES, 3.75, progress=stop)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["grids.json.unfinished", "whole.json"]
    other = {word: grid for word, grid in CHOICES.items() if word != "8"}
    with pytest.raises(ResumeError, match=r"grids\.json\.unfinished is of another model, text or choice"):
        allocate_model(folder / "model", out, config_of(folder), other, 3.75)
    said: list[str] = []
    seen: list[tuple[int, int]] = []
    allocate_model(
        folder / "model", out, config_of(folder), CHOICES, 3.75, say=said.append,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert said == ["note: 7 layers were measured before; the others follow"] and seen == [(1, 2), (2, 2)]
    assert out.read_bytes() == whole.read_bytes() and not (tmp_path / "grids.json.unfinished").exists()
    damaged = tmp_path / "x.json.unfinished"
    damaged.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError):
        allocate_model(folder / "model", tmp_path / "x.json", config_of(folder), CHOICES, 3.75)


def test_another_size_from_the_same_figures(folder: Path, tmp_path: Path) -> None:
    """Is what measuring again gives; no model is read."""
    from typer.testing import CliRunner

    from discquant.cli import app

    first, direct, again = (tmp_path / f"{name}.json" for name in ("first", "direct", "again"))
    allocate_model(folder / "model", first, config_of(folder), CHOICES, 3.75, codes="rtn")
    allocate_model(folder / "model", direct, config_of(folder), CHOICES, 5.5, codes="rtn")
    line = ["allocate", "nowhere", str(again), "--average-bits", "5.5", "--measured", str(first)]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert again.read_bytes() == direct.read_bytes() != first.read_bytes()
    assert f"note: the figures in {first} are of model, not of nowhere" in done.stderr
    line[2] = str(tmp_path / "x.json")
    refused = CliRunner().invoke(app, [*line, "--choices", "2,4", "--format", "none"])
    assert isinstance(refused.exception, ConfigError)
    assert str(refused.exception).endswith("no other option but --average-bits, got --choices, --format")
    assert not (tmp_path / "x.json").exists()
    with pytest.raises(ConfigError, match="narrowest"):
        choose_again(first, tmp_path / "x.json", 2)
    for broken in ('{"discquant_allocation": 1}', '{"discquant_allocation": 1, "choices": [], "units": []}'):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(CheckpointError, match="figures cannot be read"):
            choose_again(tmp_path / "broken.json", tmp_path / "x.json", 4)


def test_one_process_at_a_time_and_nothing_is_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process left is removed, another one at work is told, ranks are refused."""
    from discquant.run.lock import locked

    out, state = tmp_path / "grids.json", tmp_path / ".grids.json.state"
    state.mkdir()
    (state / "boundary-0099.act").write_bytes(b"left")
    with (
        locked(state),
        pytest.raises(OutputExistsError, match=r"grids\.json: another process .* another OUT"),
    ):
        allocate_model(folder / "model", out, config_of(folder), CHOICES, 3.75, codes="rtn")
    allocate_model(
        folder / "model", out, config_of(folder), CHOICES, 3.75, codes="rtn", engine=Engine("disk")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["grids.json"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        allocate_model(folder / "model", tmp_path / "x.json", config_of(folder), CHOICES, 3.75)


def test_damages_that_are_no_numbers_are_refused(folder: Path) -> None:
    chain, rows = chain_of(folder)
    with torch.no_grad():
        chain.model.get_submodule("model.norm").weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="outputs on the calibration text are not finite"):
        allocate(chain, rows, CHOICES, 4, codes="rtn")
    chain, rows = chain_of(folder)
    product = torch.full((4, 16), float("nan"), dtype=torch.float64)
    known = {
        ref.name: Measured(dict.fromkeys(CHOICES, 64), product) for refs in chain.weights for ref in refs
    }
    with pytest.raises(NonFiniteError, match=r"damage of .* is not finite"):
        allocate(chain, rows, CHOICES, 8, codes="rtn", known=known)


def test_what_a_run_would_refuse_is_refused_before_windows_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that nothing fits, groups wider than any row, choices that a file cannot hold beside each other."""
    import discquant.run.allocate as run

    monkeypatch.setattr(run, "load_windows", lambda *_, **__: pytest.fail("windows were read"))

    def refused(message: str, choices: dict[str, GridConfig], size: float, form: str = "none") -> None:
        with pytest.raises(ConfigError, match=message):
            allocate_model(
                folder / "model", tmp_path / "x.json", config_of(folder, format=form), choices, size
            )
        assert not any(tmp_path.iterdir())

    refused(r"narrowest choices take 2\.500 bits", CHOICES, 2.4)
    wide = {"4g1024": GridConfig(4, 1024), "4": GridConfig(4, 32)}
    refused("choice 4g1024: .* at most the widest row = 96", wide, 5)
    groups = {"4": GridConfig(4, 32), "4g64": GridConfig(4, 64)}
    refused("awq cannot hold the choices 4 and 4g64 beside each other: .* one group size", groups, 5, "awq")
    packings = {"4": GridConfig(4, 32), "3a": GridConfig(3, 32, False), "4a": GridConfig(4, 32, False)}
    refused("autoround cannot hold .* one packing", packings, 5, "autoround")
    refused(r"narrowest choices take 4\.500 bits", {"2": GridConfig(2, 32)}, 4.4, "gguf")


def test_choices_that_never_meet_are_no_conflict(folder: Path) -> None:
    """Of two that a file cannot hold together only one is allowed, or neither; the model's own config is left alone."""
    from discquant.run.choices import check_joined

    chain = DecoderChain(
        chain_of(folder)[0].model, ["*.layers.0.*"]
    )  # a block that nobody quantizes comes first
    config, kept = (json.loads((folder / "model" / "config.json").read_text()) for _ in range(2))
    groups = {"4": GridConfig(4, 32), "4g64": GridConfig(4, 64)}
    for sizes in ((32,), (64,), ()):
        check_joined(config, chain, ("awq",), groups, lambda _, __, grid, s=sizes: grid.group_size in s)  # type: ignore[misc]
    with pytest.raises(ConfigError, match="beside each other"):
        check_joined(config, chain, ("awq",), groups, lambda *_: True)
    assert config == kept


@pytest.mark.parametrize("form", ["gguf", "onnx"])
def test_a_file_is_as_large_as_was_counted(folder: Path, tmp_path: Path, form: str) -> None:
    """Formats that store codes wider get them counted so."""
    from discquant.formats import registry
    from discquant.formats.bits import file_bits_per_weight
    from discquant.run.pipeline import Pipeline

    if form == "onnx":
        pytest.importorskip("onnx")
    choices = {word: grid for word, grid in CHOICES.items() if word != "2"} | {"5": GridConfig(5, 32)}
    grids, config = tmp_path / "grids.json", config_of(folder, format=form)
    found = allocate_model(folder / "model", grids, config, choices, 6.5, codes="rtn")
    config = config_of(
        folder, format=form, layers=read_layers(grids), method="rtn", baselines=(), validation_windows=2
    )
    Pipeline(folder / "model", tmp_path / "out", config).execute()
    made = tmp_path / "out" / form
    assert file_bits_per_weight(registry.find(made), made) == pytest.approx(found.bits())
