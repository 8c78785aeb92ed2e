# SPDX-License-Identifier: Apache-2.0
"""Codes held two per byte, and codes that are not held but computed from the state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.solver.chain import DecoderChain
from discquant.solver.codes import PackedCodes
from discquant.solver.engine import Engine
from discquant.solver.layerwise import layerwise_codes
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve, lay_grids


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama of two blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("shape", [(3, 8), (5, 7), (1, 1), (0, 4)])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_packed_codes(bits: int, shape: tuple[int, int]) -> None:
    """What is asked for is what was put; up to 4 bits a row takes half its columns, rounded up."""
    codes = PackedCodes()
    put = {name: torch.randint(0, 2**bits, shape, dtype=torch.uint8) for name in ("one", "other")}
    for name, q in put.items():
        codes.put(name, q, bits)
    assert list(codes) == list(put) and len(codes) == 2
    assert all(torch.equal(codes[name], q) for name, q in put.items())
    columns = -(-shape[1] // 2) if bits <= 4 else shape[1]
    assert codes.nbytes == 2 * shape[0] * columns


@pytest.mark.parametrize("method", ["gptq", "greedy"])
def test_layerwise_codes_take_half_a_byte(method: Any, model: Any) -> None:
    chain = DecoderChain(model)
    grids = lay_grids(chain, GridConfig(3, 32))
    ids = torch.randint(3, 61, (4, 8))
    codes = layerwise_codes(chain, grids, TokenRows(chain, ids, None, 2).batches(range(4)), method)
    assert codes.nbytes * 2 == sum(q.numel() for q in codes.values())
    assert all(
        q.shape == ref.matrix().shape for refs in chain.weights for ref in refs for q in [codes[ref.name]]
    )


@pytest.mark.parametrize("where", ["resident", "host", "disk"])
def test_codes_from_the_state(where: Any, model: Any, tmp_path: Path) -> None:
    """They follow the state: the same as a copy of all codes, before and after a step, in any placement."""
    options = SolverConfig(iters=2, batch_size=2, micro_batch=1, warmup=1, start="ref", state="u8")
    config = QuantizeConfig(grid=GridConfig(3, 32), solver=options)
    chain = DecoderChain(model)
    ids = torch.randint(3, 61, (8, 8), generator=torch.Generator().manual_seed(1))
    run = Solve(
        chain,
        lay_grids(chain, config.grid),
        TokenRows(chain, ids, None, 1),
        config,
        engine=Engine(where, folder=tmp_path),
    )
    view = run.coded()
    for _ in range(2):
        codes = run.codes()
        assert list(view) == list(codes) == [ref.name for refs in chain.weights for ref in refs]
        assert len(view) == len(codes) and all(torch.equal(view[name], q) for name, q in codes.items())
        run.advance()
    run.close()


def test_nearest_codes(model: Any) -> None:
    """Computed when asked for: what the grid rounds the weights to, in the model's order."""
    chain = DecoderChain(model)
    grids = lay_grids(chain, GridConfig(3, 32))
    codes = layerwise_codes(chain, grids, [], "rtn")
    refs = [ref for block in chain.weights for ref in block]
    assert list(codes) == [ref.name for ref in refs] and len(codes) == len(refs)
    assert all(torch.equal(codes[ref.name], grids[ref.name].nearest(ref.matrix())) for ref in refs)
