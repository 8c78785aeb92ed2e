# SPDX-License-Identifier: Apache-2.0
"""What a solve makes of its options and its rows: learning rate, gain, optimizer, damping, masks, the last record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.ops import StepOptions
from discquant.solver import calibrate, solver
from discquant.solver.chain import DecoderChain
from discquant.solver.layerwise import layerwise_codes
from discquant.solver.measure import mean_kl, served_weights
from discquant.solver.rows import TokenRows
from discquant.solver.schedule import LR_HIGHEST, LR_PER_ROOT_KL, TRAVEL
from discquant.solver.solve import Solve, lay_grids

# One block of two linear layers is solved for: the rest is as it was.
IGNORED = ("*.layers.0.*", "*.layers.1.*", "*self_attn*", "*gate_proj")


@pytest.fixture
def chain(make_model: Callable[..., Any]) -> DecoderChain:
    """A Llama of which two layers are quantized."""
    return DecoderChain(make_model("llama", torch.float32), IGNORED)


def rows_of(chain: DecoderChain, count: int = 8, mask: torch.Tensor | None = None) -> TokenRows:
    """Random token ids."""
    ids = torch.randint(3, 61, (count, 12), generator=torch.Generator().manual_seed(1))
    return TokenRows(chain, ids, mask, 2)


def config_of(**options: Any) -> QuantizeConfig:
    """A 3-bit grid in groups of 16."""
    changes = {"iters": 6, "batch_size": 4, "micro_batch": 2, "warmup": 1, "start": "ref", **options}
    return QuantizeConfig(
        grid=GridConfig(3, 16), solver=SolverConfig(**changes), gptq_samples=8, gptq_damp=0.5
    )


def test_learning_rate_is_that_of_the_codes_it_starts_from(chain: DecoderChain) -> None:
    """GPTQ's, with start = gptq; nearest codes, whose damage is another, else."""
    rows, found = rows_of(chain), {}
    grids = lay_grids(chain, config_of().grid)
    for start, method in (("gptq", "gptq"), ("ref", "rtn")):
        config = config_of(start=start, iters=4000)
        codes = layerwise_codes(
            chain, grids, rows.batches(range(8)), method, damp=config.gptq_damp, served=torch.float32
        )
        kl = mean_kl(
            chain,
            served_weights(chain, grids, codes, torch.float32, torch.float32),
            rows.batches(range(8)),
        )
        expected = LR_PER_ROOT_KL * math.sqrt(kl)
        assert TRAVEL / 4000 < expected < LR_HIGHEST, "the clamps must not hide it"
        found[method] = Solve(chain, grids, rows, config).solver.config.lr
        assert found[method] == pytest.approx(expected, rel=1e-5)
    assert found["gptq"] != pytest.approx(found["rtn"], rel=1e-2)


def test_options_reach_the_step(chain: DecoderChain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a user may set, none of them at its default."""
    seen: list[StepOptions] = []
    real = solver.projected_step_deferred_

    def watched(*args: Any, options: StepOptions, **named: Any) -> Any:
        seen.append(options)
        return real(*args, options=options, **named)

    monkeypatch.setattr(solver, "projected_step_deferred_", watched)
    given: dict[str, Any] = {
        "optimizer": "adamw", "betas": (0.7, 0.8), "weight_decay": 0.03, "grad_clamp": 0.4, "lr": 0.04,
    }  # fmt: skip
    default = SolverConfig()
    assert all(getattr(default, name) != value or name == "optimizer" for name, value in given.items())
    config = dataclasses.replace(config_of(**given), seed=7)
    run = Solve(chain, lay_grids(chain, config.grid), rows_of(chain), config)
    gain = run.solver.gain.gain
    run.advance()
    assert len(seen) == 2 and {options.tensor_id for options in seen} == {0, 1}
    for options in seen:
        assert {name: getattr(options, name) for name in given} == given
        assert (options.kl_weight, options.seed, options.step) == (gain, 7, 1)


def test_gain_counts_coordinates_that_may_move(chain: DecoderChain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that lie on the grid have gradients too, which no step takes."""
    with torch.no_grad():
        chain.weights[2][0].matrix()[:, ::2] = 0.0
    levels: list[torch.Tensor] = []
    real = torch.quantile
    monkeypatch.setattr(
        calibrate.torch, "quantile", lambda values, share: levels.append(values) or real(values, share)
    )
    config = config_of()
    run = Solve(chain, lay_grids(chain, config.grid), rows_of(chain), config)
    (pooled,) = levels
    states = [state for block in run.solver.states for state in block]
    live = sum(int(state.live().sum()) for state in states)
    assert pooled.numel() == live < sum(math.prod(state.shape) for state in states)


def test_mean_kl_is_that_of_the_positions_that_count(chain: DecoderChain) -> None:
    """A masked position adds nothing to the sum: the mean is that of the other positions by themselves."""
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[:, 7:] = False
    rows = rows_of(chain, 4, mask)
    cut = TokenRows(chain, rows.input_ids[:, :7], None, 2)
    grids = lay_grids(chain, GridConfig(3, 16))
    served = served_weights(
        chain, grids, layerwise_codes(chain, grids, [], "rtn"), torch.float32, torch.float32
    )
    found, expected = (mean_kl(chain, served, each.batches(range(4))) for each in (rows, cut))
    assert expected > 0 and found == pytest.approx(expected, rel=1e-4)


def test_nothing_is_fractional_in_the_last_record(chain: DecoderChain) -> None:
    config = config_of()
    run = Solve(chain, lay_grids(chain, config.grid), rows_of(chain), config)
    records = [run.advance() for _ in range(config.solver.iters)]
    assert records[0].fractional > 0 and records[-1].fractional == 0
    assert all(state.count_fractional() == 0 for block in run.solver.states for state in block)
