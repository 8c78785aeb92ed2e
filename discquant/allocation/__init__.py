# SPDX-License-Identifier: Apache-2.0
"""Which layer gets how many bits: what rounding each costs in KL, and the cheapest choice at a given size."""

from discquant.allocation.allocate import Allocation, Unit, allocate
from discquant.allocation.choose import Option, choose

__all__ = ["Allocation", "Option", "Unit", "allocate", "choose"]
