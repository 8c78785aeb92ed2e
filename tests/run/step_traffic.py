# SPDX-License-Identifier: Apache-2.0
"""Bytes that one solver step moves outside the matmuls, per weight and per token: python tests/run/step_traffic.py.

A real step of a bfloat16 decoder runs on the simulated GPU with the operators that a GPU takes (8-bit state, momentum,
the teacher from the state). Of every operator all tensors that it reads and writes are counted, each once; of a matmul
only what it writes. Twice the bytes of one window less those of two leaves what does not grow with the tokens, and two
blocks less one leave one whole block: its weights' traffic, without a rule for what counts as a weight. What does grow
is that of the activations, told per token and entry of the hidden state, without what matmuls and attention write.
Widths are a 64th of Llama 3 70B's. Once more with what the default recipe adds: the anchor of a GPTQ start, curvature.
Writes benchmarks/results/step_traffic.json.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from discquant import _extension
from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.formats.lazy import settle
from discquant.ops import _registry as registry
from discquant.ops._steps import OPTIMIZERS
from discquant.solver import chain as chain_module
from discquant.solver import solve as solve_module
from discquant.solver.chain import DecoderChain
from discquant.solver.codes import NearestCodes
from discquant.solver.journal import Journal
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve, lay_grids

ROOT = Path(__file__).resolve().parent.parent.parent
RESULT = ROOT / "benchmarks" / "results" / "step_traffic.json"
ATEN = torch.ops.aten
MATMULS = {
    ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN.bmm.out, ATEN.baddbmm.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
}  # fmt: skip
_MM, _BMM, _KEEP, _TRITON_MODULE = torch.mm, torch.bmm, Journal.keep, registry.triton_module
HIDDEN, INTERMEDIATE, HEADS, TOKENS = 128, 448, 8, 8
WEIGHTS = 2 * HIDDEN * (HIDDEN + HIDDEN // HEADS) + 3 * HIDDEN * INTERMEDIATE


def _bytes(value: Any) -> int:
    """Bytes of the tensors in a value; an expanded one has those of its storage."""
    tensors = {id(leaf): leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}.values()
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


class Traffic:
    """Adds up what operators read and write, by operator."""

    def __init__(self) -> None:
        self.found: collections.Counter[str] = collections.Counter()
        self.undo = False  # within the copy that takes a failed step back
        self.simulating = False  # within what a GPU does in one operator

    def observe(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count one operator."""
        schema = func._schema
        aliases = [out.alias_info for out in schema.returns]
        moves_nothing = "empty" in schema.name or "_unsafe_view" in schema.name
        if self.simulating or moves_nothing or any(a is not None and not a.is_write for a in aliases):
            return  # a view, or nothing written yet
        changed = [
            args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        fresh = [] if any(alias is not None for alias in aliases) else [result]
        written = _bytes([changed, fresh])
        # Overwritten without a look at what was there.
        blind = func in (ATEN.copy_.default, ATEN.zero_.default, ATEN.fill_.Scalar)
        results = {argument.name for argument in schema.arguments if argument.is_out}
        given = {name: value for name, value in kwargs.items() if name not in results}
        read = 0 if func in MATMULS else _bytes((args[1:] if blind else args, given))
        name = "undo" if self.undo else schema.name.split("::")[-1]
        self.found[f"{name} read"] += read
        self.found[f"{name} written"] += written

    def keep(self, journal: Journal, index: int, changing: Tensor) -> None:
        """`Journal.keep`, counted apart: it copies up to 2 GiB of a step's bytes, nothing beyond."""
        self.undo = True
        _KEEP(journal, index, changing)
        self.undo = False


def _product(traffic: Traffic, plain: Any) -> Any:
    """Return torch.mm or torch.bmm with the `out_dtype` that a CPU does not have."""

    def product(
        left: Tensor, right: Tensor, *, out_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Tensor:
        traffic.simulating = True
        if out_dtype is not None:
            left, right = left.to(out_dtype), right.to(out_dtype)
        traffic.simulating = False
        return plain(left, right, **kwargs)

    return product


# torch's norm as a GPU has it: one kernel forwards, one backwards. A CPU takes it apart.
torch.library.define("step_traffic::rms_norm", "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
torch.library.define(
    "step_traffic::rms_norm_backward", "(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> Tensor"
)


@torch.library.impl("step_traffic::rms_norm", "CPU")
def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (x.float() * rstd * weight.float()).to(x.dtype), rstd


@torch.library.impl("step_traffic::rms_norm_backward", "CPU")
def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    pull, unit = dy.float() * weight.float(), x.float() * rstd
    return (rstd * (pull - unit * (pull * unit).mean(-1, keepdim=True))).to(x.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = torch.ops.step_traffic.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        out: Tensor = y
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return torch.ops.step_traffic.rms_norm_backward(grads[0].contiguous(), *ctx.saved_tensors), None, None


def _rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    """torch.nn.functional.rms_norm on a GPU."""
    y: Tensor = _Norm.apply(x, weight, eps)
    return y


def _kernels(stem: str) -> Any:
    """The launchers of a kernel; the two that take longest, interpreted, are those of C++ under the same operators.

    What an operator does within is not seen here, only what it reads and writes.
    """
    kernels = _TRITON_MODULE(stem)
    if not _extension.available() or stem not in ("projected_step", "soft_weight"):
        return kernels

    def projected_step_fwd(*args: Any) -> Tensor:
        *state, q_down, table, group_size, optimizer, scalars, keys = args
        assert q_down is None and table is None
        counts = torch.zeros(5, dtype=torch.int64)
        torch.ops.discquant.projected_step_cpp2_(
            *state, counts, group_size, OPTIMIZERS.index(optimizer), *scalars.values(), *keys.values()
        )
        return counts

    def soft_weight_fwd(q_down: Tensor, frac: Tensor, *args: Any) -> Tensor:
        # The dispatcher leaves out a minimum and an index that are None.
        *grid, num_bits, group_size, dtype, is_reference, transpose = args[:8]
        out = frac.new_empty(frac.shape[::-1] if transpose else frac.shape, dtype=dtype)
        torch.ops.discquant.soft_weight_cpp2_(
            out, q_down, frac, *grid, num_bits, group_size, is_reference, transpose, *args[8:]
        )
        return out

    return types.SimpleNamespace(
        projected_step_fwd=projected_step_fwd, soft_weight_fwd=soft_weight_fwd,
        soft_weight_bwd=getattr(kernels, "soft_weight_bwd", None),
    )  # fmt: skip


# What the default recipe adds to a plain step: the anchor of a GPTQ start, the curvature. Blocks of its factors are a
# 32nd as wide, for none may be narrower: relative to the weights there are twice as many entries as in Llama 3 70B.
PLAIN = {"start": "random", "curvature": 0.0}
RECIPE = {"start": "gptq", "curvature": 1.0, "curvature_width": 16, "curvature_samples": 2}


def _step(simulated: Any, blocks: int, windows: int, recipe: dict[str, Any]) -> collections.Counter[str]:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=blocks,
        num_attention_heads=HEADS, num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().to(torch.bfloat16)
    ids = torch.randint(3, 61, (windows, TOKENS))
    options = SolverConfig(
        iters=4, batch_size=windows, micro_batch=windows, warmup=1, lr=0.1, lr_floor=0.1, kl_weight=100.0,
        state="u8", optimizer="momentum", compute_dtype="bfloat16", **recipe,
    )  # fmt: skip
    traffic = Traffic()
    with simulated(kernels=True) as watch, pytest.MonkeyPatch.context() as patch:
        for name, plain in (("mm", _MM), ("bmm", _BMM)):
            patch.setattr(torch, name, _product(traffic, plain))
        patch.setattr(registry, "triton_module", _kernels)
        settle(model, torch.device("cuda", 0), stream=False)
        chain = DecoderChain(model)
        grids = lay_grids(chain, GridConfig(4, 64, grid="absmax"))
        run = Solve(
            chain,
            grids,
            TokenRows(chain, ids, None, windows),
            QuantizeConfig(solver=options),
            served=torch.bfloat16,
            # In place of GPTQ's, whose making takes longer than all the rest.
            start_codes=NearestCodes(chain, grids) if options.start == "gptq" else None,
        )
        watch.observe = traffic.observe
        patch.setattr(Journal, "keep", lambda *arguments: traffic.keep(*arguments))
        patch.setattr(torch.nn.functional, "rms_norm", _rms_norm)
        run.advance()
    return traffic.found


def measure(norms: bool = True, recipe: dict[str, Any] = PLAIN) -> dict[str, Any]:
    """Bytes per weight and per token of one block, by operator and in all; what copies for undoing a step add, apart.

    Without `norms` those of `transformers` run, as before there was solver/norms.py.
    """
    spec = importlib.util.spec_from_file_location("run_conftest", Path(__file__).with_name("conftest.py"))
    assert spec is not None and spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    with pytest.MonkeyPatch.context() as patch:
        # As for a model of usual size: each block is computed again in backward, the teacher at every step.
        patch.setattr(solve_module, "KEEP_GRAPH_BYTES", 0)
        patch.setattr(solve_module, "KEEP_TEACHER_BYTES", 0)
        if not norms:
            patch.setattr(chain_module, "rms_norms", lambda block: [])
        simulated = conftest.simulation(patch)
        if recipe is not PLAIN:
            _step(simulated, 1, 1, recipe)  # tables that are kept from then on
        counts = {(b, w): _step(simulated, b, w, recipe) for b in (1, 2) for w in (1, 2)}
    per_block = {
        name: 2 * (counts[2, 1][name] - counts[1, 1][name]) - (counts[2, 2][name] - counts[1, 2][name])
        for name in sorted(set().union(*counts.values()))
    }
    per_token = {
        name: (counts[2, 2][name] - counts[1, 2][name] - counts[2, 1][name] + counts[1, 1][name])
        / (HIDDEN * TOKENS)
        for name in per_block
        if name != "mm written" and not name.startswith("_scaled_dot_product")
    }
    each = {name: round(number / WEIGHTS, 3) for name, number in per_block.items()}
    undo = sum(number for name, number in per_block.items() if name.startswith("undo "))
    return {
        "bytes_per_weight": round((sum(per_block.values()) - undo) / WEIGHTS, 2),
        "undo_bytes_per_weight": round(undo / WEIGHTS, 2),
        "operators": {name: number for name, number in each.items() if number and not name.startswith("undo ")},
        "bytes_per_token_and_hidden": round(sum(per_token.values()), 1),
        "operators_of_activations": {name: round(number, 2) for name, number in per_token.items() if number},
        "weights_per_block": WEIGHTS,
    }  # fmt: skip


def measure_recipe() -> dict[str, Any]:
    """Bytes per weight of a step with the default recipe's terms; what grows with the tokens is as in `measure`."""
    found = measure(recipe=RECIPE)
    # Tables of a few kilobytes aside.
    operators = {name: number for name, number in found["operators"].items() if number > 0.01}
    return {"bytes_per_weight": found["bytes_per_weight"], "operators": operators}


def main() -> None:
    """Write the result."""
    import os

    # The kernels run interpreted, whoever starts this.
    os.environ["TRITON_INTERPRET"] = "1"
    eager = measure(norms=False)["bytes_per_token_and_hidden"]
    found = {**measure(), "with_norms_of_transformers": eager, "default_recipe": measure_recipe()}
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
