# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every supported architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant.config import GridConfig
from discquant.grids import AffineGrid, Grid, UniformGrid, place_grid
from discquant.solver.chain import Chain
from discquant.solver.state import WeightState

COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# What is special about each is named in its id.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-six-blocks": ("Llama", {"num_hidden_layers": 6, "hidden_size": 16, "intermediate_size": 32}),
    "llama-tied-bias": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2-bias": ("Qwen2", {}),
    "qwen3-qk-norm": ("Qwen3", {"head_dim": 8}),
    "mistral-sliding": ("Mistral", {"sliding_window": 5, "head_dim": 8}),
    "phi3-fused": ("Phi3", {}),
    "gemma-tied": ("Gemma", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2-softcap": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 5}),
    "gemma3-two-ropes": ("Gemma3Text", {"head_dim": 8, "sliding_window": 5}),
    "cohere-logit-scale": ("Cohere", {"logit_scale": 0.5}),
    "granite-scaling": (
        "Granite",
        {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.7},
    ),
}


def build(architecture: str, dtype: torch.dtype = torch.float64) -> Any:
    """Return a random model with weights large enough for logits that differ."""
    import transformers

    family, extra = ARCHITECTURES[architecture]
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **extra})
    model_class = {"Gemma3Text": "Gemma3ForCausalLM"}.get(family, f"{family}ForCausalLM")
    torch.manual_seed(5)
    model = getattr(transformers, model_class)(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """Return `build`."""
    return build


@pytest.fixture
def token_ids() -> torch.Tensor:
    """Return token ids, [4, 12]."""
    return torch.randint(3, 61, (4, 12), generator=torch.Generator().manual_seed(3))


def _grid_of(weight: Tensor, kind: str, sym: bool) -> Grid:
    """A grid on a weight: uniform, with a minimum (levels in float32 or bfloat16), or of groups that a vector names."""
    if kind == "act-order":
        g_idx = torch.arange(weight.shape[1], device=weight.device) // 16
        g_idx = g_idx[
            torch.randperm(g_idx.numel(), generator=torch.Generator().manual_seed(3)).to(g_idx.device)
        ]
        grid = place_grid(weight[:, torch.argsort(g_idx, stable=True)], GridConfig(3, 16, sym))
        assert isinstance(grid, UniformGrid)
        return dataclasses.replace(grid, g_idx=g_idx)
    grid = place_grid(weight, GridConfig(3, 16, sym))
    if kind == "uniform":
        return grid
    assert grid.zero_point is not None
    minimum = -(grid.zero_point * grid.scale)
    return AffineGrid(3, 16, grid.scale, minimum, torch.float32 if kind == "affine" else torch.bfloat16)


def _states(
    chain: Chain, state: str = "fp32", sym: bool = False, kind: str = "uniform"
) -> list[list[WeightState]]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for refs in chain.weights:
        made.append([])
        for ref in refs:
            weight = ref.matrix()
            grid = _grid_of(weight, kind, sym)
            start = torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight)
            made[-1].append(
                WeightState(
                    ref.name, grid, weight, start, state=state, optimizer="momentum", wide=weight.dtype
                )  # type: ignore[arg-type]
            )
    return made


@pytest.fixture
def make_states() -> Callable[..., list[list[WeightState]]]:
    """Return `_states`: a chain's weights on grids of some kind, at random places."""
    return _states


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand-ins for CUDA's streams; what runs in one is under way until somebody waits for the stream or an event."""
    made: list[Any] = []

    class Stream:
        def __init__(self, *device: Any) -> None:
            self.under_way = 0
            made.append(self)

        def __enter__(self) -> None:
            self.under_way += 1

        def __exit__(self, *error: Any) -> None:
            pass

        def wait_event(self, event: Any) -> None:
            pass

        def synchronize(self) -> None:
            self.under_way = 0

    class Event:
        def record(self, stream: Stream) -> None:
            self.synchronize = stream.synchronize

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return made
