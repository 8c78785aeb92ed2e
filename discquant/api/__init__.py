# SPDX-License-Identifier: Apache-2.0
"""The Python API: quantize a model in memory, a plain module, or load what was written."""

from discquant.api.loading import load, original_of, served_directory
from discquant.api.quantizing import Quantized, allocate, quantize, quantize_module, refine

__all__ = [
    "Quantized", "allocate", "load", "original_of", "quantize", "quantize_module", "refine", "served_directory",
]  # fmt: skip
