# SPDX-License-Identifier: Apache-2.0
"""A run on disk: its directory, checkpoints, pipeline from model to proven file, and report."""
