# SPDX-License-Identifier: Apache-2.0
"""Bits where they count: one of several grids for each layer, so that KL is least at a given size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from discquant.allocation.choose import Option, choose
from discquant.allocation.damage import projections
from discquant.allocation.units import units_of
from discquant.config import GridConfig, LayerGrid
from discquant.errors import ConfigError, NonFiniteError, either
from discquant.formats.bits import planned_bits
from discquant.grids import Grid
from discquant.rounding.gptq import Factor, gptq, gptq_factor
from discquant.solver.boundaries import Boundaries
from discquant.solver.chain import Chain, Prepared
from discquant.solver.layerwise import watch_inputs
from discquant.solver.rows import TokenRows
from discquant.solver.sampled import label_generator
from discquant.solver.solve import lay_grid
from discquant.solver.weight_ref import WeightRef

Codes = Literal["gptq", "rtn"]
Allowed = Callable[[str, tuple[int, int], GridConfig], bool]
Sized = Callable[[tuple[int, int], GridConfig], int]


class Measured(NamedTuple):
    """What was measured of one layer.

    Attributes:
        bits: Of the whole weight, scales included, by choice; none where the layer may not have it.
        products: <E, s> of every choice with every window (`damage.projections`), float64, [choices, windows].
    """

    bits: Mapping[str, int]
    products: Tensor


@dataclass(frozen=True)
class Unit:
    """Layers that share a grid, and what each choice would cost them.

    Attributes:
        name: Of the unit: a module's, or of what engines join.
        modules: Names of its layers.
        weights: Weights of all of them.
        bits: Per weight, scales included, by choice; choices that a format cannot hold are left out.
        damage: KL of rounding this unit alone, nats per token, by choice.
        chosen: The choice.
    """

    name: str
    modules: tuple[str, ...]
    weights: int
    bits: Mapping[str, float]
    damage: Mapping[str, float]
    chosen: str


@dataclass(frozen=True)
class Allocation:
    """A grid for each layer.

    Attributes:
        units: In order of the model.
        grids: Grid of each choice, by its words.
    """

    units: tuple[Unit, ...]
    grids: Mapping[str, GridConfig] = field(repr=False)

    @property
    def layers(self) -> tuple[LayerGrid, ...]:
        """The rules for `QuantizeConfig.layers`, one per layer."""
        return tuple(LayerGrid(name, self.grids[unit.chosen]) for unit in self.units for name in unit.modules)

    def bits(self, choice: str | None = None) -> float | None:
        """Bits per weight, scales included: as chosen, or of one choice everywhere; None where some unit has it not."""
        return self._mean("bits", choice, weighted=True)

    def damage(self, choice: str | None = None) -> float | None:
        """Sum of the units' damages, which is about the KL of rounding all: as chosen, or of one choice everywhere."""
        return self._mean("damage", choice, weighted=False)

    def _mean(self, figure: str, choice: str | None, *, weighted: bool) -> float | None:
        values = [getattr(unit, figure).get(choice or unit.chosen) for unit in self.units]
        if any(value is None for value in values):
            return None
        if not weighted:
            return float(sum(values))
        weights = [unit.weights for unit in self.units]
        return float(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "bits_per_weight": self.bits(),
            "predicted_kl": self.damage(),
            "choices": {
                choice: {
                    "grid": dataclasses.asdict(grid),
                    "bits_per_weight": self.bits(choice),
                    "predicted_kl": self.damage(choice),
                }
                for choice, grid in self.grids.items()
            },
            "units": [
                {
                    "name": unit.name,
                    "modules": list(unit.modules),
                    "weights": unit.weights,
                    "chosen": unit.chosen,
                    "bits_per_weight": dict(unit.bits),
                    "damage": dict(unit.damage),
                }
                for unit in self.units
            ],
        }

    @classmethod
    def of_dict(cls, found: Mapping[str, Any]) -> Allocation:
        """Undo `to_dict`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError, OverflowError: It is no such data.
        """
        grids = {choice: GridConfig(**row["grid"]) for choice, row in found["choices"].items()}
        units = tuple(
            Unit(
                row["name"], tuple(row["modules"]), row["weights"], row["bits_per_weight"], row["damage"],
                row["chosen"],
            )
            for row in found["units"]
        )  # fmt: skip
        if not units:
            raise ValueError("there are no units")
        for unit, row in zip(units, found["units"], strict=True):
            _check_figures(unit, row["modules"], grids)
        return cls(units, grids)

    def at(self, average_bits: float) -> Allocation:
        """Return the choice from the same figures at another size.

        Raises:
            ConfigError: Not even the narrowest choices fit it.
        """
        # Whole bits again, so that no rounding of a quotient decides what fits.
        costs = {
            unit.name: {
                c: Option(round(bits * unit.weights), unit.damage[c]) for c, bits in unit.bits.items()
            }
            for unit in self.units
        }
        chosen = _within(costs, average_bits, sum(unit.weights for unit in self.units))
        units = tuple(dataclasses.replace(unit, chosen=chosen[unit.name]) for unit in self.units)
        return Allocation(units, self.grids)


def _check_figures(unit: Unit, modules: Any, grids: Mapping[str, GridConfig]) -> None:
    """Refuse figures that nothing can be chosen from.

    Raises:
        TypeError, ValueError, OverflowError: So they are.
    """
    if not isinstance(unit.name, str) or not isinstance(modules, list) or not modules:
        raise TypeError(f"{unit.name!r} names no layers")
    if not all(isinstance(name, str) for name in modules):
        raise TypeError(f"the modules of {unit.name} must be names")
    if isinstance(unit.weights, bool) or not isinstance(unit.weights, int) or unit.weights < 1:
        raise ValueError(f"the weights of {unit.name} must be an integer above 0, got {unit.weights!r}")
    if not unit.bits:
        raise ValueError(f"{unit.name} has no choice")
    for choice, bits in unit.bits.items():
        if choice not in grids or choice not in unit.damage:
            raise ValueError(f"choice {choice!r} of {unit.name} has no grid or no damage")
        for figure in (bits, unit.damage[choice]):
            if isinstance(figure, bool) or not isinstance(figure, int | float) or not math.isfinite(figure):
                raise ValueError(f"{unit.name} has {figure!r} where a finite number must be")
        if bits <= 0 or unit.damage[choice] < 0:
            raise ValueError(f"{unit.name} has {bits!r} bits and a damage of {unit.damage[choice]!r}")


def allocate(
    chain: Chain,
    rows: TokenRows,
    choices: Mapping[str, GridConfig],
    average_bits: float,
    *,
    codes: Codes = "gptq",
    damp: float = 0.1,
    seed: int = 0,
    allowed: Allowed | None = None,
    sized: Sized = planned_bits,
    boundaries: Boundaries | None = None,
    known: Mapping[str, Measured] | None = None,
    done: Callable[[int, Mapping[str, Measured]], None] | None = None,
) -> Allocation:
    """Measure what every choice costs every layer, and choose within a size.

    A layer's damage is the KL that its rounded codes cause while all others are as they were, to second order
    (`damage.projections`); damages of layers are taken to add up. Layers that engines join share a grid.

    Args:
        chain: The model.
        rows: Calibration rows, all of which are used.
        choices: Grids by their words.
        average_bits: Bits per weight at most, scales and zero points included, on average over all weights.
        codes: Whose codes are damaged by: `gptq`, on the inputs that each layer gets in the original model, which is
            nearer to what a solve reaches; `rtn`, which takes a fraction of the time.
        damp: GPTQ's damping.
        seed: Of the sampled labels.
        allowed: Says whether a layer (name, shape) may have a grid; None allows all.
        sized: Bits of a layer of a shape on a grid, scales included.
        boundaries: Where activations between blocks are kept.
        known: What an earlier part of the same work has measured, by module name.
        done: Called after each block with what was measured of it, the last block first.

    Raises:
        ConfigError: Not even the narrowest choices fit the size, a unit has no allowed one, or nothing is to be
            allocated.
        NonFiniteError: A damage is no number.
    """
    check_request(choices, average_bits, codes)
    refs = {ref.name: ref for own in chain.weights for ref in own}
    units, bits = sizes_of(refs, choices, average_bits, allowed=allowed, sized=sized)
    options = {unit: list(bits[members[0]]) for unit, members in units.items()}
    of = {member: unit for unit, members in units.items() for member in members}
    names = list(choices)
    # One row each, whatever the micro-batches of `rows`: a window's gradient is needed by itself.
    windows = TokenRows(chain, rows.input_ids, rows.mask, 1).batches(range(len(rows)))
    measured = dict(known or {})

    def errors(index: int, inputs: list[Tensor]) -> list[Tensor]:
        hessians = _hessians(chain, index, inputs, windows) if codes == "gptq" else {}
        return [of_weight(ref, hessians.get(ref.name)) for ref in chain.weights[index]]

    def of_weight(ref: WeightRef, hessian: Tensor | None) -> Tensor:
        matrix = ref.matrix()
        # In bfloat16: an error's own rounding is nothing beside it, and all choices of a block are held at once.
        found = torch.zeros(len(names), *matrix.shape, dtype=torch.bfloat16, device=matrix.device)
        factor = None if hessian is None else gptq_factor(hessian, damp=damp)
        for place, choice in enumerate(names):
            if choice not in options[of[ref.name]]:
                continue
            grid = lay_grid(ref, choices[choice])
            found[place] = _error(matrix, grid.to(matrix.device), factor)
        return found

    def keep(index: int, products: Mapping[str, Tensor]) -> None:
        made = {name: Measured(bits[name], found) for name, found in products.items()}
        measured.update(made)
        if done is not None:
            done(index, made)

    generator = label_generator(chain.device, seed + 31)
    projections(chain, windows, errors, generator=generator, boundaries=boundaries, known=measured, done=keep)
    tokens = rows.tokens(range(len(rows)), "kl")
    found = []
    for unit, members in units.items():
        weights = sum(refs[name].matrix_size for name in members)
        together = torch.stack([measured[name].products for name in members]).sum(dim=0)
        damage = dict(zip(names, (0.5 / tokens * together.square().sum(dim=1)).tolist(), strict=True))
        per_weight = {c: sum(measured[name].bits[c] for name in members) / weights for c in options[unit]}
        own = {choice: damage[choice] for choice in options[unit]}
        if not all(map(math.isfinite, own.values())):
            raise NonFiniteError(
                f"allocate: the damage of {unit} is not finite: the model's weights or activations are not, or exceed "
                "the compute dtype"
            )
        found.append(Unit(unit, tuple(members), weights, per_weight, own, options[unit][0]))
    return Allocation(tuple(found), dict(choices)).at(average_bits)


def check_request(choices: Mapping[str, GridConfig], average_bits: float, codes: str) -> None:
    """Refuse what needs no model to be seen wrong.

    Raises:
        ConfigError: No choices, a size that is none, or codes that there are not.
    """
    if codes not in get_args(Codes):
        raise ConfigError(f"allocate: codes must be one of {either(get_args(Codes))}, got {codes!r}")
    if not choices:
        raise ConfigError("allocate: there must be at least one choice")
    if not 0 < average_bits < math.inf:
        raise ConfigError(f"allocate: average bits must be above 0 and finite, got {average_bits}")


def _allowed(
    unit: str, refs: Sequence[WeightRef], choices: Mapping[str, GridConfig], allowed: Allowed | None
) -> list[str]:
    """The choices that every layer of a unit may have.

    Raises:
        ConfigError: There are none.
    """
    found = [
        choice
        for choice, grid in choices.items()
        if allowed is None or all(allowed(ref.name, ref.shape, grid) for ref in refs)
    ]
    if not found:
        raise ConfigError(
            f"allocate: none of the choices {', '.join(choices)} can be held for {unit}; ignore it"
        )
    return found


def sizes_of(
    refs: Mapping[str, WeightRef],
    choices: Mapping[str, GridConfig],
    average_bits: float,
    *,
    allowed: Allowed | None = None,
    sized: Sized = planned_bits,
) -> tuple[dict[str, list[str]], dict[str, dict[str, int]]]:
    """Return the modules of each unit, and the bits of each module by the choices that it may have; nothing is read.

    Args:
        refs: Weights by module name.
        choices: See `allocate`, as the others.
        average_bits: See there.
        allowed: See there.
        sized: See there.

    Raises:
        ConfigError: Not even the narrowest choices fit the size, a unit has no allowed one, or there are no weights.
    """
    if not refs:
        raise ConfigError("allocate: there is no layer to choose for")
    units, bits = units_of(refs), dict[str, dict[str, int]]()
    costs = {}
    for unit, members in units.items():
        own = _allowed(unit, [refs[name] for name in members], choices, allowed)
        bits |= {
            name: {choice: sized(refs[name].shape, choices[choice]) for choice in own} for name in members
        }
        costs[unit] = {choice: Option(sum(bits[name][choice] for name in members), 0.0) for choice in own}
    _within(costs, average_bits, sum(ref.matrix_size for ref in refs.values()))
    return units, bits


def _within(costs: Mapping[str, Mapping[str, Option]], average_bits: float, total: int) -> dict[str, str]:
    """Choose for each unit.

    Raises:
        ConfigError: Not even the narrowest fit.
    """
    least = sum(min(option.cost for option in options.values()) for options in costs.values())
    # An average is a quotient: what was computed from these very costs must hold them.
    budget = average_bits * total * (1 + 1e-9)
    if least > budget:
        raise ConfigError(
            f"allocate: the narrowest choices take {least / total:.3f} bits per weight, scales included, and "
            f"{average_bits:g} were asked for"
        )
    # Finite, however much was asked for.
    budget = min(budget, sum(max(option.cost for option in options.values()) for options in costs.values()))
    numbers = choose([list(options.values()) for options in costs.values()], budget)
    return {unit: list(costs[unit])[number] for unit, number in zip(costs, numbers, strict=True)}


def _hessians(
    chain: Chain, index: int, inputs: Sequence[Tensor], windows: Sequence[Prepared]
) -> dict[str, Tensor | None]:
    """X^T X of the inputs of every layer of a block in the original model; None where no token came."""
    refs = chain.weights[index]
    hooks = watch_inputs(chain, refs, strict=False)
    try:
        with torch.no_grad():
            for hidden, window in zip(inputs, windows, strict=True):
                for hook in hooks.values():
                    hook.mask = window.mask
                chain.run_block(index, hidden, window.calls[index])
    finally:
        for hook in hooks.values():
            hook.remove()
    return {ref.name: hooks[ref.name].gathered(ref) for ref in refs}


def _error(matrix: Tensor, grid: Grid, factor: Factor | None) -> Tensor:
    """Rounded weight minus the original: GPTQ's where there is a Hessian, else to nearest."""
    q = grid.nearest(matrix) if factor is None else gptq(matrix, factor, grid)
    return grid.dequantize(q, torch.float32) - matrix.float()
