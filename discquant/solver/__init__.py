# SPDX-License-Identifier: Apache-2.0
"""The solver: a model as a chain of blocks, exact block-sequential gradients, projected steps on `frac`."""
