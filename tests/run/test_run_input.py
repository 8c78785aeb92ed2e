# SPDX-License-Identifier: Apache-2.0
"""What a run is given: refused before the text is read, told where it is little, and a model's own code."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from discquant.config import DataConfig, GridConfig, QuantizeConfig
from discquant.errors import (
    CalibrationError,
    ConfigError,
    UnrepresentableError,
)
from discquant.run import pipeline
from discquant.run.directory import RunDirectory
from discquant.run.events import Events
from discquant.run.pipeline import Pipeline
from discquant.solver.engine import Engine

OWN_CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "ownllama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.rates = [x.item() for x in torch.linspace(0, 0.1, 2)]
"""


def _config(dataset: str) -> QuantizeConfig:
    return QuantizeConfig(
        grid=GridConfig(3, 32), data=DataConfig(dataset, 8, 32), method="rtn", format="none", baselines=()
    )


def test_too_little_text_is_refused_before_grids_are_laid(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "lay_grids", lambda *given: pytest.fail("laid"))
    file = tmp_path / "few.safetensors"
    save_file({"ids": torch.zeros(32, dtype=torch.int32)}, file)
    config, out = _config(f"{file}:ids"), tmp_path / "out"
    with pytest.raises(CalibrationError, match="gives 1 window of 32 tokens; at least 2 are needed"):
        Pipeline(model_dir, out, config).execute()
    assert not out.exists()


def test_refused_before_the_text_is_read(
    model_dir: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grid that the format cannot hold, and groups wider than every row."""

    def read(*arguments: object, **options: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(pipeline, "run_windows", read)
    out = tmp_path / "out"
    asymmetric = dataclasses.replace(_config(dataset), grid=GridConfig(4, 32, False), format="mlx")
    with pytest.raises(UnrepresentableError, match="mlx"):
        Pipeline(model_dir, out, asymmetric).execute()
    wide = dataclasses.replace(_config(dataset), grid=GridConfig(4, 1024))
    with pytest.raises(ConfigError, match="--group-size must be at most the widest row = 96"):
        Pipeline(model_dir, out, wide).execute()
    assert not out.exists()


def test_little_text_is_said(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    config = dataclasses.replace(_config(dataset), data=DataConfig(dataset, 400, 16))
    said: list[str] = []
    Pipeline(model_dir, tmp_path / "out", config, events=Events(message=said.append)).execute()
    assert any("fitted to little text" in line for line in said)


def test_chat_template_and_key_reach_the_text(tmp_path: Path) -> None:
    """`DataConfig` decides them, and they are part of what a run is."""
    from transformers import AutoTokenizer

    from discquant.formats.source import open_source
    from discquant.run.windows import run_windows

    examples = Path(__file__).resolve().parents[2] / "examples" / "tiny_llama"
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"body": f"one and two are three {n}"}) + "\n" for n in range(60)))
    source = open_source(examples)
    source.tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    config = dataclasses.replace(
        _config("unused"), data=DataConfig(str(text), 4, 16, chat_template=True, text_key="body")
    )
    windows = run_windows(RunDirectory(tmp_path / "none"), config, source)
    shown = AutoTokenizer.from_pretrained(examples).decode(windows.input_ids.flatten())
    assert "[one and two" in shown
    assert config.to_dict()["data"]["text_key"] == "body"


def test_code_of_a_model_s_own_looks_at_values(
    model_dir: Path, tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is built: without memory for the weights that works where the library's own loading does it, too."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "ownllama", "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(OWN_CODE)
    engine = Engine("auto")
    run = Pipeline(model, tmp_path / "out", _config(dataset), trust_remote_code=True, engine=engine)
    run.execute()
    assert run._shape is not None
    assert run.engine.where == "resident"
    assert RunDirectory(tmp_path / "out").complete
