# SPDX-License-Identifier: Apache-2.0
"""Text sampled from the model itself: ancestral sampling at temperature 1 from the begin token, with a KV cache.

The random numbers are drawn on the CPU before sampling begins, one per token of each row: they depend
on the seed alone, not on the device or on how many rows are sampled at once.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from discquant.errors import CalibrationError
from discquant.solver.memory import return_freed

logger = logging.getLogger(__name__)
CACHE_BYTES = 1 << 31  # keys and values of the rows sampled at once
# The cache's tensors grow by a token a step, so that what the C library frees of them fits no later one: without giving
# it back the process holds up to 2.7 times the cache (bundled model, 256 rows of 512 tokens; 1.05 times with it).
RETURN_STEPS = 16


def special_id(name: str, tokenizer: Any, model: Any) -> int | None:
    """Id of a special token (`bos`, `eos` or `pad`): the tokenizer's, else the model configuration's, else None."""
    for owner in (tokenizer, getattr(model, "config", None)):
        value = getattr(owner, f"{name}_token_id", None)
        if isinstance(value, (list, tuple)):
            value = value[0] if value else None
        if value is not None and int(value) >= 0:
            return int(value)
    return None


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the distribution function: the first token whose cumulative probability exceeds `uniform`.

    Args:
        logits: float32, [rows, vocab_size].
        uniform: float64 in [0, 1), [rows].

    Returns:
        Token ids, int64, [rows].
    """
    cumulative = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1]
    # The product may round up to the total, behind which no token stands.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1)


def cache_elements(config: Any) -> int:
    """Keys and values that one token leaves in all layers, from a model's configuration."""
    config = getattr(config, "get_text_config", lambda: config)()
    layers, hidden = getattr(config, "num_hidden_layers", 1), getattr(config, "hidden_size", 1)
    heads = getattr(config, "num_attention_heads", 1)
    width = (getattr(config, "num_key_value_heads", None) or heads) * (
        getattr(config, "head_dim", None) or hidden // heads
    )
    return int(2 * layers * width)


def rows_at_once(elements: int, seqlen: int, size: int) -> int:
    """Rows whose keys and values fit CACHE_BYTES, 1 to 256: decided by the model, not by the machine.

    Args:
        elements: See `cache_elements`.
        seqlen: Tokens per row.
        size: Bytes per element.
    """
    return min(256, max(1, CACHE_BYTES // (elements * seqlen * size)))


@torch.no_grad()
def sample(model: Any, tokenizer: Any, *, nsamples: int, seqlen: int, seed: int = 0) -> Tensor:
    """Sample windows of text from a causal language model.

    Args:
        model: A `transformers` causal language model, on any device; it is left in the mode it was in.
        tokenizer: For its begin and end tokens; None takes those of the model's configuration.
        nsamples: Rows.
        seqlen: Tokens per row, the begin token included.
        seed: Of the random numbers.

    Returns:
        Token ids, int64 on the CPU, [nsamples, seqlen]. A row does not stop at the end token: the begin
        token follows it and a new text starts, so that every position is used.

    Raises:
        CalibrationError: The model is not given, names no begin or end token, or its logits are not finite.
    """
    if model is None:
        raise CalibrationError("calibration: dataset self samples from the model, and no model was given")
    bos, eos = special_id("bos", tokenizer, model), special_id("eos", tokenizer, model)
    start = bos if bos is not None else eos
    if start is None:
        raise CalibrationError(
            "calibration: dataset self starts at the model's begin or end token, and the model names neither; "
            "give a text file instead"
        )
    device = model.get_input_embeddings().weight.device
    uniform = torch.rand(
        (nsamples, seqlen), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    training = model.training
    model.eval()
    batches = []
    try:
        size = model.get_input_embeddings().weight.element_size()
        rows = rows_at_once(cache_elements(model.config), seqlen, size)
        for first in range(0, nsamples, rows):
            numbers = uniform[first : first + rows].to(device)
            token = torch.full((numbers.shape[0],), start, dtype=torch.int64, device=device)
            columns, cache = [token], None
            for place in range(1, seqlen):
                output = model(input_ids=token.unsqueeze(1), past_key_values=cache, use_cache=True)
                cache, logits = output.past_key_values, output.logits[:, -1].float()
                # A logit of -inf (a masked vocabulary entry) is in order. With NaN, +inf, or nothing but -inf there is
                # no distribution, and then the largest logit of the row is not finite.
                if not bool(logits.amax(dim=-1).isfinite().all()):
                    raise CalibrationError(
                        f"calibration: the model's own logits are not finite at position {place}"
                    )
                drawn = _draw(logits, numbers[:, place])
                if bos is not None and eos is not None and bos != eos:
                    drawn = torch.where(token == eos, bos, drawn)
                token = drawn
                columns.append(token)
                if place % RETURN_STEPS == 0:
                    return_freed()
            batches.append(torch.stack(columns, dim=1).cpu())
            logger.info("sampled %d of %d windows from the model", min(first + rows, nsamples), nsamples)
    finally:
        model.train(training)
    return torch.cat(batches)
