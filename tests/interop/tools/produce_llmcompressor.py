# SPDX-License-Identifier: Apache-2.0
"""llm-compressor quantizes a model folder with GPTQ and saves it as compressed-tensors."""

from __future__ import annotations

from datasets import Dataset
from exchange import serve, versions
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def produce(request, tokens):
    """GPTQ in groups, calibrated on the given windows."""
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype="auto")
    weights = {
        "num_bits": request["bits"],
        "type": "int",
        "symmetric": request.get("sym", True),
        "strategy": "group",
        "group_size": request["group_size"],
    }
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    rows = {"input_ids": tokens.tolist(), "attention_mask": [[1] * tokens.shape[1]] * len(tokens)}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )
    model.save_pretrained(request["out"], save_compressed=True)
    AutoTokenizer.from_pretrained(request["model"]).save_pretrained(request["out"])
    return {}, {"versions": versions("llmcompressor", "compressed-tensors", "transformers", "torch")}


if __name__ == "__main__":
    serve(produce)
