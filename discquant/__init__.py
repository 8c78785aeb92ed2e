# SPDX-License-Identifier: Apache-2.0
"""discquant: round a transformer's weights to a given grid with the least KL divergence.

`quantize`, `quantize_module`, `allocate`, `refine`, `rotate`, `load`: the Python API; `discquant.ops` and
`discquant.grids` stand alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from discquant.api import Quantized, allocate, load, quantize, quantize_module, refine
    from discquant.config import DataConfig, GridConfig, LayerGrid, QuantizeConfig, SolverConfig, preset
    from discquant.rotation import rotate

_HOMES = {
    "Quantized": "discquant.api",
    "allocate": "discquant.api",
    "load": "discquant.api",
    "quantize": "discquant.api",
    "quantize_module": "discquant.api",
    "refine": "discquant.api",
    "DataConfig": "discquant.config",
    "GridConfig": "discquant.config",
    "LayerGrid": "discquant.config",
    "QuantizeConfig": "discquant.config",
    "SolverConfig": "discquant.config",
    "preset": "discquant.config",
    "rotate": "discquant.rotation",
}

__all__ = [
    "DataConfig",
    "GridConfig",
    "LayerGrid",
    "QuantizeConfig",
    "Quantized",
    "SolverConfig",
    "allocate",
    "load",
    "preset",
    "quantize",
    "quantize_module",
    "refine",
    "rotate",
]


def __getattr__(name: str) -> Any:
    """Import the API on first use, so that `import discquant` costs nothing."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'discquant' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
