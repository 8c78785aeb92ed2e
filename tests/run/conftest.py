# SPDX-License-Identifier: Apache-2.0
"""A tiny random model on disk with calibration tokens, and how to run the command line on it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Llama of two blocks, without tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(4)
    model.to(torch.bfloat16).save_pretrained(path)
    ids = torch.randint(3, 97, (40, 32), generator=torch.Generator().manual_seed(0))
    save_file({"calibration": ids[:32].short(), "heldout": ids[32:].short()}, path / "tokens.safetensors")
    (path / "tokens.safetensors").rename(path.parent / f"{path.name}-tokens.safetensors")
    return path


@pytest.fixture(scope="session")
def dataset(model_dir: Path) -> str:
    """Calibration token ids of `model_dir`."""
    return f"{model_dir.parent / (model_dir.name + '-tokens.safetensors')}:calibration"


@pytest.fixture
def command(model_dir: Path, dataset: str) -> Callable[..., list[str]]:
    """Return the argument list of a small quantize run."""

    def build(out: Path, *extra: str, model: Path | None = None) -> list[str]:
        return [
            sys.executable, "-m", "discquant", "quantize", str(model or model_dir), str(out), "--bits", "3",
            "--group-size", "32", "--dataset", dataset, "--nsamples", "24", "--seqlen", "32", "--iters", "12",
            "--batch-size", "4", "--micro-batch", "2", "--checkpoint-every", "3", "--gptq-samples", "8",
            "--threads", "1", *extra,
        ]  # fmt: skip

    return build


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., Any]:
    """Run a command outside the checkout (whose triton_kernels/ folder must not be on the path)."""

    def run(arguments: list[str], timeout: float = 180) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            arguments, capture_output=True, text=True, cwd=tmp_path, timeout=timeout, check=False
        )

    return run
