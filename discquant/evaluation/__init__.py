# SPDX-License-Identifier: Apache-2.0
"""How much of a model survives: KL divergence, perplexity, exact answers to arithmetic problems."""
