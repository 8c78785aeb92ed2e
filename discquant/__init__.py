# SPDX-License-Identifier: Apache-2.0
"""discquant: round a transformer's weights to a given grid with the least KL divergence."""
