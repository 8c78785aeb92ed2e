# SPDX-License-Identifier: Apache-2.0
"""`discquant generate`: one text, whatever the model's own settings say, and what a reader sees of it."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import discquant
from discquant import generation
from discquant.cli.generate import generate
from discquant.errors import CheckpointError, ConfigError
from discquant.generation import stream
from discquant.modules import PackedReport

PROMPT = "Ada has 3 apples."
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0, "device": "cpu"}


@pytest.fixture
def model(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    """The bundled model, to be changed."""
    return shutil.copytree(tiny_llama_dir, tmp_path / "model")


def settle(model: Path, **settings: Any) -> Path:
    path = model / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, **settings}))
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
    ],
)
def test_a_models_own_settings_give_one_text_all_the_same(model: Path, settings: dict[str, Any]) -> None:
    expected = stream(settle(model), PROMPT, **OPTIONS)["text"]
    assert stream(settle(model, **settings), PROMPT, **OPTIONS)["text"] == expected


def test_a_models_own_stop_strings_end_the_text(model: Path) -> None:
    whole = stream(settle(model), PROMPT, **OPTIONS)["text"]
    letter = whole.strip()[1]
    short = stream(settle(model, stop_strings=[letter]), PROMPT, **OPTIONS)
    assert letter in short["text"] and len(short["text"]) < len(whole)


def test_special_tokens_are_counted_but_not_shown(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = stream(settle(model, forced_eos_token_id=2), PROMPT, **OPTIONS)
    assert shown["tokens"] == 6 and "</s>" not in shown["text"]
    assert "</s>" not in capsys.readouterr().out


def test_a_prompt_goes_through_the_chat_template(model: Path) -> None:
    """With one begin token: the template writes it."""
    settle(model)
    template = "{{ bos_token }}Q: {{ messages[0]['content'] }}{% if add_generation_prompt %} A:{% endif %}"
    with pytest.raises(ConfigError, match="--chat-template: the model's tokenizer has none"):
        stream(model, PROMPT, chat_template=True, **OPTIONS)
    expected = stream(model, f"Q: {PROMPT} A:", **OPTIONS)["text"]
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    assert stream(model, PROMPT, chat_template=True, **OPTIONS)["text"] == expected
    config["chat_template"] = "{{ raise_exception('only tools') }}"
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="does not fit the chat template: only tools"):
        stream(model, PROMPT, chat_template=True, **OPTIONS)


@pytest.mark.parametrize("mode", ["exact", "plain"])
@pytest.mark.parametrize("text", ["{", "[]", '{"num_return_sequences": 3}'])
def test_damaged_settings_are_the_checkpoints_fault(
    model: Path, tmp_path: Path, text: str, mode: Any
) -> None:
    from discquant.config import GridConfig, QuantizeConfig
    from discquant.formats import export_compressed_tensors

    rounded = discquant.quantize(
        discquant.load(model),
        None,
        QuantizeConfig(grid=GridConfig(4, 64), method="rtn"),
        calibration=torch.randint(3, 1000, (2, 16)),
    )
    export_compressed_tensors(model, tmp_path / "out", rounded.layers())
    (tmp_path / "out" / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        discquant.load(tmp_path / "out", mode=mode)


def test_a_letter_that_the_terminal_has_not_does_not_end_the_text(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    monkeypatch.setattr(generation, "stream", lambda *args, **options: print("日 and on"))
    generate(model, PROMPT)
    assert written.getvalue() == b"? and on\n"


def test_layers_that_no_kernel_covers_are_counted(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settle(model)
    opened = generation.load

    def load(*args: Any, **options: Any) -> Any:
        loaded: Any = opened(*args, **options)
        loaded.packed_report = PackedReport(20, 0, 10**6, 4 * 10**6, plain=8)
        return loaded

    monkeypatch.setattr(generation, "load", load)
    stream(model, PROMPT, **OPTIONS)
    assert "(20 packed layers of 1.0 MB, 8 plain ones, cpu)" in capsys.readouterr().err
