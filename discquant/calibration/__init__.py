# SPDX-License-Identifier: Apache-2.0
"""Calibration windows: token ids cut from text, token files or the model's own samples, with a loss mask."""

from discquant.calibration.load import given_windows, load_windows
from discquant.calibration.windows import Windows

__all__ = ["Windows", "given_windows", "load_windows"]
