# SPDX-License-Identifier: Apache-2.0
"""The Python API: language models in memory, a vision transformer, a convolutional net."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import discquant
from discquant.calibration import Windows
from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import CalibrationError, ConfigError


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


def quick(method: str = "rtn", **options: Any) -> QuantizeConfig:
    solver = SolverConfig(iters=3, batch_size=4, micro_batch=2, warmup=1, curvature_samples=4)
    grid = options.pop("grid", GridConfig(3, 32))
    return QuantizeConfig(grid=grid, method=method, solver=solver, **options)  # type: ignore[arg-type]


def token_ids(rows: int = 8) -> Tensor:
    return torch.randint(3, 61, (rows, 16), generator=torch.Generator().manual_seed(3))


def _codes(result: discquant.Quantized) -> list[Tensor]:
    return [result.codes[name] for name in sorted(result.codes)]


@pytest.mark.parametrize("method", ["rtn", "gptq", "discquant"])
def test_the_model_comes_back_as_it_was(method: str) -> None:
    """Mode of every submodule, what needs grad, also after a refusal; the served weights go into such parameters."""
    model = tiny_llama().train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    module = TinyViT().train()
    module.head.requires_grad_(False)

    def state() -> list[Any]:
        return [
            ([part.training for part in whole.modules()], [p.requires_grad for p in whole.parameters()])
            for whole in (model, module)
        ]

    before = state()
    result = discquant.quantize(model, config=quick(method), calibration=token_ids())
    images = discquant.quantize_module(module, torch.randn(8, 3, 16, 16), quick(method, ignore=()))
    assert state() == before
    with pytest.raises(ConfigError, match="group-size"):
        discquant.quantize(model, config=quick(grid=GridConfig(3, 128)), calibration=token_ids())
    with pytest.raises(RuntimeError):
        discquant.quantize_module(module, torch.randn(8, 5, 16, 16), quick(ignore=()))

    def stop(record: object) -> None:
        raise KeyboardInterrupt

    if method == "discquant":
        with pytest.raises(KeyboardInterrupt):
            discquant.quantize(model, config=quick(method), calibration=token_ids(), on_step=stop)
    assert state() == before
    for found in (result, images):
        applied = found.apply()
        assert all(
            torch.equal(applied.get_submodule(layer.name).weight.flatten(1), layer.dequantize(torch.float32))
            for layer in found.layers()
        )
    assert state() == before
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()


@pytest.mark.parametrize("method", ["gptq", "discquant"])
def test_what_is_set_around_changes_nothing(method: str) -> None:
    module = TinyViT().eval()
    images = torch.randn(8, 3, 16, 16)

    def both() -> list[Tensor]:
        one = discquant.quantize(tiny_llama(), config=quick(method), calibration=token_ids())
        return _codes(one) + _codes(discquant.quantize_module(module, images, quick(method, ignore=())))

    model = tiny_llama()
    expected = both()
    for around in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        with around:
            found = both()
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    with torch.inference_mode():
        result = discquant.quantize(model, config=quick(method), calibration=token_ids())
        found = _codes(discquant.quantize_module(module, images.clone(), quick(method, ignore=())))
        result.apply()
        made = tiny_llama()
    assert all(torch.equal(a, b) for a, b in zip(expected, _codes(result) + found, strict=True))
    with pytest.raises(ValueError, match=r"made outside of torch.inference_mode, got model\.embed_tokens"):
        discquant.quantize(made, config=quick(method), calibration=token_ids())


def test_attentions_projection_is_rounded_and_what_is_not_is_named(caplog: pytest.LogCaptureFixture) -> None:
    module = TinyViT().eval()
    images = torch.randn(64, 3, 16, 16)
    found = {
        method: discquant.quantize_module(module, images, quick(method, ignore=()))
        for method in ("rtn", "gptq", "greedy")
    }
    name = "layer.self_attn.out_proj"
    for method in ("gptq", "greedy"):
        assert not torch.equal(found[method].codes[name], found["rtn"].codes[name])
        assert not found[method].unseen
    (text,) = {record.getMessage() for record in caplog.records}
    assert text.endswith("at full precision stay layer.self_attn.in_proj_weight")

    class Reading(TinyViT):
        def forward(self, images: Tensor) -> Tensor:
            tokens = self.patches(images).flatten(2).transpose(1, 2)
            return self.layer(tokens).mean(dim=1) @ self.head.weight.T

    assert discquant.quantize_module(Reading().eval(), images, quick("gptq", ignore=())).unseen == {"head"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_experts_compute_as_before(dtype: torch.dtype) -> None:
    """In float64 they are looped over meanwhile; the caller's model keeps its own choice."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=16,
    )  # fmt: skip
    model = MixtralForCausalLM(config).to(dtype)
    before = model.config._experts_implementation
    assert before != "eager"
    ids = torch.randint(3, 61, (2, 8))
    options = QuantizeConfig(grid=GridConfig(4, 32), method="rtn")
    discquant.quantize(model, None, options, calibration=ids)
    assert model.config._experts_implementation == before
    with pytest.raises(CalibrationError):
        discquant.quantize(model, None, options, calibration=ids + 61)
    assert model.config._experts_implementation == before


def test_weights_without_memory_are_named() -> None:
    """Before anything else is looked at."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    with torch.device("meta"):
        model, layer = LlamaForCausalLM(config), nn.Linear(64, 64)
    inputs = torch.zeros(4, 64)
    with pytest.raises(ValueError, match=r"in memory, got model\.embed_tokens\.weight on the meta device"):
        discquant.quantize(model, calibration=inputs.long())
    with pytest.raises(ValueError, match=r"quantize_module: .* got weight on the meta device"):
        discquant.quantize_module(layer, inputs)
    layer.weight = nn.Parameter(torch.zeros(64, 64))
    with pytest.raises(ValueError, match="got bias on the meta device"):
        discquant.quantize_module(layer, inputs)


def test_weights_that_are_not_finite_are_named() -> None:
    model, module = tiny_llama(), tiny_cnn()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 3] = torch.nan
        module[0].weight[1, 2, 0, 0] = torch.inf
    for config in (quick(), quick("discquant", data=discquant.DataConfig("self", nsamples=4, seqlen=16))):
        with pytest.raises(
            ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 values .* at \[0, 3\]"
        ):
            discquant.quantize(model, config=config)
    with pytest.raises(ValueError, match=r"0\.weight holds 1 values .* at \[1, 2, 0, 0\]"):
        discquant.quantize_module(module, torch.randn(2, 3, 16, 16), quick(ignore=()))


def test_calibration_is_checked_as_a_file_is() -> None:
    model = tiny_llama()
    model.config.max_position_embeddings = 16
    for given, error, words in (
        (torch.full((8, 16), 61), CalibrationError, "token id 61, and the model's vocabulary has 61"),
        (torch.zeros(0, 16, dtype=torch.int64), CalibrationError, r"no token that counts, \[0, 16\]"),
        (torch.zeros(4, 0, dtype=torch.int64), CalibrationError, r"no token that counts, \[4, 0\]"),
        (torch.full((2, 17), 3), ConfigError, "at most the model's 16 positions, got 17"),
        ([[3, 4]], TypeError, "got list"),
        (torch.rand(2, 16), ValueError, "must be integers"),
        (torch.full((2, 16), -1), ValueError, "at least 0, got -1"),
        (Windows.make(token_ids(), torch.zeros(8, 16, dtype=torch.bool)), CalibrationError, "no token that counts"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            discquant.quantize(model, config=quick(), calibration=given)  # type: ignore[arg-type]


class _Giving(nn.Module):
    def __init__(self, give: Any) -> None:
        super().__init__()
        self.layer, self.give = nn.Linear(32, 8), give

    def forward(self, x: Tensor) -> Any:
        return self.give(self.layer(x))


def test_modules_and_inputs_that_will_not_do_are_told() -> None:
    from torch.nn.utils.parametrizations import weight_norm

    layer, x = nn.Linear(32, 8), torch.randn(4, 32)
    for module, inputs, error, words in (
        ("model", x, TypeError, "module must be of type = nn.Module .*, got str"),
        (nn.ReLU(), x, ValueError, "ReLU has no parameters"),
        (nn.Embedding(4, 4), torch.zeros(2, 3, dtype=torch.int64), ValueError, "no linear layer left"),
        (layer, [x], TypeError, "inputs must be of type = Tensor, got list"),
        (layer, torch.zeros(0, 32), ValueError, r"at least one, got \[0, 32\]"),
        (layer, torch.tensor(1.0), ValueError, r"at least one, got \[\]"),
        (_Giving(lambda y: {"logits": y}), x, NotImplementedError, "begins with one, got dict"),
        (_Giving(lambda y: ()), x, NotImplementedError, "begins with one, got tuple"),
        (_Giving(lambda y: y.sum(dim=-1)), x, ValueError, r"floating \[1, ..., classes\] .*, got torch.float32 \[1\]"),
        (_Giving(lambda y: y.argmax(-1, keepdim=True)), x, ValueError, "got torch.int64"),
        (nn.Sequential(weight_norm(layer)), x, NotImplementedError, r"^Chain: 0\.weight .*remove_parametrizations"),
    ):  # fmt: skip
        for method in ("rtn", "discquant"):
            with pytest.raises(error, match=words):
                discquant.quantize_module(module, inputs, quick(method, ignore=()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be of type = QuantizeConfig, got dict"):
        discquant.quantize_module(nn.Linear(32, 8), x, {"bits": 3})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Identity has no parameters"):
        discquant.quantize(nn.Identity(), calibration=token_ids())


def test_models_of_another_build_are_refused_truly(caplog: pytest.LogCaptureFixture) -> None:
    """GPT-2's layers and encoder-decoders, by what they are."""
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
    from transformers.pytorch_utils import Conv1D

    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
        )
    )
    with pytest.raises(
        NotImplementedError, match=r"transformer\.h\.0\.attn\.c_attn \(4 .*pytorch_utils\.Conv1D.*nn\.Linear"
    ):
        discquant.quantize(gpt2, config=quick(), calibration=token_ids())
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    )
    with pytest.raises(NotImplementedError, match="type t5 is an encoder-decoder"):
        discquant.quantize(t5, config=quick(), calibration=token_ids())
    x = torch.randn(4, 32)
    with pytest.raises(NotImplementedError, match=r"Conv1D"):
        discquant.quantize_module(nn.Sequential(Conv1D(8, 32)), x, quick(ignore=()))
    mixed = nn.Sequential(Conv1D(32, 32), nn.ReLU(), nn.Linear(32, 8))
    assert list(discquant.quantize_module(mixed, x, quick(ignore=())).codes) == ["2"]
    assert "at full precision stay 0.weight" in caplog.text


def test_names_are_no_string() -> None:
    for field in ("ignore", "baselines"):
        for wrong in ("lm_head", ("rtn", 1), "", None):
            with pytest.raises(ValueError, match=f"config: {field} must be a tuple of names"):
                QuantizeConfig(**{field: wrong})  # type: ignore[arg-type]
