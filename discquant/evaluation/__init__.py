# SPDX-License-Identifier: Apache-2.0
"""How far a candidate is from the original: divergence, perplexity, exact answers; and the bundled generator."""

from discquant.evaluation.divergence import Divergence, compare_models
from discquant.evaluation.evaluate import evaluate
from discquant.evaluation.exact_match import exact_match

__all__ = ["Divergence", "compare_models", "evaluate", "exact_match"]
