# SPDX-License-Identifier: Apache-2.0
"""A tiny random Llama with a tokenizer of characters, in memory and as a folder."""

from __future__ import annotations

import copy
import string
from pathlib import Path
from typing import Any

import pytest
import torch


def make_tokenizer() -> Any:
    """One token per character; <pad> 0, <s> 1, </s> 2, <unk> 3."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = string.ascii_letters + string.digits + string.punctuation + " \n"
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model() -> Any:
    """Two blocks, grouped-query attention; attention matters to its outputs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=104, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return made.eval()


@pytest.fixture(scope="session")
def noisy(model: Any) -> Any:
    """The model with its matrices disturbed."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> Path:
    """The model in bfloat16 with its tokenizer."""
    path = tmp_path_factory.mktemp("original")
    copy.deepcopy(model).bfloat16().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
