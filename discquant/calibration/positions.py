# SPDX-License-Identifier: Apache-2.0
"""How many positions a model has, and whether windows of `seqlen` tokens fit them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from discquant.errors import ConfigError


@dataclass(frozen=True)
class Positions:
    """What a model's configuration says of its length.

    Attributes:
        count: max_position_embeddings.
        reach: What a scaling of its rotary positions stretches them to; `count` where there is none.
    """

    count: int
    reach: int

    def check(self, seqlen: int, argument: str = "calibration: seqlen") -> str | None:
        """See that windows fit; `argument` is what the message calls their length.

        Returns:
            A note where only the scaling reaches so far.

        Raises:
            ConfigError: They are longer than that.
        """
        if seqlen <= self.count:
            return None
        if seqlen > self.reach:
            stretched = (
                f", {self.reach} with its scaling of rotary positions" if self.reach > self.count else ""
            )
            raise ConfigError(
                f"{argument} must be at most the model's {self.count} positions{stretched}, got {seqlen}"
            )
        return (
            f"windows of {seqlen} tokens are longer than the model's {self.count} positions; its scaling of rotary "
            f"positions reaches {self.reach}"
        )


def positions_of(config: Any) -> Positions | None:
    """Read a `transformers` configuration; None where it names no length (recurrent models, say)."""
    config = getattr(config, "get_text_config", lambda: config)()
    count = getattr(config, "max_position_embeddings", None)
    if type(count) is not int or count < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return Positions(count, max([count, *(int(reach) for reach in _stretched(rope, count))]))


def positions_of_config(config: Mapping[str, Any]) -> Positions | None:
    """Read a config.json, for what can be said before a model is opened; None where it names no length itself."""
    inner = config.get("text_config")
    stated = inner if isinstance(inner, Mapping) else config
    return positions_of(SimpleNamespace(**stated))


def _stretched(rope: Any, count: int) -> Iterator[float]:
    """What each scaling reaches: its factor times the length that it stretches. Some models have one per layer kind."""
    if not isinstance(rope, Mapping):
        return
    factor = rope.get("factor")
    if isinstance(factor, (int, float)) and 1 < factor < 1e6:
        base = rope.get("original_max_position_embeddings")
        yield factor * (base if isinstance(base, int) else count)
    for inner in rope.values():
        yield from _stretched(inner, count)
