# SPDX-License-Identifier: Apache-2.0
"""Share of arithmetic problems answered exactly under greedy decoding.

An own loop, not `generate`: a checkpoint's generation settings (sampling, penalties) must not enter the measurement,
and rows that have ended leave the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from discquant.calibration.arithmetic import Problem, extract_answer, prompt
from discquant.evaluation.divergence import device_of


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    ends: set[int] = set()
    for owner in (tokenizer, getattr(model, "config", None), getattr(model, "generation_config", None)):
        value = getattr(owner, "eos_token_id", None)
        ends.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return ends


@torch.no_grad()
def greedy(
    model: Any, tokenizer: Any, texts: Sequence[str], *, max_new_tokens: int = 256, batch_size: int = 64
) -> list[str]:
    """Continue texts with the most probable token each time, until an end token or `max_new_tokens`.

    Args:
        model: `transformers` causal language model with a KV cache; it is left in the mode it was in.
        tokenizer: Its tokenizer; the begin token is put first where it has one.
        texts: Prompts, none of them empty.
        max_new_tokens: Tokens written at most.
        batch_size: Prompts decoded at once, padded on the left and masked.

    Returns:
        The continuation of each text, in the order given, without special tokens.

    Raises:
        ValueError: An empty prompt, or a size below 1.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            f"greedy: max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}"
        )
    bos = tokenizer.bos_token_id
    prompts = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"greedy: texts must not be empty, got {text!r}")
        prompts.append([bos, *ids] if bos is not None and ids[0] != bos else ids)
    ends = torch.tensor(sorted(_end_ids(model, tokenizer)), dtype=torch.int64)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    written: list[list[int]] = [[] for _ in prompts]
    # Prompts of like length together: next to no padding.
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            rows = _decode(model, [prompts[p] for p in places], ends, max_new_tokens, takes_positions)
            for place, row in zip(places, rows, strict=True):
                written[place] = row
    finally:
        model.train(training)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in written]


def _decode(
    model: Any, prompts: list[list[int]], ends: torch.Tensor, max_new_tokens: int, takes_positions: bool
) -> list[list[int]]:
    device = device_of(model)
    width = max(len(row) for row in prompts)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)
    alive = torch.arange(len(prompts))
    written: list[list[int]] = [[] for _ in prompts]
    ends, cache = ends.to(device), None
    going = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        arguments = {"position_ids": position} if takes_positions else {}
        output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **arguments)
        cache = output.past_key_values
        token = output.logits[:, -1].float().argmax(dim=-1)
        # A cache that drops no rows keeps those that have ended: what the model says after an end is no text.
        going = going & ~torch.isin(token, ends)
        for row, value, goes in zip(alive.tolist(), token.tolist(), going.tolist(), strict=True):
            if goes:
                written[row].append(value)
        if step + 1 == max_new_tokens or not bool(going.any()):
            break
        position = position[:, -1:] + 1
        if int(going.sum()) < len(going) and hasattr(cache, "batch_select_indices"):
            kept = going.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            token, mask, position, alive = token[kept], mask[kept], position[kept], alive[kept.cpu()]
            going = going[kept]
        ids = token.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return written


def exact_match(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    max_new_tokens: int = 256,
    batch_size: int = 64,
) -> float:
    """Share of problems whose final answer is right under greedy decoding.

    Args:
        model: `transformers` causal language model.
        tokenizer: Its tokenizer.
        problems: At least one.
        max_new_tokens: Tokens per solution at most.
        batch_size: Problems decoded at once.

    Returns:
        The share, 0 to 1.

    Raises:
        ValueError: No problem is given.
    """
    if not problems:
        raise ValueError("exact_match: problems must hold at least one, got none")
    answers = greedy(
        model,
        tokenizer,
        [prompt(problem) for problem in problems],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    right = sum(
        extract_answer(text) == problem.answer for text, problem in zip(answers, problems, strict=True)
    )
    return right / len(problems)
