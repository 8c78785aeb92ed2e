# SPDX-License-Identifier: Apache-2.0
"""lm-eval with a local task (YAML and jsonl) on a quantized folder and on the same rounded weights as plain floats."""

from __future__ import annotations

import lm_eval
from exchange import serve, versions
from lm_eval.tasks import TaskManager


def _evaluate(path, request):
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": path, "dtype": request["dtype"], "device": "cpu", "max_length": 256},
        tasks=[request["task"]],
        task_manager=TaskManager(include_path=request["tasks"], include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {
        key.partition(",")[0]: value
        for key, value in found["results"][request["task"]].items()
        if isinstance(value, float)
    }


def consume(request, tokens):
    """Metrics of both."""
    facts = {"versions": versions("lm-eval", "transformers", "compressed-tensors")}
    facts["quantized"] = _evaluate(request["model"], request)
    facts["rounded"] = _evaluate(request["rounded"], request)
    return {}, facts


serve(consume)
