# SPDX-License-Identifier: Apache-2.0
"""The Python API: language models in memory, a vision transformer, a convolutional net."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import discquant
from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import ConfigError


class TinyViT(nn.Module):
    """Patches, one transformer layer, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.layer(tokens).mean(dim=1))


def tiny_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(784, 10),
    )


def _kl(original: Tensor, other: Tensor) -> float:
    log_p, log_q = original.log_softmax(-1), other.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def _check_module(build: object) -> None:
    torch.manual_seed(1)
    module = build().eval()  # type: ignore[operator]
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    # Smooth, like photographs: on white noise gradients have full rank, and no rounding beats nearest there.
    images, held = (
        nn.functional.interpolate(torch.randn(count, 3, 4, 4), size=16, mode="bilinear")
        for count in (256, 64)
    )
    solver = SolverConfig(iters=64, batch_size=64, micro_batch=32, warmup=4)
    found = {}
    with torch.no_grad():
        original = module(held)
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    for method in ("rtn", "discquant"):
        config = QuantizeConfig(grid=GridConfig(3, 32), method=method, solver=solver, ignore=())  # type: ignore[arg-type]
        result = discquant.quantize_module(module, images, config)
        with torch.no_grad():
            found[method] = _kl(original, result.apply()(held))
        module.load_state_dict(kept)
    assert found["discquant"] < 0.9 * found["rtn"], found


def test_vision_transformer() -> None:
    _check_module(TinyViT)


def test_convolutional_net() -> None:
    _check_module(tiny_cnn)


def tiny_llama(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).to(dtype).eval()  # fmt: skip


def test_language_model_in_memory() -> None:
    model = tiny_llama()
    ids = torch.randint(3, 61, (8, 16))
    config = QuantizeConfig(
        grid=GridConfig(4, 32), solver=SolverConfig(iters=6, batch_size=4, micro_batch=2, warmup=2)
    )
    steps: list[int] = []
    result = discquant.quantize(
        model, config=config, calibration=ids, on_step=lambda record: steps.append(record.step)
    )
    assert steps == [1, 2, 3, 4, 5, 6]
    layers = list(result.layers())
    assert len(layers) == 14
    applied = result.apply()
    for layer in layers:
        assert torch.equal(applied.get_submodule(layer.name).weight, layer.dequantize(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_models_dtype_is_the_compute_dtype(dtype: torch.dtype) -> None:
    """Also where the configuration, which says float32 by default, names another."""
    config = QuantizeConfig(
        grid=GridConfig(4, 32), solver=SolverConfig(iters=3, batch_size=4, micro_batch=2, warmup=1)
    )
    ids = torch.randint(3, 61, (8, 16), generator=torch.Generator().manual_seed(3))
    result = discquant.quantize(tiny_llama(dtype), config=config, calibration=ids)
    assert result.served == dtype and len(result.records) == 3
    applied = result.apply()
    assert all(parameter.dtype == dtype for parameter in applied.parameters())
    module = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)).to(dtype)
    inputs = torch.randn(16, 32, generator=torch.Generator().manual_seed(4)).to(dtype)
    assert len(discquant.quantize_module(module, inputs, config).records) == 3


def test_float16_is_refused_by_the_solver_alone() -> None:
    ids = torch.randint(3, 61, (8, 16), generator=torch.Generator().manual_seed(3))
    with pytest.raises(ConfigError, match=r"one of float32, bfloat16, float64, got a model in float16"):
        discquant.quantize(tiny_llama(torch.float16), calibration=ids)
    config = QuantizeConfig(grid=GridConfig(4, 32), method="gptq")
    assert (
        discquant.quantize(tiny_llama(torch.float16), config=config, calibration=ids).served == torch.float16
    )


def test_quantize_from_the_models_own_samples() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            bos_token_id=1,
        )
    ).eval()  # fmt: skip
    config = QuantizeConfig(
        grid=GridConfig(4, 32), method="gptq", data=discquant.DataConfig("self", nsamples=4, seqlen=16)
    )
    assert len(discquant.quantize(model, config=config).codes) == 7
