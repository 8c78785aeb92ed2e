# SPDX-License-Identifier: Apache-2.0
"""What damages are made of: windows, tokens that count, layers that share a grid, GPTQ's damping."""

from __future__ import annotations

import pytest
import torch

from discquant.allocation import allocate
from discquant.allocation.allocate import Measured
from discquant.config import GridConfig
from discquant.solver.chain import DecoderChain
from discquant.solver.rows import TokenRows

CHOICES = {str(bits): GridConfig(bits, 32) for bits in (2, 4)}


@pytest.fixture(scope="module")
def chain() -> DecoderChain:
    """A random Llama of one block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=53, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    ))  # fmt: skip
    return DecoderChain(model.eval())


def rows_of(chain: DecoderChain, padding: int = 0) -> TokenRows:
    """Four windows of twelve tokens, one of them with five of padding."""
    ids = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:] = False
    return TokenRows(chain, ids.masked_fill(~mask, padding), mask, 2)


def test_damage_is_half_the_mean_square_per_token(chain: DecoderChain) -> None:
    """Errors of layers that share a grid are made together: their products are added before they are squared."""
    products = {"q_proj": 1.0, "k_proj": -3.0, "v_proj": 4.0, "o_proj": 5.0}
    known = {
        ref.name: Measured(
            dict.fromkeys(CHOICES, 64),
            torch.full((2, 4), products.get(ref.name.rsplit(".", 1)[-1], 0.0), dtype=torch.float64),
        )
        for refs in chain.weights
        for ref in refs
    }
    found = allocate(chain, rows_of(chain), CHOICES, 8, codes="rtn", known=known)
    tokens = 3 * 12 + 7
    damages = [unit.damage["2"] for unit in found.units]
    assert damages == pytest.approx([0.5 * 4 * 2.0**2 / tokens, 0.5 * 4 * 5.0**2 / tokens, 0.0, 0.0])


@pytest.mark.parametrize("codes", ["gptq", "rtn"])
def test_what_padding_holds_changes_nothing(codes: str, chain: DecoderChain) -> None:
    one, other = (
        allocate(chain, rows_of(chain, padding), CHOICES, 8, codes=codes)  # type: ignore[arg-type]
        for padding in (0, 51)
    )
    for mine, theirs in zip(one.units, other.units, strict=True):
        assert mine.damage == pytest.approx(theirs.damage, rel=1e-5)


def test_damping_is_gptq_s(chain: DecoderChain) -> None:
    """With so much of it inputs count alike, and codes are those to nearest."""
    damped, nearest = (
        allocate(chain, rows_of(chain), CHOICES, 8, codes=codes, damp=1e9).damage("2")  # type: ignore[arg-type]
        for codes in ("gptq", "rtn")
    )
    own = allocate(chain, rows_of(chain), CHOICES, 8).damage("2")
    assert damped == pytest.approx(nearest) and own != pytest.approx(nearest)


def test_a_grid_that_a_layer_may_not_have_is_not_laid(chain: DecoderChain) -> None:
    """It may be one that cannot be: rows of 32 columns have no blocks of 64."""
    choices = {"4": GridConfig(4, 32), "nf4": GridConfig.of_kind("nf4")}
    found = allocate(
        chain, rows_of(chain), choices, 8, codes="rtn",
        allowed=lambda name, shape, grid: grid.kind == "uniform" or shape[1] % 64 == 0,
    )  # fmt: skip
    assert [set(unit.bits) for unit in found.units] == [{"4"}] * 3 + [{"4", "nf4"}]
