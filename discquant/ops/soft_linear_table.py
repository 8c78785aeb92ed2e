# SPDX-License-Identifier: Apache-2.0
"""Which strategy and tile `soft_linear` takes, by compute capability, pass and number of tokens.

Regenerate on the GPU at hand with `python benchmarks/tune_soft_linear.py`. No rule here has been measured on a GPU:
they follow docs/kernels.md section 4 (materialise for many tokens, fused for few).
"""

from __future__ import annotations

# (tokens below, strategy, tile); the first rule whose bound is above the number of tokens holds.
Rule = tuple[float, str, str]
ALL = float("inf")

# capability -> device name, date and commit of the measurement.
MEASURED: dict[str, str] = {}

RULES: dict[str, dict[str, tuple[Rule, ...]]] = {
    "default": {
        "forward": ((1024, "fused", "compact"), (ALL, "materialise", "compact")),
        "dx": ((1024, "fused", "compact"), (ALL, "materialise", "compact")),
        "dfrac": ((ALL, "materialise", "compact"),),
        "step": ((ALL, "fused", "compact"),),
    },
    "sm_80": {
        "forward": ((1024, "fused", "square"), (ALL, "materialise", "square")),
        "dx": ((1024, "fused", "square"), (ALL, "materialise", "square")),
        "dfrac": ((ALL, "materialise", "square"),),
        "step": ((ALL, "fused", "square"),),
    },
    "sm_90": {
        "forward": ((1024, "fused", "deep"), (ALL, "materialise", "deep")),
        "dx": ((1024, "fused", "deep"), (ALL, "materialise", "deep")),
        "dfrac": ((ALL, "materialise", "deep"),),
        "step": ((ALL, "fused", "square"),),
    },
}
