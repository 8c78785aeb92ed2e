# SPDX-License-Identifier: Apache-2.0
"""`discquant export` and `discquant inspect` on a run: same codes in every format, refusals before any byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from discquant.cli import app
from discquant.config import DataConfig, GridConfig, QuantizeConfig
from discquant.errors import (
    CheckpointError,
    ConfigError,
    MissingModelError,
    OutputExistsError,
    UnrepresentableError,
)
from discquant.formats.registry import by_name, find, parse_names
from discquant.run.directory import RunDirectory
from discquant.run.export import export
from discquant.run.inspection import inspect
from discquant.run.pipeline import Pipeline

FORMATS = ("compressed-tensors", "gptq", "gptq-v2", "autoround", "awq", "mlx")


@pytest.fixture(scope="module")
def run_dir(model_dir: Path, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of rounding to nearest, 4 bits, groups of 32, nothing exported."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = QuantizeConfig(
        grid=GridConfig(4, 32, True),
        method="rtn",
        data=DataConfig(dataset, 16, 32),
        format="none",
        baselines=(),
    )
    Pipeline(model_dir, out, config).execute()
    return out


def test_every_format_holds_the_codes_of_the_run(run_dir: Path, tmp_path: Path) -> None:
    said: list[str] = []
    written = export(run_dir, FORMATS, tmp_path / "out", say=said.append)
    assert [path.name for path in written.values()] == list(FORMATS)
    expected = {layer.name: layer for layer in RunDirectory(run_dir).coded_layers()}
    assert expected
    for name, folder in written.items():
        assert find(folder).name == name
        found = {layer.name: layer for layer in by_name(name).read(folder)}
        assert found.keys() == expected.keys()
        for key, layer in found.items():
            assert torch.equal(layer.q, expected[key].q)
        assert json.loads((folder / "discquant_proof.json").read_text())["layers"] == len(expected)
        card = (folder / "README.md").read_text()
        assert "| **rtn** |" in card, "the run's summary did not reach the card"
        facts = inspect(folder)
        assert facts["format"] == name
        assert facts["quantized_weights"] == sum(layer.q.numel() for layer in expected.values())
        assert facts["bits_per_weight"] > 4
        assert {row["engine"] for row in facts["engines"]}
    assert not (run_dir / "gptq").exists()


def test_default_place_is_the_run(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    assert export(tmp_path / "run", ["gptq"]) == {"gptq": tmp_path / "run" / "gptq"}
    with pytest.raises(
        OutputExistsError, match="gptq exists already; write what is not there yet with --format mlx"
    ):
        export(tmp_path / "run", ["mlx", "gptq"])
    assert not (tmp_path / "run" / "mlx").exists(), "refused before the first byte"


def test_a_model_in_one_format_becomes_another(run_dir: Path, model_dir: Path, tmp_path: Path) -> None:
    export(run_dir, ["awq"], tmp_path)
    with pytest.raises(ConfigError, match="--original"):
        export(tmp_path / "awq", ["gptq"], tmp_path)
    export(tmp_path / "awq", ["gptq"], tmp_path, original=str(model_dir))
    first, second = by_name("awq").read(tmp_path / "awq"), by_name("gptq").read(tmp_path / "gptq")
    for one, two in zip(first, second, strict=True):
        assert one.name == two.name
        assert torch.equal(one.q, two.q)
    card = (tmp_path / "gptq" / "README.md").read_text()
    assert "converted from `awq` (awq)" in card and "rounded by" not in card and "Seed" not in card
    recipe = json.loads((tmp_path / "gptq" / "discquant_manifest.json").read_text())["recipe"]
    (file,) = recipe["converted_from"].pop("files").items()
    assert file == ("model.safetensors", sha256((tmp_path / "awq" / file[0]).read_bytes()).hexdigest())
    assert file[1] in card
    assert recipe == {"converted_from": {"name": "awq", "format": "awq"}}
    assert "rounded by" in (tmp_path / "awq" / "README.md").read_text()


def _changed(model_dir: Path, out: Path, change: Callable[[nn.Module], None]) -> Path:
    """A copy of the model whose first block has been changed."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        change(model.model.layers[0])
    model.save_pretrained(out)
    return out


def _scale(block: Any) -> None:
    """What AWQ does: the norm over s, columns behind it times s; the function stays."""
    s = torch.rand(64).to(torch.bfloat16) * 3 + 0.5
    block.input_layernorm.weight.div_(s)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(block.self_attn, name).weight.mul_(s)


def _scale_linear(block: Any) -> None:
    """The same between two linear layers, which no norm gives away."""
    s = torch.rand(96).to(torch.bfloat16) * 3 + 0.5
    block.mlp.up_proj.weight.div_(s.unsqueeze(1))
    block.mlp.down_proj.weight.mul_(s)


def _disturb(block: Any) -> None:
    weight = block.mlp.down_proj.weight
    weight.add_(torch.randn(weight.shape).to(weight.dtype) * weight.std())


@pytest.mark.parametrize(
    ("change", "word"),
    [(_scale, "input_layernorm"), (_scale_linear, "rounding explains"), (_disturb, "rounding explains")],
)
def test_refuses_an_original_that_the_file_was_not_made_from(
    run_dir: Path, model_dir: Path, tmp_path: Path, change: Callable[[nn.Module], None], word: str
) -> None:
    export(run_dir, ["awq", "gptq"], tmp_path)
    other = _changed(model_dir, tmp_path / "other", change)
    for name in ("awq", "gptq"):
        with pytest.raises(CheckpointError, match=word):
            export(tmp_path / name, ["mlx"], tmp_path, original=str(other))
    assert not (tmp_path / "mlx").exists()


def test_a_bias_of_zeros_does_not_matter(run_dir: Path, model_dir: Path, tmp_path: Path) -> None:
    """Old GPTQ files have one per layer; the original has none."""
    export(run_dir, ["gptq"], tmp_path)
    file = tmp_path / "gptq" / "model.safetensors"
    tensors, name = load_file(file), "model.layers.0.mlp.up_proj.bias"
    save_file({**tensors, name: torch.zeros(96)}, file, {"format": "pt"})
    export(tmp_path / "gptq", ["mlx"], tmp_path, original=str(model_dir))
    save_file({**tensors, name: torch.ones(96)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="that the original lacks"):
        export(tmp_path / "gptq", ["awq"], tmp_path, original=str(model_dir))


def test_refuses(run_dir: Path, model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no format 'gtpq'"):
        parse_names("awq,gtpq")
    with pytest.raises(ConfigError, match="name at least one"):
        parse_names(" , ")
    with pytest.raises(MissingModelError):
        export(tmp_path / "nowhere", ["gptq"])
    changed = tmp_path / "changed"
    shutil.copytree(model_dir, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "rope_theta": 3.0}))
    with pytest.raises(CheckpointError, match="is not the one that the run"):
        export(run_dir, ["gptq"], tmp_path / "out", original=str(changed))
    with pytest.raises(CheckpointError, match="is an ordinary model in full precision, not a quantized one"):
        inspect(model_dir)
    with pytest.raises(CheckpointError, match="is an ordinary model"):
        export(model_dir, ["gptq"])
    assert not (tmp_path / "out").exists()


def test_preflight_refuses_all_for_one(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    """3 bits fit GPTQ but not AWQ: neither is written."""
    config = QuantizeConfig(
        grid=GridConfig(3, 32, True),
        method="rtn",
        data=DataConfig(dataset, 16, 32),
        format="none",
        baselines=(),
    )
    Pipeline(model_dir, tmp_path / "run", config).execute()
    with pytest.raises(UnrepresentableError, match="awq holds integers of 4 bits"):
        export(tmp_path / "run", ["gptq", "awq"])
    assert not (tmp_path / "run" / "gptq").exists()


def test_command_line(run_dir: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["export", str(run_dir), "--format", "gptq, awq", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["awq", "gptq"]
    shown = runner.invoke(app, ["inspect", str(tmp_path / "gptq"), "--json"])
    facts = json.loads(shown.output)
    assert facts["schemes"] == ["int4 group 32 symmetric"]
    table = runner.invoke(app, ["inspect", str(tmp_path / "gptq")])
    assert table.exit_code == 0
    assert "int4 group 32 symmetric" in table.output
    run = runner.invoke(app, ["inspect", str(run_dir), "--json"])
    assert json.loads(run.output)["format"] == "run"
