# SPDX-License-Identifier: Apache-2.0
"""The state of a GPU reaches the host on a stream of its own, piece by piece, as it was at its mark; simulated."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.formats.lazy import settle
from discquant.run import checkpoint, readback
from discquant.run.checkpoint import Checkpointer, load_checkpoint
from discquant.run.readback import Readback
from discquant.solver.chain import DecoderChain
from discquant.solver.engine import Engine
from discquant.solver.solve import Solve, TokenRows, lay_grids

GPU = torch.device("cuda", 0)


class _Stream:
    """Writes down what it is asked for, and makes a copy when it is awaited, no sooner."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pending: list[tuple[Tensor, Tensor]] = []

    def mark(self, device: torch.device) -> str:
        self.log.append("mark")
        return f"event {self.log.count('mark')}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"after {event}")

    def begin(self, target: Tensor, source: Tensor) -> None:
        assert self.log[-1] == "piece" or self.log[-1].startswith("after")
        self.pending.append((target, source))

    def synchronize(self) -> None:
        ((target, source),) = self.pending  # the buffer holds one piece
        target.copy_(source)
        self.pending.clear()
        self.log.append("piece")


@contextlib.contextmanager
def _watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Stream]:
    """Within a simulation, whose own stand-ins come back afterwards."""
    stream = _Stream()

    @contextlib.contextmanager
    def entered(given: Any) -> Iterator[None]:
        if given is stream:
            stream.log.append("entered")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", lambda *_: stream)
        patch.setattr(torch.cuda, "stream", entered)
        patch.setattr(readback, "now", stream.mark)
        patch.setattr(readback, "_begin", stream.begin)
        patch.setattr(readback, "PIECE", 64)
        yield stream


def test_piece_by_piece(simulate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of any dtype and length; each piece leaves the buffer before the next one enters it."""
    expected = [
        torch.randint(-128, 128, (7, 45), dtype=torch.int8), torch.randn(3, 11), torch.randn(4, 8).bfloat16(),
        torch.zeros(0, 5), torch.randint(0, 256, (64,), dtype=torch.uint8),
    ]  # fmt: skip
    with simulate(), _watched(monkeypatch) as stream:
        reader = Readback()
        reader.mark(GPU)
        for tensor in expected:
            del stream.log[1:]
            found = reader.read(tensor.to(GPU))
            assert found.device.type == "cpu" and found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
            pieces = -(-tensor.numel() * tensor.element_size() // 64)
            assert stream.log == ["mark", "entered", "after event 1", *["piece"] * pieces]


def test_what_is_on_the_host_is_not_copied() -> None:
    """On a CPU there is neither a stream nor a buffer."""
    tensor, reader = torch.randn(5, 3), Readback()
    reader.mark(torch.device("cpu"))
    assert reader.read(tensor) is tensor
    assert vars(reader) == vars(Readback())


def test_a_checkpoint_of_a_gpu_is_of_its_step(
    simulate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The mark is set where the steps are taken, before the writer begins; what it reads is the state of the step."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 61, (4, 8))

    class Inline:
        """The writer's thread, which the simulation does not reach: its work is done where it is started."""

        def __init__(self, target: Callable[..., None], args: tuple[Any, ...], **_: Any) -> None:
            self.work = lambda: target(*args)

        def start(self) -> None:
            stream.log.append("thread")
            self.work()

        def join(self) -> None: ...

    def solve(device: torch.device) -> Solve:
        options = SolverConfig(
            iters=4, batch_size=2, micro_batch=1, warmup=1, start="ref", state="u8", curvature=0.0
        )
        chain = DecoderChain(model)
        return Solve(
            chain, lay_grids(chain, GridConfig(3, 32)), TokenRows(chain, ids, None, 1),
            QuantizeConfig(solver=options), engine=Engine("resident", device=device),
        )  # fmt: skip

    with simulate():
        settle(model, GPU, stream=False)
        run = solve(GPU)
        with _watched(monkeypatch) as stream:
            inline = types.SimpleNamespace(Thread=Inline, Condition=threading.Condition)
            monkeypatch.setattr(checkpoint, "threading", inline)
            writer = Checkpointer(tmp_path, run)
            run.advance()
            expected = [t.cpu().clone() for b in run.solver.states for s in b for _, t in s.tensors()]
            assert not stream.log
            writer.save()
            writer.wait()
            assert stream.log[:4] == ["mark", "thread", "entered", "after event 1"]
            assert stream.log.count("entered") == len(expected)
            writer._probe(0)
            assert "after event 2" in stream.log
    model.to("cpu")
    again = solve(torch.device("cpu"))
    assert load_checkpoint(tmp_path, again) == 1
    found = [t for b in again.solver.states for s in b for _, t in s.tensors()]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
