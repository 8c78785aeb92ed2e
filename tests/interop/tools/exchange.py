# SPDX-License-Identifier: Apache-2.0
"""Between the driver and one tool in its own virtual environment: a JSON request in, facts and arrays out.

Imports numpy and safetensors alone at the top, because not every tool's environment has torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

REQUEST, FACTS, ARRAYS = "request.json", "facts.json", "arrays.safetensors"
LOGITS = "logits"
WEIGHT = (
    "weight/"  # prefix of a layer's weight as the tool computes with it, float32, [out_features, in_features]
)


def versions(*names: str) -> dict[str, str]:
    """Installed versions of the named distributions."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def serve(
    tool: Callable[[dict[str, Any], np.ndarray | None], tuple[Mapping[str, np.ndarray], dict[str, Any]]],
) -> None:
    """Answer the request in the folder named by the first argument.

    Args:
        tool: Takes the request and the token ids, int64, [windows, tokens], or None; gives arrays and facts.
    """
    folder = Path(sys.argv[1])
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    tokens = load_file(request["tokens"])["input_ids"].astype(np.int64) if request.get("tokens") else None
    arrays, facts = tool(request, tokens)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / ARRAYS)
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
