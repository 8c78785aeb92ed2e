# SPDX-License-Identifier: Apache-2.0
"""Vocabularies of 128k to 256k and tied embeddings: memory is that of a chunk, never tokens x vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from discquant.api import quantize
from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.ops import linear_kl
from discquant.solver import losses
from discquant.solver.chain import DecoderChain
from discquant.solver.gradients import block_gradients
from discquant.solver.losses import LOGIT_BYTES, head_chunk
from discquant.solver.measure import mean_kl
from discquant.solver.rows import TokenRows

LLAMA3, QWEN3, GEMMA3 = 128256, 151936, 262144
CHUNK = 32  # tokens that the test of the head's memory takes at a time


def tiny(vocab: int, tied: bool) -> Any:
    """Return a random one-block Llama of hidden size 8."""
    import transformers

    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_memory_of_the_head_does_not_grow_with_tokens(live_bytes: Any) -> None:
    """Sixteen times the tokens take less than two chunks of logits more, of the fifteen that they have more."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(LLAMA3, 8, generator=generator)
    peaks = []
    for tokens in (CHUNK, 16 * CHUNK):
        student, teacher = torch.randn(2, tokens, 8, generator=generator)
        with live_bytes((weight, student)) as live:
            linear_kl(student, teacher, weight, chunk_size=CHUNK, impl="reference")
        peaks.append(live.peak)
    logits = 4 * CHUNK * LLAMA3
    assert peaks[0] >= logits, "the measurement must see the logits"
    assert peaks[1] - peaks[0] < 2 * logits


@pytest.mark.parametrize("vocab", [LLAMA3, QWEN3, GEMMA3])
def test_chunk_is_bounded(vocab: int) -> None:
    """No tensor over the vocabulary exceeds its bound; small vocabularies keep the whole chunk."""
    cpu = torch.device("cpu")
    assert 4 * head_chunk(vocab, cpu) * vocab <= LOGIT_BYTES < 4 * (head_chunk(vocab, cpu) + 1) * vocab
    assert head_chunk(1024, cpu) == 1024
    assert head_chunk(vocab, torch.device("cuda")) == 1024


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_steps_and_measures_keep_to_the_chunk(
    loss: Any, live_bytes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four chunks never more than one's logits: ten tensors and a part of those before, on a CPU."""
    vocab, tokens = 8192, 4 * CHUNK
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * vocab * CHUNK)
    model = tiny(vocab, tied=False)
    chain = DecoderChain(model)
    ids = torch.randint(0, vocab, (1, tokens), generator=torch.Generator().manual_seed(1))
    batches = TokenRows(chain, ids, None, 1).batches(range(1))

    def student(index: int) -> dict[str, torch.Tensor]:
        return {ref.param_name: ref.parameter.detach() for ref in chain.weights[index]}

    with live_bytes(model.state_dict().values()) as live:
        block_gradients(chain, student, batches, lambda index, grads: None, loss=loss)
        mean_kl(chain, student, batches)
    assert 4 * losses.LOGIT_BYTES < live.peak < 12 * losses.LOGIT_BYTES


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
