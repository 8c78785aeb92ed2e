# SPDX-License-Identifier: Apache-2.0
"""Choices of `discquant allocate` that a run on the result would refuse; GGUF types that rows are too short for."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from discquant.config import GridConfig, QuantizeConfig
from discquant.errors import ConfigError, UnrepresentableError
from discquant.formats import registry
from discquant.formats.safetensors_format import SafetensorsFormat
from discquant.formats.scheme import Scheme
from discquant.grids.gguf import FALLBACK, SUPER
from discquant.run.checks import check_groups
from discquant.solver.chain import Chain

Allowed = Callable[[str, tuple[int, int], GridConfig], bool]


def check_choices(chain: Chain, choices: Mapping[str, GridConfig]) -> None:
    """Refuse groups that are wider than every weight, as a run does.

    Raises:
        ConfigError: So they are.
    """
    for word, grid in choices.items():
        try:
            check_groups(chain, QuantizeConfig(grid=grid, format="none"))
        except ConfigError as error:
            raise ConfigError(f"allocate: choice {word}: {error}") from error


def check_joined(
    model_config: Mapping[str, Any],
    chain: Chain,
    formats: Iterable[str],
    choices: Mapping[str, GridConfig],
    allowed: Allowed,
) -> None:
    """Refuse choices that a format holds one by one, but not beside each other in one file.

    Args:
        model_config: The original's config.json.
        chain: The model; its first block with weights is asked about.
        formats: Names of formats.
        choices: Grids by their words.
        allowed: Says whether a layer may have a grid.

    Raises:
        ConfigError: So they are; the message names two.
    """
    refs = next(own for own in chain.weights if own)
    for name in formats:
        chosen = registry.by_name(name)
        if not isinstance(chosen, SafetensorsFormat):
            continue
        for pair in itertools.combinations(choices, 2):
            schemes = {}
            for place, ref in enumerate(refs):
                own = [choices[word] for word in pair if allowed(ref.name, ref.shape, choices[word])]
                if own:
                    schemes[ref.name] = Scheme.planned(ref.shape, own[place % len(own)])
            try:
                if schemes:
                    chosen.configure(copy.deepcopy(dict(model_config)), schemes, ())
            except UnrepresentableError as error:
                raise ConfigError(
                    f"allocate: --format {name} cannot hold the choices {' and '.join(pair)} beside each other: {error}"
                ) from error


def fallback_notes(grids: Iterable[tuple[str, tuple[int, int], GridConfig]]) -> list[str]:
    """Say which layers get another GGUF type than asked for, because their rows do not fill its blocks.

    Args:
        grids: Layers with the shapes of their weights and a grid asked for; a layer may come with several.

    Returns:
        A note for all kinds that the same layers are too short for.
    """
    short: dict[str, dict[str, None]] = {}
    for layer, (_, columns), grid in grids:
        if grid.kind in FALLBACK and columns % SUPER:
            short.setdefault(grid.kind, {})[layer] = None
    kinds: dict[tuple[str, ...], list[str]] = {}
    for kind, layers in short.items():
        kinds.setdefault(tuple(layers), []).append(kind)
    notes = []
    for names, own in kinds.items():
        taken = ", ".join(f"{FALLBACK[kind].upper()} in place of {kind.upper()}" for kind in own)
        count = "a layer" if len(names) == 1 else f"{len(names)} layers"
        named = names[0] if len(names) == 1 else f"{names[0]}, ..."
        notes.append(f"rows of {count} are no multiple of {SUPER}: {taken} ({named})")
    return notes
