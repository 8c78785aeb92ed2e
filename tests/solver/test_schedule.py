# SPDX-License-Identifier: Apache-2.0
"""Schedules of both presets and the gain's control."""

from __future__ import annotations

import dataclasses
import math

import pytest

from discquant.config import GridConfig, SolverConfig, preset
from discquant.solver.schedule import GainControl, moment_bound, resolve, settings


def test_paper_preset_is_the_published_recipe() -> None:
    config = preset("paper", GridConfig(3, 64))
    assert (config.iters, config.batch_size, config.warmup) == (1024, 8, 128)
    assert (config.optimizer, config.betas, config.weight_decay) == ("adamw", (0.9, 0.999), 0.01)
    assert (config.start, config.kl_weight, config.lr, config.grad_clamp) == ("random", 200.0, 0.05, 1.0)
    assert settings(config, 128).lr == pytest.approx(0.05)
    middle = settings(config, 128 + 448 + 1)
    assert middle.lr == pytest.approx(0.025)
    for step in (1, 512, 1024):
        assert settings(config, step).hardening == 0.0
        assert settings(config, step).linear_weight == 1.0
    assert settings(config, 1024).lr < 1e-6


def test_default_preset_shape() -> None:
    config = resolve(preset("default", GridConfig(3, 64)), 0.02)
    assert config.lr == pytest.approx(0.18 * math.sqrt(0.02))
    every = [settings(config, step) for step in range(1, config.iters + 1)]
    assert max(s.lr for s in every) == pytest.approx(config.lr, rel=1e-3)
    assert all(s.lr >= config.lr * config.lr_floor * 0.999 for s in every[config.warmup :])
    hardening = [s.hardening for s in every]
    assert hardening == sorted(hardening)
    assert hardening[0] == 0.0
    assert hardening[-1] > 0.9 * config.harden_final
    assert every[0].linear_weight == 1.0
    assert every[-1].linear_weight == 0.0
    assert all(s.hardening + s.linear_weight + config.grad_clamp <= moment_bound(config) for s in every)
    overlapping = dataclasses.replace(config, linear_until=0.5)
    every = [settings(overlapping, step) for step in range(1, config.iters + 1)]
    assert all(s.hardening + s.linear_weight + config.grad_clamp <= moment_bound(overlapping) for s in every)


@pytest.mark.parametrize("iters", [1, 2, 7, 60, 256])
def test_everything_is_snapped_by_the_last_step(iters: int) -> None:
    config = resolve(SolverConfig(iters=iters), 0.1)
    snap = [settings(config, step).snap for step in range(1, iters + 1)]
    assert snap == sorted(snap)
    assert snap[-1] == 0.5
    assert all(value < 0.5 for value in snap[:-1])
    assert sum(value > 0 for value in snap) <= max(1, round(0.06 * iters) + 1)


def test_nothing_is_snapped_where_it_is_left_to_the_last_rounding() -> None:
    """Except before scales move: they move with all codes fixed."""
    config = resolve(SolverConfig(iters=20, snap_from=1.0), 0.1)
    assert [settings(config, step).snap for step in range(1, 21)] == [0.0] * 20
    then_scales = dataclasses.replace(config, scale_iters=4)
    assert [settings(then_scales, step).snap for step in range(1, 21)] == [0.0] * 19 + [0.5]


def test_learning_rate_warms_up_linearly() -> None:
    config = resolve(SolverConfig(iters=200, warmup=4, lr=0.08), 0.1)
    assert [settings(config, step).lr for step in (1, 2, 3, 4)] == pytest.approx([0.02, 0.04, 0.06, 0.08])


@pytest.mark.parametrize(("until", "steps"), [(0.0, 0), (0.3, 3), (1.0, 10)])
def test_the_linear_term_acts_in_its_share_of_the_run(until: float, steps: int) -> None:
    config = resolve(SolverConfig(iters=10, linear_until=until), 0.1)
    weights = [settings(config, step).linear_weight for step in range(1, 11)]
    assert weights == [1.0] * steps + [0.0] * (10 - steps)


def test_hardening_rises_in_two_straight_lines() -> None:
    config = resolve(
        SolverConfig(iters=100, harden_from=0.2, harden_soft=1.0, harden_until=0.6, harden_final=3.0), 0.1
    )
    found = [settings(config, 1 + round(100 * done)).hardening for done in (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)]
    assert found == pytest.approx([0.0, 0.0, 0.25, 0.5, 1.0, 2.0])


@pytest.mark.parametrize(
    ("changes", "terms"),
    [
        ({"linear_until": 0.5, "harden_from": 0.5}, 4.0),
        ({"linear_until": 1.0}, 1.0 + 4.0),
        ({"linear_until": 1.0, "harden_from": 1.0, "harden_until": 1.0}, 1.0),
        ({"linear_until": 0.1, "harden_soft": 5.0}, 5.0),
        ({"linear_until": 0.1, "harden_soft": 0.2, "harden_final": 0.5}, 1.0),
    ],
)
def test_moments_have_room_for_the_terms_that_act_at_once(changes: dict[str, float], terms: float) -> None:
    """And no more: what 8-bit moments resolve is a share of it. Terms that never meet do not add up."""
    config = resolve(SolverConfig(iters=1000, grad_clamp=0.5, **changes), 0.02)  # type: ignore[arg-type]
    assert moment_bound(config) == 0.5 + terms
    every = [settings(config, step) for step in range(1, 1001)]
    assert 0.99 * terms < max(s.linear_weight + s.hardening for s in every) <= terms


def test_learning_rate_follows_the_damage() -> None:
    """Within [2 / iters, 0.1]; what is given stays; the schedule refuses what is not set."""
    config = SolverConfig(iters=200)
    assert resolve(config, 10.0).lr == 0.1
    # A KL of nothing is measured a little above or below zero.
    for nothing in (0.0, -1e-9):
        assert resolve(config, nothing).lr == pytest.approx(0.01)
    assert resolve(config, 0.0).lr_floor == 1.0
    assert resolve(config, 10.0).lr_floor == pytest.approx(0.1)
    given = resolve(SolverConfig(iters=200, lr=0.07, lr_floor=0.5), 10.0)
    assert (given.lr, given.lr_floor) == (0.07, 0.5)


def test_curvature_and_linear_phase_follow_the_damage() -> None:
    """No quadratic where the damage is beyond it, and then the anchor's vertex first; what is given stays."""
    small, large = resolve(SolverConfig(), 0.02), resolve(SolverConfig(), 0.9)
    assert (small.curvature, small.linear_until) == (16.0, 0.05)
    assert (large.curvature, large.linear_until) == (0.0, 0.15)
    fading = [resolve(SolverConfig(), kl).curvature for kl in (0.25, 0.375, 0.4375, 0.5)]
    assert fading == [16.0, 8.0, 4.0, 0.0]
    given = resolve(SolverConfig(curvature=0.0), 0.01)
    assert (given.curvature, given.linear_until) == (0.0, 0.15)
    assert resolve(SolverConfig(curvature=3.0, linear_until=0.4), 0.9).linear_until == 0.4
    run = resolve(SolverConfig(iters=100, curvature=8.0, curvature_until=0.5), 0.02)
    assert [settings(run, step).curvature for step in (1, 26, 51, 100)] == [8.0, 4.0, 0.0, 0.0]
    for wrong in ({"curvature": -1.0}, {"linear_until": 1.5}, {"curvature_until": 0.0}):
        with pytest.raises(ValueError, match="config"):
            SolverConfig(**wrong)


def test_schedule_wants_a_rate() -> None:
    config = SolverConfig(iters=200)
    with pytest.raises(ValueError, match="resolve"):
        settings(config, 1)


def test_gain_moves_towards_its_target_and_stays_in_range() -> None:
    control = GainControl(10.0, 0.5)
    control.update(10, 100)
    assert control.gain == pytest.approx(10.0 * math.exp(GainControl.RATE * 0.4))
    control.update(100, 100)
    assert control.gain < 10.0 * math.exp(GainControl.RATE * 0.4)
    for _ in range(10_000):
        control.update(0, 100)
    assert control.gain == 10.0 * GainControl.RANGE
    for _ in range(10_000):
        control.update(100, 100)
    assert control.gain == 10.0 / GainControl.RANGE
    control.update(0, 0)  # no entry is left between its neighbours: nothing is known of the share
    assert control.gain == 10.0 / GainControl.RANGE
    constant = GainControl(10.0, None)
    constant.update(0, 100)
    assert constant.gain == 10.0


@pytest.mark.parametrize(
    ("field", "value"),
    [("iters", 0), ("lr", 0.0), ("lr_floor", 2.0), ("optimizer", "adam"), ("saturation", 1.0), ("grad_clamp", 0.0),
     ("harden_from", 0.9), ("state", "u4"), ("loss", "l2"), ("start", "zero"), ("micro_batch", 0), ("warmup", -1)],
)  # fmt: skip
def test_rejects_bad_options(field: str, value: object) -> None:
    with pytest.raises(ValueError, match="config"):
        SolverConfig(**{field: value})
