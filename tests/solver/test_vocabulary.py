# SPDX-License-Identifier: Apache-2.0
"""Vocabularies of 128k to 256k and tied embeddings: memory is that of a chunk, never tokens x vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from discquant.api import quantize
from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.ops import linear_kl
from discquant.run.phases import Phases
from discquant.solver.losses import LOGIT_BYTES, head_chunk

LLAMA3, QWEN3, GEMMA3 = 128256, 151936, 262144


def tiny(vocab: int, tied: bool) -> Any:
    """Return a random one-block Llama of hidden size 8."""
    import transformers

    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def peak_of_head(tokens: int, vocab: int, chunk: int) -> int:
    """Return by how much resident memory rises above what it was during one call, in bytes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, 8, generator=generator)
    student, teacher = torch.randn(2, tokens, 8, generator=generator)
    phases = Phases()
    with phases.phase("before"):
        pass
    with phases.phase("head"):
        linear_kl(student, teacher, weight, chunk_size=chunk, impl="reference")
    before, during = (record["peak_rss_bytes"] for record in phases.records)
    return int(during - before)


def test_memory_of_the_head_does_not_grow_with_tokens() -> None:
    """Sixteen times the tokens take at most twice the memory: what the allocator keeps between chunks, no more."""
    chunk, vocab = 32, LLAMA3
    few, many = peak_of_head(chunk, vocab, chunk), peak_of_head(16 * chunk, vocab, chunk)
    assert few >= 4 * chunk * vocab, "the measurement must see the logits"
    assert many <= 2 * few


@pytest.mark.parametrize("vocab", [LLAMA3, QWEN3, GEMMA3])
def test_chunk_is_bounded(vocab: int) -> None:
    """No tensor over the vocabulary exceeds its bound; small vocabularies keep the whole chunk."""
    cpu = torch.device("cpu")
    assert 4 * head_chunk(vocab, cpu) * vocab <= LOGIT_BYTES < 4 * (head_chunk(vocab, cpu) + 1) * vocab
    assert head_chunk(1024, cpu) == 1024
    assert head_chunk(vocab, torch.device("cuda")) == 1024


@pytest.mark.parametrize(("vocab", "tied"), [(LLAMA3, False), (QWEN3, True), (GEMMA3, True)])
def test_solve(vocab: int, tied: bool) -> None:
    """A solve with a real vocabulary; the embedding, tied or not, stays as it was."""
    model = tiny(vocab, tied)
    before = model.get_input_embeddings().weight.clone()
    ids = torch.randint(0, vocab, (2, 8), generator=torch.Generator().manual_seed(1))
    config = QuantizeConfig(
        grid=GridConfig(bits=4, group_size=8, grid="absmax"),
        solver=SolverConfig(
            iters=1, batch_size=2, micro_batch=2, warmup=0, start="ref", lr=0.01, lr_floor=0.1
        ),
    )
    done = quantize(model, config=config, calibration=ids)
    assert not any("embed" in name or "lm_head" in name for name in done.codes)
    done.apply()
    assert torch.equal(model.get_input_embeddings().weight, before)
    if tied:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
