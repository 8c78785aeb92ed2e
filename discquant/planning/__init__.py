# SPDX-License-Identifier: Apache-2.0
"""A run planned from config.json alone: memory, traffic, work and time per phase, by measured rates where known."""
