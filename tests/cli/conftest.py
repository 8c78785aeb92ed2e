# SPDX-License-Identifier: Apache-2.0
"""The command line called in this process, a model for it and calibration tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from discquant.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Call the command line in this process; return exit status, standard output and standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["discquant", *arguments])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny bfloat16 Llama on disk, without tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path / "model"
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    """Calibration token ids."""
    save_file({"ids": torch.randint(3, 97, (12, 32)).int()}, tmp_path / "tokens.safetensors")
    return f"{tmp_path / 'tokens.safetensors'}:ids"
