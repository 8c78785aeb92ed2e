# SPDX-License-Identifier: Apache-2.0
"""`discquant plan --measure`: time one decoder block of the model's own shape, the head, the step and a copy, here.

Random weights stand in for real ones; never zeros, which compute faster.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from discquant.config import QuantizeConfig
from discquant.errors import CapacityError
from discquant.planning.hardware import GB, host_memory
from discquant.planning.rates import Rates, machine_name
from discquant.planning.shape import ModelShape, empty_model, open_config
from discquant.planning.traffic import ATTENTION_BACKWARD, ATTENTION_FORWARD, HEAD_FLOP, state_layout

Clock = Callable[[], float]
REPEATS = 3
HEAD_ROWS = 8192
COPY_BYTES = 1 << 28


def _seconds(call: Callable[[], object], clock: Clock) -> float:
    """Return the median time of a call after one that is not counted."""
    call()
    times = []
    for _ in range(REPEATS):
        _synchronize()
        begin = clock()
        call()
        _synchronize()
        times.append(clock() - begin)
    return sorted(times)[REPEATS // 2]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def usual_block(shape: ModelShape) -> int:
    """Return the index of the last block with as many weights to quantize as most have, of those that have any.

    Where some are unlike (dense before experts, or left alone), most are like the last.
    """
    counts = [block.weights for block in shape.blocks]
    most = max((count for count in counts if count), key=lambda count: (counts.count(count), count))
    return max(index for index, count in enumerate(counts) if count == most)


def one_block_model(
    model: str | Path, dtype: torch.dtype, index: int = -1, *, trust_remote_code: bool = False
) -> Any:
    """Return a model of this configuration with one real block, random weights, and a head of at most 8192 rows.

    Args:
        model: As for `read_shape`.
        dtype: Of its weights.
        index: Which block; it keeps its name, so that patterns mean in this model what they mean in the whole.
        trust_remote_code: As for `read_shape`.
    """
    config = copy.deepcopy(open_config(model, trust_remote_code))
    built = empty_model(config, trust_remote_code)
    decoder = built.get_decoder()
    lists = [(n, m) for n, m in decoder.named_children() if isinstance(m, nn.ModuleList) and len(m)]
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    kept = nn.ModuleList()
    kept.add_module(str(range(len(blocks))[index]), blocks[index])
    setattr(decoder, name, kept)
    rows = min(HEAD_ROWS, int(built.get_output_embeddings().weight.shape[0]))
    hidden = int(built.get_output_embeddings().weight.shape[1])
    built.set_input_embeddings(nn.Embedding(rows, hidden, device="meta"))
    built.set_output_embeddings(nn.Linear(hidden, rows, bias=False, device="meta"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    built = built.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        for buffer in built.buffers():
            # Rotary frequencies and the like were never computed on the meta device; any finite values do.
            buffer.uniform_(0.0, 1.0, generator=generator) if buffer.is_floating_point() else buffer.zero_()
    return built.eval()


def measure(
    model: str | Path,
    shape: ModelShape,
    config: QuantizeConfig,
    *,
    trust_remote_code: bool = False,
    clock: Clock = time.perf_counter,
) -> Rates:
    """Time this machine on one block of a model.

    Args:
        model: As for `read_shape`.
        shape: Its sizes.
        config: Decides dtype, tokens per pass, state and optimizer.
        trust_remote_code: As for `read_shape`.
        clock: Gives seconds; the processor's own time (time.process_time, one thread) on a machine under other load.

    Returns:
        Rates of this machine.

    Raises:
        CapacityError: One block with its state and gradient does not fit into the host's memory.
    """
    from discquant.ops import StepOptions, projected_step_
    from discquant.solver.chain import DecoderChain
    from discquant.solver.losses import head_loss
    from discquant.solver.schedule import moment_bound
    from discquant.solver.solve import lay_grids
    from discquant.solver.solver import Solver
    from discquant.solver.state import WeightState
    from discquant.solver.weight_ref import first_not_finite, take_matrices

    options = config.solver
    count = shape.largest.weights
    # Weights, gradient and their sum in float32 beside the state while it is made.
    needed = count * (3 * 4.0 + state_layout(options.state, options.optimizer, config.grid.bits).total + 8.0)
    if needed > host_memory():
        raise CapacityError(
            f"plan: --measure times one block, {count / 1e9:.2f} G weights, which takes about {needed / GB:.1f} "
            f"GB; there are {host_memory() / GB:.1f}"
        )
    dtype = getattr(torch, options.compute_dtype)
    index = usual_block(shape)
    chain = DecoderChain(
        one_block_model(model, dtype, index, trust_remote_code=trust_remote_code), config.ignore
    )
    assert chain.head is not None
    refs = chain.weights[0]
    weights = sum(ref.matrix().numel() for ref in refs)
    # How scales are found does not change how fast they are used.
    grids = lay_grids(chain, lambda name: dataclasses.replace(config.grid_of(name), grid="absmax"))
    states = [
        [
            WeightState(
                ref.name,
                grids[ref.name],
                ref.matrix(),
                None,
                state=options.state,
                optimizer=options.optimizer,
            )
            for ref in refs
        ]
    ]
    solver = Solver(chain, states, options)
    states = solver.states
    windows = min(options.micro_batch, options.batch_size)
    ids = torch.randint(0, chain.head.weight.shape[0], (windows, config.data.seqlen))
    batch = chain.prepare(ids.to(chain.head.weight.device))
    tokens = ids.numel()
    scores = 1.0 * config.data.seqlen * shape.attention
    active = shape.blocks[index].active_weights
    student = solver.student(0)
    output = chain.teacher_output(batch)
    pull = torch.randn_like(output)

    def forward() -> Tensor:
        with torch.no_grad():
            return chain.run_block(0, batch.hidden, batch.calls[0], student)

    leaves = {name: value.detach().requires_grad_() for name, value in student.items()}

    def backward() -> list[Tensor]:
        hidden = batch.hidden.detach().requires_grad_()
        with torch.enable_grad():
            made = chain.run_block(0, hidden, batch.calls[0], leaves)
        return list(torch.autograd.grad(made, [hidden, *leaves.values()], pull, allow_unused=True))

    forward_seconds, backward_seconds = _seconds(forward, clock), _seconds(backward, clock)
    head_seconds = _seconds(
        lambda: head_loss(chain, batch, output + 1e-3 * pull, output, loss="kl", normalizer=float(tokens)),
        clock,
    )
    largest = max(refs, key=lambda ref: ref.parameter.numel()).matrix()
    rows = torch.randn(tokens, largest.shape[1], dtype=dtype, device=largest.device)
    matmul_seconds = _seconds(lambda: rows @ largest.T, clock)
    gradients = {ref.param_name: torch.randn_like(ref.parameter, dtype=torch.float32) for ref in refs}
    soft_seconds = _seconds(lambda: solver.student(0), clock)
    step = StepOptions(
        optimizer=options.optimizer,
        lr=0.01,
        betas=options.betas,
        kl_weight=1.0,
        grad_clamp=options.grad_clamp,
        step=2,
        moment_bound=moment_bound(options),
    )

    def update() -> None:
        first_not_finite(refs, gradients)
        for matrix, state in zip(take_matrices(refs, dict(gradients)), states[0], strict=True):
            gap, size = state.gap()
            projected_step_(
                state.frac,
                state.anchor,
                matrix,
                gap,
                group_size=size,
                options=step,
                momentum=state.momentum,
                second_moment=state.second_moment,
            )

    step_seconds = _seconds(update, clock)
    buffer = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8)
    target = torch.empty_like(buffer, device=largest.device)
    copy_seconds = _seconds(lambda: target.copy_(buffer), clock)
    return Rates(
        machine=machine_name(),
        dtype=options.compute_dtype,
        state=state_layout(options.state, options.optimizer, config.grid.bits).name,
        hidden=shape.hidden,
        weights=weights,
        tokens=tokens,
        forward=tokens * (2 * active + ATTENTION_FORWARD / 2 * scores) / forward_seconds,
        backward=tokens * (6 * active + ATTENTION_BACKWARD * scores) / backward_seconds,
        matmul=2.0 * tokens * largest.numel() / matmul_seconds,
        head=tokens * HEAD_FLOP * float(chain.head.weight.numel()) / head_seconds,
        soft=soft_seconds / weights,
        step=step_seconds / weights,
        copy=COPY_BYTES / copy_seconds,
    )
