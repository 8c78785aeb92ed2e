# SPDX-License-Identifier: Apache-2.0
"""Checkpoint formats: reading models safely, writing codes as engines want them, proving what was written."""

from __future__ import annotations

from discquant.formats.checkpoint import Checkpoint, check_finite
from discquant.formats.coded import CodedLayer
from discquant.formats.codes import QuantizedLinear
from discquant.formats.export import export_compressed_tensors, plan_export, read_manifest
from discquant.formats.load import load_quantized, read_layers
from discquant.formats.proof import prove
from discquant.formats.scheme import Scheme
from discquant.formats.write import ExportPlan, write_model

__all__ = [
    "Checkpoint",
    "CodedLayer",
    "ExportPlan",
    "QuantizedLinear",
    "Scheme",
    "check_finite",
    "export_compressed_tensors",
    "load_quantized",
    "plan_export",
    "prove",
    "read_layers",
    "read_manifest",
    "write_model",
]
