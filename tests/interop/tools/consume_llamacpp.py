# SPDX-License-Identifier: Apache-2.0
"""llama.cpp (through llama-cpp-python) loads a GGUF file, runs the tokens and tokenizes the texts."""

from __future__ import annotations

import llama_cpp
import llama_cpp.llama_cpp as library
import numpy as np
from exchange import serve, versions

_defaults = library.llama_model_default_params


def _plain_buffers():
    """Weights stay as the file has them: repacked for AMX, the library dies on more than one token (ggml 0.25.3)."""
    parameters = _defaults()
    if hasattr(parameters, "use_extra_bufts"):
        parameters.use_extra_bufts = False
    return parameters


library.llama_model_default_params = _plain_buffers


def consume(request, tokens):
    """Logits of each window from an empty cache, kept in float32 so that only the kernels' int8 activations differ."""
    model = llama_cpp.Llama(
        request["model"],
        n_ctx=tokens.shape[1],
        n_batch=tokens.shape[1],
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
        verbose=False,
    )
    rows = []
    for window in tokens:
        model.reset()
        model.eval(window.tolist())
        rows.append(np.array(model.scores[: len(window)], dtype=np.float32))
    same = 0
    for text, ids in request.get("texts", []):
        same += model.tokenize(text.encode(), add_bos=False, special=True) == ids
    facts = {
        "versions": versions("llama-cpp-python"),
        "texts": len(request.get("texts", [])),
        "texts_same": same,
    }
    return {"logits": np.stack(rows)}, facts


serve(consume)
