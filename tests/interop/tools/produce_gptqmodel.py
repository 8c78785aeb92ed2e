# SPDX-License-Identifier: Apache-2.0
"""gptqmodel quantizes a model folder with GPTQ and saves it."""

from __future__ import annotations

from exchange import serve, versions
from gptqmodel import GPTQModel, QuantizeConfig


def produce(request, tokens):
    """GPTQ, symmetric unless asked otherwise, calibrated on the given windows."""
    config = QuantizeConfig(
        bits=request["bits"],
        group_size=request["group_size"],
        sym=request.get("sym", True),
        desc_act=request.get("desc_act", False),
        device="cpu",
        offload_to_disk=False,
    )
    model = GPTQModel.load(request["model"], config)
    windows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    model.quantize(windows, batch_size=4)
    model.save(request["out"])
    return {}, {"versions": versions("gptqmodel", "transformers", "torch")}


if __name__ == "__main__":
    serve(produce)
