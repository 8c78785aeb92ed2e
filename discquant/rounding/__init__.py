# SPDX-License-Identifier: Apache-2.0
"""Rounding of one weight matrix to a given grid: to nearest, GPTQ, greedy coordinate descent."""

from discquant.rounding.gptq import gptq
from discquant.rounding.greedy import greedy

__all__ = ["gptq", "greedy"]
