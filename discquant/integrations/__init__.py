# SPDX-License-Identifier: Apache-2.0
"""Our kernels inside other people's loaders: transformers, vLLM, lm-eval. No format of our own."""
