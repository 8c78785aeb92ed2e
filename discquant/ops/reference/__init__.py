# SPDX-License-Identifier: Apache-2.0
"""Reference implementations: eager PyTorch that reads like the paper, one file per op."""
