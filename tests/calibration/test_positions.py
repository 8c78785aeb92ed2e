# SPDX-License-Identifier: Apache-2.0
"""Windows fit the model's positions, or what a scaling of them reaches."""

from __future__ import annotations

from typing import Any

import pytest

from discquant.calibration.positions import Positions, positions_of
from discquant.errors import ConfigError


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(max_position_embeddings=2048, **options)


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **options}


@pytest.mark.parametrize(
    ("options", "reach"),
    [
        ({}, 2048),
        ({"rope_scaling": rope("linear", factor=4.0)}, 8192),
        ({"rope_scaling": rope("dynamic", factor=2.0)}, 4096),
        ({"rope_scaling": rope("yarn", factor=4.0, original_max_position_embeddings=1024)}, 4096),
        # The length in the configuration is the stretched one already.
        (
            {
                "rope_scaling": rope(
                    "llama3",
                    factor=2.0,
                    original_max_position_embeddings=512,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                )
            },
            2048,
        ),
    ],
    ids=["none", "linear", "dynamic", "yarn", "llama3"],
)
def test_reach(options: dict[str, Any], reach: int) -> None:
    assert positions_of(llama(**options)) == Positions(2048, reach)


def test_other_configurations() -> None:
    from transformers import Gemma3TextConfig, GPT2Config, MambaConfig

    assert positions_of(GPT2Config(n_positions=512)) == Positions(512, 512)
    assert positions_of(MambaConfig()) is None
    assert positions_of(None) is None
    text = Gemma3TextConfig(max_position_embeddings=1024)
    text.rope_parameters["full_attention"] = rope("linear", factor=8.0)
    assert positions_of(text) == Positions(1024, 8192)


def test_check() -> None:
    stretched = Positions(2048, 8192)
    assert stretched.check(2048) is None
    assert "longer than the model's 2048 positions" in (stretched.check(2049) or "")
    with pytest.raises(ConfigError, match="at most the model's 2048 positions, 8192 with its scaling"):
        stretched.check(8193)
    with pytest.raises(ConfigError, match="at most the model's 64 positions, got 65"):
        Positions(64, 64).check(65)
