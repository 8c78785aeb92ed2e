# SPDX-License-Identifier: Apache-2.0
"""Triton kernels and their launchers; installed as discquant.triton_kernels, imports nothing of discquant."""
