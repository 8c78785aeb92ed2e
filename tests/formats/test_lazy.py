# SPDX-License-Identifier: Apache-2.0
"""A lazy model computes what the loaded one computes, holds one block's matrices at a time, and gives them back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.lazy import build_lazy, substitute
from discquant.formats.source import open_source
from discquant.solver.chain import DecoderChain
from discquant.solver.engine import Engine
from discquant.solver.layerwise import layerwise_codes
from discquant.solver.rows import TokenRows
from discquant.solver.solve import lay_grids, solve

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"head_dim": 8, "sliding_window": 5},  # tied, with a scale buffer that no checkpoint holds
    "Qwen2": {},
    "Mixtral": {"num_local_experts": 4, "head_dim": 8},  # its checkpoint has other names, and experts apart
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8},
}


def _write(family: str, path: Path) -> None:
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, **FAMILIES[family],
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(path)


def _in_memory(model: nn.Module) -> int:
    """Elements of the blocks' matrices that have memory."""
    return sum(
        p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() > 1 and not p.is_meta
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits_and_nothing_stays(family: str, tmp_path: Path) -> None:
    _write(family, tmp_path)
    whole = open_source(tmp_path, dtype=torch.float32).model
    lazy = open_source(tmp_path, dtype=torch.float32, lazy=True).model
    ids = torch.randint(3, 61, (2, 9))
    seen: list[int] = []
    for block in lazy.model.layers:
        block.mlp.register_forward_hook(lambda *args: seen.append(_in_memory(lazy)))
    assert _in_memory(lazy) == 0
    with torch.no_grad():
        assert torch.equal(lazy(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert len(seen) == 3
    assert max(seen) * 3 == _in_memory(whole)
    assert _in_memory(lazy) == 0
    for (name, one), (other_name, other) in zip(lazy.named_buffers(), whole.named_buffers(), strict=True):
        assert name == other_name
        assert torch.equal(one, other), name


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_a_solve_gives_the_same_codes(family: str, tmp_path: Path) -> None:
    """Grids, GPTQ start, solve and codes read the checkpoint block by block and end in the same bytes."""
    _write(family, tmp_path)
    found = []
    for lazy, where in ((False, "resident"), (True, "host")):
        model = open_source(tmp_path, dtype=torch.float32, lazy=lazy).model
        chain = DecoderChain(model)
        assert chain.lazy == lazy
        config = QuantizeConfig(
            grid=GridConfig(3, 32),
            solver=SolverConfig(iters=2, batch_size=4, micro_batch=2, warmup=1),
            gptq_samples=4,
        )
        ids = torch.randint(3, 61, (6, 8), generator=torch.Generator().manual_seed(1))
        chain.verify(ids[:1])
        rows = TokenRows(chain, ids, None, 2)
        grids = lay_grids(chain, config.grid)
        run = solve(chain, grids, rows, config, engine=Engine(where))  # type: ignore[arg-type]
        greedy = layerwise_codes(chain, grids, rows.batches(range(4)), "greedy")
        found.append({**run.codes(), **{f"greedy.{name}": q for name, q in greedy.items()}})
        if lazy:
            assert _in_memory(model) == 0
        run.close()
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(q, found[1][name]) for name, q in found[0].items())


def test_a_candidate_is_a_copy_with_other_readers(tmp_path: Path) -> None:
    _write("Llama", tmp_path)
    lazy = open_source(tmp_path, dtype=torch.float32, lazy=True).model
    ids = torch.randint(3, 61, (1, 6))
    with torch.no_grad():
        before = lazy(input_ids=ids).logits
        twin = copy.deepcopy(lazy)
        shape = twin.model.layers[1].mlp.up_proj.weight.shape
        substitute(twin, "model.layers.1.mlp.up_proj.weight", lambda: torch.zeros(shape))
        changed = twin(input_ids=ids).logits
        reference = open_source(tmp_path, dtype=torch.float32).model
        reference.model.layers[1].mlp.up_proj.weight.zero_()
        assert torch.equal(changed, reference(input_ids=ids).logits)
        assert torch.equal(lazy(input_ids=ids).logits, before)
    with pytest.raises(KeyError):
        substitute(twin, "lm_head.weight", lambda: torch.zeros(1))


def test_a_block_can_be_held(tmp_path: Path) -> None:
    _write("Llama", tmp_path)
    chain = DecoderChain(open_source(tmp_path, dtype=torch.float32, lazy=True).model)
    with chain.opened(1):
        one = chain.blocks[1].mlp.up_proj.weight
        assert not one.is_meta
        chain.run_block(1, *_call(chain))
        assert chain.blocks[1].mlp.up_proj.weight is one
    assert chain.blocks[1].mlp.up_proj.weight.is_meta


def _call(chain: DecoderChain) -> tuple[torch.Tensor, Any]:
    prepared = chain.prepare(torch.randint(3, 61, (1, 6)))
    return prepared.hidden, prepared.calls[1]


@pytest.mark.parametrize("apart", [True, False])
def test_of_experts_one_is_read_at_a_time(
    apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint holds them apart, or as the model does; either way one matrix costs its own bytes."""
    _write("Mixtral", tmp_path)
    if not apart:
        model = open_source(tmp_path, dtype=torch.bfloat16).model
        model.save_pretrained(tmp_path, save_original_format=False)
    whole = DecoderChain(open_source(tmp_path, dtype=torch.float32).model)
    chain = DecoderChain(open_source(tmp_path, dtype=torch.float32, lazy=True).model)
    assert chain.lazy
    sizes: list[int] = []
    read = Checkpoint.read

    def watched(self: Checkpoint, *args: Any) -> torch.Tensor:
        found = read(self, *args)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(Checkpoint, "read", watched)
    compared = 0
    for ref, other in zip(chain.weights[1], whole.weights[1], strict=True):
        assert (ref.name, ref.part) == (other.name, other.part)
        assert torch.equal(ref.matrix(), other.matrix())
        if ref.part is not None:
            # Both gates of a file that joins them come in one piece.
            assert len(sizes) == 1 and sizes[0] <= (1 if apart else 2) * ref.matrix_size
            compared += 1
        sizes.clear()
    assert compared == (12 if apart else 8)


def test_other_names_in_the_checkpoint_are_loaded_whole(tmp_path: Path) -> None:
    _write("Llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    moved = {name.replace("up_proj", "upward"): tensor for name, tensor in tensors.items()}
    save_file(moved, tmp_path / "model.safetensors", {"format": "pt"})
    assert build_lazy(tmp_path, Checkpoint(tmp_path), torch.float32) is None
