# SPDX-License-Identifier: Apache-2.0
"""discquant.load and generate on packed layers: the rounded model's bits and text, and no full-precision copy."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import discquant
from discquant import _extension
from discquant.api import loading as loading_api
from discquant.calibration import arithmetic
from discquant.errors import CheckpointError, ConfigError, ExtensionError, MissingModelError
from discquant.formats import QuantizedLinear, export_compressed_tensors, load_quantized
from discquant.formats import load_packed as loading
from discquant.generation import stream
from discquant.modules import FusedProjection, PackedLinear

pytestmark = pytest.mark.skipif(not _extension.available(), reason="discquant._C is not built")


def coded(name: str, weight: Tensor, bits: int, group: int, symmetric: bool) -> QuantizedLinear:
    """Round to nearest on an abs-max grid."""
    n, k = weight.shape
    size = k if group == -1 else group
    groups = -(-k // size)
    padded = nn.functional.pad(weight.float(), (0, groups * size - k)).view(n, groups, size)
    scale = (padded.abs().amax(-1) / (2 ** (bits - 1) - 0.5)).clamp(min=1e-4).bfloat16()
    zero = None if symmetric else torch.full((n, groups), 2 ** (bits - 1) - 1, dtype=torch.uint8)
    centre = 2 ** (bits - 1) - (0 if symmetric else 1)
    q = ((padded / scale.float()[..., None]).round() + centre).clamp(0, 2**bits - 1)
    return QuantizedLinear(name, q.to(torch.uint8).view(n, -1)[:, :k].contiguous(), scale, zero, bits, group)


def export(
    folder: Path, dtype: torch.dtype, bits: dict[str, int], *, tied: bool = False, group: int = 32
) -> Path:
    """A random Llama with `bits` per projection (3 where it is not named), exported."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, attention_bias=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    model.save_pretrained(folder / "source")
    layers = [
        coded(name, module.weight.detach(), bits.get(name.rpartition(".")[2], 3), group, symmetric=True)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    export_compressed_tensors(folder / "source", folder / "out", layers)
    return folder / "out"


IDS = torch.arange(40).reshape(2, 20) * 7 % 96


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_gives_the_rounded_models_bits(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    """By default every logit is that of plain dequantised weights; `auto` fuses and stays within its bound."""
    out = export(tmp_path, dtype, {}, tied=tied)
    plain, packed, fast = (discquant.load(out, mode=mode) for mode in ("plain", "exact", "auto"))
    assert not any(isinstance(m, PackedLinear) for m in plain.modules())
    assert packed.packed_report.layers == fast.packed_report.layers == 14
    assert (packed.packed_report.fused, fast.packed_report.fused) == (0, 4)
    assert {name for name, m in packed.named_modules() if type(m) is nn.Linear} == {"lm_head"}
    expected = logits(plain)
    assert torch.equal(expected, logits(load_quantized(out)))
    assert torch.equal(expected, logits(packed))
    # 14 layers of 15-bit activations; bfloat16 adds its own rounding of every intermediate.
    eps = 2.0**-15 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (logits(fast).float() - expected.float()).abs().max() <= 14 * eps * expected.float().abs().max()
    if tied:
        assert packed.lm_head.weight is packed.model.embed_tokens.weight


def test_layers_that_no_kernel_covers_stay_plain(tmp_path: Path) -> None:
    """8-bit layers, and groups that are no kernel's, become ordinary weights; the logits do not notice."""
    out = export(tmp_path, torch.float32, {"down_proj": 8, "k_proj": 2, "up_proj": 4})
    packed, plain = discquant.load(out, mode="auto"), discquant.load(out, mode="plain")
    assert packed.packed_report.layers == 10 and packed.packed_report.fused == 0
    assert packed.packed_report.plain == 4
    kinds = {name.rpartition(".")[2]: type(module) for name, module in packed.named_modules()}
    assert kinds["down_proj"] is kinds["k_proj"] is nn.Linear
    assert kinds["gate_proj"] is kinds["up_proj"] is PackedLinear
    assert torch.equal(logits(discquant.load(out)), logits(plain))
    ragged = export(tmp_path / "b", torch.float32, {}, group=16)
    model = discquant.load(ragged)
    assert model.packed_report.layers == 0
    assert torch.equal(logits(model), logits(discquant.load(ragged, mode="plain")))


def live_bytes() -> int:
    """Bytes of all CPU tensors that Python can reach."""
    gc.collect()
    sizes: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type == "cpu":
            sizes[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(sizes.values())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "auto"])
def test_loading_stays_near_the_packed_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    """While layers come in, live tensors are the untouched ones, the packed ones and one block's codes."""
    out = export(tmp_path, torch.float32, {})
    before = live_bytes()
    seen: list[int] = []
    packable = loading.packable

    def watched(layer: Any) -> Any:
        seen.append(live_bytes() - before)
        return packable(layer)

    monkeypatch.setattr(loading, "packable", watched)
    model = discquant.load(out, mode=mode)
    report = model.packed_report
    weights = [m for m in model.modules() if isinstance(m, PackedLinear)]
    count = sum(m.out_features * m.in_features for m in weights)
    # Rows are padded to 64 and columns to 128 in this narrow model, which has 3 + 0.5 bits a weight before that.
    padded = sum(-(-m.out_features // 64) * 64 * (-(-m.in_features // 128) * 128) for m in weights)
    assert padded * 3 // 8 <= report.packed_bytes <= padded * 3.5 / 8 + count / 32 * 2
    untouched = sum(p.numel() * p.element_size() for p in model.parameters())
    codes = 3 * 160 * 64  # gate, up and down wait for each other as bytes
    assert len(seen) == 14
    assert max(seen) <= untouched + report.packed_bytes + 3 * codes < untouched + 4 * count
    kept = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert live_bytes() - before <= kept + 4096


def test_bundled_model_writes_the_same_text(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """3-bit codes in the exact mode: the greedy text of the solver's rounded model, problem after problem."""
    from transformers import AutoTokenizer

    from discquant.config import GridConfig, QuantizeConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    source = discquant.load(tiny_llama_dir)
    config = QuantizeConfig(grid=GridConfig(3, 64), method="rtn")
    result = discquant.quantize(source, tokenizer, config, calibration=torch.randint(3, 1000, (2, 16)))
    export_compressed_tensors(tiny_llama_dir, tmp_path / "out", result.layers())
    rounded: Any = result.apply()
    packed: Any = discquant.load(tmp_path / "out")
    assert packed.packed_report.layers == 28
    text = [arithmetic.prompt(problem) for problem in arithmetic.problems("heldout", 6, seed=3)]
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    for prompt in text:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        mask = torch.ones_like(ids)
        expected = rounded.generate(ids, attention_mask=mask, **settings)
        assert torch.equal(packed.generate(ids, attention_mask=mask, **settings), expected)
        with torch.no_grad():
            assert torch.equal(packed(expected).logits, rounded(expected).logits)
    shown = stream(
        tmp_path / "out", text[0], max_new_tokens=8, temperature=0.0, seed=0, mode="exact", device="cpu"
    )
    ids = tokenizer(text[0], return_tensors="pt")["input_ids"]
    expected = rounded.generate(ids, attention_mask=torch.ones_like(ids), **settings | {"max_new_tokens": 8})
    assert shown["text"] == tokenizer.decode(expected[0, ids.shape[1] :])


def test_generate_reports_speed_and_size(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = stream(
        tiny_llama_dir, "Ada has 3 apples.", max_new_tokens=3, temperature=0.0, seed=0, device="cpu"
    )
    assert shown["packed_bytes"] == 0 and shown["tokens"] >= 1
    assert "tokens/s (plain weights, cpu)" in capsys.readouterr().err


def test_generate_streams_one_text_whatever_the_model_prefers(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """A model's own settings may name beams and several answers."""
    folder = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    options: dict[str, Any] = {"max_new_tokens": 4, "seed": 0, "device": "cpu"}
    expected = stream(folder, "Ada has 3 apples.", temperature=0.0, **options)["text"]
    path.write_text(json.dumps({**settings, "num_beams": 4, "num_return_sequences": 2}))
    assert stream(folder, "Ada has 3 apples.", temperature=0.0, **options)["text"] == expected
    assert stream(folder, "Ada has 3 apples.", temperature=0.7, **options)["tokens"] >= 1


def test_threads_that_build_models_meanwhile_keep_their_weights() -> None:
    entered, done = threading.Event(), threading.Event()

    def build() -> nn.Module:
        with loading._parameters_on_meta():
            entered.set()
            assert done.wait(60)
            return nn.Linear(4, 4)

    register = nn.Module.register_parameter
    with ThreadPoolExecutor(1) as pool:
        hollow = pool.submit(build)
        assert entered.wait(60)
        solid = nn.Linear(4, 4)
        done.set()
        assert hollow.result().weight.is_meta and hollow.result().bias.is_meta
    assert not solid.weight.is_meta
    assert not nn.Linear(4, 4).weight.is_meta
    assert nn.Module.register_parameter is register
    assert not nn.modules.module._global_parameter_registration_hooks


def test_threads_load_at_once(tmp_path: Path) -> None:
    """Nothing of the process is left as another thread had it for a while: not even the default dtype."""
    out = export(tmp_path, torch.bfloat16, {})
    expected = logits(discquant.load(out))
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda mode: discquant.load(out, mode=mode), ["exact", "plain"] * 4))
    assert all(torch.equal(logits(model), expected) for model in models)
    assert torch.get_default_dtype() == torch.float32
    assert not nn.Linear(4, 4).weight.is_meta


def test_a_dtype_that_kernels_lack_is_plain(tmp_path: Path) -> None:
    out = export(tmp_path, torch.float32, {})
    model, plain = (discquant.load(out, torch.float64, mode=mode) for mode in ("exact", "plain"))
    assert logits(model).dtype == torch.float64 and torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize(
    "device", ["cuda", "cuda:9", "nonsense", "meta", torch.device("meta"), "mps", -1, 1.5]
)
def test_a_device_that_is_not_there_is_named(tmp_path: Path, device: Any) -> None:
    if torch.cuda.is_available() and device == "cuda":
        pytest.skip("it is there")
    with pytest.raises(ConfigError, match=f"device.*{device}") as caught:
        discquant.load(tmp_path, device=device)
    assert "\n" not in str(caught.value)


def test_modes_of_the_cpu_are_refused_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read, with the modes that there are."""
    monkeypatch.setattr("discquant.api.loading._device_there", lambda device: torch.device("cuda", 0))
    for mode in ("a15", "a8", "fp32"):
        with pytest.raises(
            ConfigError,
            match=rf"load: mode on cuda:0 must be one of auto, exact or plain, got '{mode}'",
        ):
            discquant.load(tmp_path, mode=mode, device="cuda")
    with pytest.raises(MissingModelError):
        discquant.load(tmp_path, mode="exact", device="cuda")


def test_fused_siblings_share_one_buffer(tmp_path: Path) -> None:
    model = discquant.load(export(tmp_path, torch.float32, {}), mode="auto")
    attention = model.model.layers[0].self_attn
    assert all(isinstance(m, FusedProjection) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
    assert attention.q_proj.packed.out_features == 64 + 32 + 32
    assert attention.k_proj.packed is None


def test_without_the_extension_weights_are_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = export(tmp_path, torch.float32, {})
    expected = logits(discquant.load(out))
    monkeypatch.setattr(_extension, "available", lambda: False)
    model = discquant.load(out)
    assert not hasattr(model, "packed_report")
    assert torch.equal(logits(model), expected)
    monkeypatch.setattr(_extension, "_attempt", lambda: (None, "ImportError: not built"))
    for mode in ("a15", "a8", "fp32"):
        with pytest.raises(ExtensionError, match=r"not usable .*not built"):
            discquant.load(out, mode=mode)


def test_rejects_bad_input(tmp_path: Path) -> None:
    out = export(tmp_path, torch.float32, {})
    with pytest.raises(ConfigError, match=r"load: mode must be one of .*, got 'int8'"):
        discquant.load(out, mode="int8")  # type: ignore[arg-type]
    for temperature in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="generate: temperature must be finite and at least 0"):
            stream(out, "x", max_new_tokens=1, temperature=temperature, seed=0, device="cpu")
    packed = discquant.load(out)
    for part in (packed, packed.model):
        with pytest.raises(
            NotImplementedError, match=r"save_pretrained: a model on packed layers .* mode='plain'"
        ):
            part.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="generate: device must be cpu"):
            stream(out, "x", max_new_tokens=1, temperature=0.0, seed=0, device="cuda")
    config = (out / "config.json").read_text()
    assert '"intermediate_size": 160' in config
    (out / "config.json").write_text(config.replace('"intermediate_size": 160', '"intermediate_size": 192'))
    with pytest.raises(CheckpointError, match=r"has the shape \[160, 64\], config.json makes it \[192, 64\]"):
        discquant.load(out)
    (out / "config.json").write_text(config)
    file = out / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError):
        discquant.load(out)


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_any_c_library_will_do(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """Freed memory is given back where it can be, and nothing happens elsewhere."""
    loading_api.give_back()

    def none(name: None) -> Any:
        raise error("malloc_trim")

    monkeypatch.setattr("ctypes.CDLL", none)
    loading_api.give_back()
