# SPDX-License-Identifier: Apache-2.0
"""What changes over a run: learning rate, linear term, vertex hardening, and the gain on the KL gradient."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from discquant.config import SolverConfig


@dataclass(frozen=True)
class StepSettings:
    """Scalars of one step."""

    lr: float
    linear_weight: float
    hardening: float
    snap: float
    curvature: float


LR_PER_ROOT_KL = 0.18
LR_HIGHEST = 0.1
TRAVEL = 2.0
CURVATURE = 16.0
CURVATURE_DAMAGE = (0.25, 0.5)  # its full weight up to the first, none from the second on
LINEAR_UNTIL = {True: 0.05, False: 0.15}  # with the curvature term, and without it


def resolve(config: SolverConfig, start_kl: float) -> SolverConfig:
    """Set `lr`, `lr_floor`, `curvature` and `linear_until` where they are None.

    lr = 0.18 sqrt(KL of the starting vertex), within [2 / iters, 0.1]: coordinates that are still undecided jitter by
    about lr per step, which costs KL in proportion to lr^2, and that must stay below the damage to be removed.
    The floor is a tenth of the peak, or what lets a coordinate travel twice the unit interval in the run.
    curvature = 16 where that KL is at most 0.25, linear to 0 at 0.5: the quadratic that it stands for holds while the
    damage is small.
    linear_until = 0.05 with the curvature term, which holds undecided coordinates against noise; without it 0.15, which
    is enough to reach the anchor's vertex first.

    Args:
        config: Options.
        start_kl: Mean KL in nats of the codes that the solve starts from.

    Returns:
        Options with all four set.
    """
    lowest = TRAVEL / config.iters
    lr = config.lr
    if lr is None:
        lr = min(LR_HIGHEST, max(lowest, LR_PER_ROOT_KL * math.sqrt(max(start_kl, 0.0))))
    floor = config.lr_floor
    if floor is None:
        floor = min(1.0, max(0.1, lowest / lr))
    curvature = config.curvature
    if curvature is None:
        full, none = CURVATURE_DAMAGE
        curvature = CURVATURE * min(1.0, max(0.0, (none - start_kl) / (none - full)))
    resolved = dataclasses.replace(config, lr=lr, lr_floor=floor, curvature=curvature)
    return dataclasses.replace(resolved, linear_until=linear_until(resolved))


def linear_until(config: SolverConfig) -> float:
    """Return the share of the run after which the linear term is dropped, by the curvature term where it is None."""
    given = config.linear_until
    return LINEAR_UNTIL[bool(config.curvature)] if given is None else given


def settings(config: SolverConfig, step: int) -> StepSettings:
    """Return the scalars of step `step` (1-based).

    lr: linear warm-up, then cosine from 1 to `lr_floor`, times `lr`.
    linear_weight: 1 until `linear_until` of the run, then 0.
    hardening: 0 until `harden_from`, linear to `harden_soft` at `harden_until`, linear to `harden_final`.
    snap: coordinates this near to a vertex are set to it: 0 until `snap_from`, linear to 1/2 at the last step, after
    which all lie at one; so they do in any case where scales are to move from there on.
    curvature: `curvature`, linear to 0 at `curvature_until`.

    Raises:
        ValueError: `lr` or `lr_floor` is not set yet (`resolve` sets them).
    """
    if config.lr is None or config.lr_floor is None:
        raise ValueError("settings: lr and lr_floor must be set, got None; see resolve")
    done = (step - 1) / config.iters
    warm = min(1.0, step / config.warmup) if config.warmup else 1.0
    span = max(1, config.iters - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, (step - 1 - config.warmup) / span))))
    lr = config.lr * warm * max(config.lr_floor, cosine)
    hardening = 0.0
    if done >= config.harden_from:
        soft_span = config.harden_until - config.harden_from
        if done < config.harden_until:
            hardening = config.harden_soft * (done - config.harden_from) / soft_span
        else:
            hard_span = max(1e-12, 1.0 - config.harden_until)
            rise = (config.harden_final - config.harden_soft) * (done - config.harden_until) / hard_span
            hardening = config.harden_soft + rise
    snap = 0.0
    begin = min(math.floor(config.snap_from * config.iters), config.iters - 1)
    if config.snap_from < 1.0 and step > begin:
        snap = 0.5 * (step - begin) / (config.iters - begin)
    if config.scale_iters and step == config.iters:
        snap = 0.5
    curvature = (config.curvature or 0.0) * max(0.0, 1.0 - done / config.curvature_until)
    return StepSettings(lr, 1.0 if done < linear_until(config) else 0.0, hardening, snap, curvature)


def moment_bound(config: SolverConfig) -> float:
    """Return the largest magnitude that a gradient with all its terms can have: the scale of 8-bit moments.

    The linear term and hardening add up only where they overlap in time; int8 moments are as fine as this is small.
    """
    hardest = max(config.harden_soft, config.harden_final) if config.harden_from < 1.0 else 0.0
    together = 1.0 + hardest if linear_until(config) > config.harden_from else max(1.0, hardest)
    return config.grad_clamp + together


class GainControl:
    """Hold the share of clamped KL-gradient entries at a target by moving the gain.

    gain <- gain * exp(RATE * (target - share)), within RANGE of its starting value. The published constant
    (rho = 200) saturates 63 % of the entries on one model and 1.7 % on another (method.md section 11), where
    the linear term then drowns the data.
    """

    RATE = 0.2
    RANGE = 30.0

    def __init__(self, initial: float, target: float | None) -> None:
        """Start at `initial`; target None keeps it constant."""
        self.gain = initial
        self.initial = initial
        self.target = target

    def update(self, saturated: int, live: int) -> None:
        """Move the gain after a step that clamped `saturated` of `live` entries."""
        if self.target is None or live == 0:
            return
        moved = self.gain * math.exp(self.RATE * (self.target - saturated / live))
        self.gain = min(max(moved, self.initial / self.RANGE), self.initial * self.RANGE)
