# SPDX-License-Identifier: Apache-2.0
"""auto-round quantizes a model folder and saves it in its own format."""

from __future__ import annotations

from pathlib import Path

import torch
from auto_round import AutoRound
from exchange import serve, versions
from transformers import AutoModelForCausalLM, AutoTokenizer


def produce(request, tokens):
    """Signed gradient descent on rounding and clipping, calibrated on the given windows."""
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    rounder = AutoRound(
        model,
        tokenizer,
        bits=request["bits"],
        group_size=request["group_size"],
        sym=request.get("sym", True),
        dataset=list(torch.from_numpy(tokens).split(1)),
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        batch_size=request.get("batch_size", 4),
        iters=request.get("iters", 40),
        device_map="cpu",
        amp=False,
    )
    out = Path(request["out"])
    rounder.quantize_and_save(str(out), format=request.get("format", "auto_round"))
    if not (out / "config.json").exists():  # from 0.16 on it saves to a folder of the model's name below
        (below,) = (path.parent for path in out.glob("*/config.json"))
        for file in list(below.iterdir()):
            file.rename(out / file.name)
        below.rmdir()
    return {}, {"versions": versions("auto-round", "transformers", "torch")}


if __name__ == "__main__":
    serve(produce)
