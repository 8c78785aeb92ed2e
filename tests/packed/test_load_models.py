# SPDX-License-Identifier: Apache-2.0
"""discquant.load and from_pretrained of models that do more with their layers than call them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import discquant
from discquant import _extension
from discquant.formats import QuantizedLinear, export_compressed_tensors
from discquant.integrations.transformers_quantizer import register, unregister
from discquant.modules import PackedLinear, load_packed

pytestmark = pytest.mark.skipif(not _extension.available(), reason="discquant._C is not built")
IDS = torch.arange(40).reshape(2, 20) * 7 % 96
Load = Callable[[Path], Any]


@pytest.fixture(params=["load", "from_pretrained"])
def load(request: pytest.FixtureRequest) -> Iterator[Load]:
    """Both roads onto packed layers."""
    if request.param == "load":
        yield discquant.load
        return
    from transformers import AutoModelForCausalLM

    register()
    yield AutoModelForCausalLM.from_pretrained
    unregister()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


def export(folder: Path, model: Any, coded: Callable[..., QuantizedLinear], **bits: int) -> Path:
    """The model with 4-bit linear layers, or as many bits as `bits` says of their last names; not the head."""
    model.eval().save_pretrained(folder / "source")
    layers = [
        coded(name, module.weight, bits.get(name.rpartition(".")[2], 4))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (name != "lm_head" or "lm_head" in bits)
    ]
    export_compressed_tensors(folder / "source", folder / "out", layers)
    return folder / "out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mamba_reads_weights_itself(
    tmp_path: Path, coded: Callable[..., QuantizedLinear], load: Load, dtype: torch.dtype
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=8, time_step_rank=64
    )
    out = export(tmp_path, transformers.MambaForCausalLM(config).to(dtype), coded)
    model = load(out)
    assert type(model.backbone.layers[0].mixer.dt_proj) is PackedLinear
    assert model.packed_report.layers == 8
    assert torch.equal(logits(model), logits(discquant.load(out, mode="plain")))
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert model.generate(IDS[:1], **settings).shape == (1, 23)


def test_layers_with_a_forward_of_their_own_stay_plain(
    tmp_path: Path, coded: Callable[..., QuantizedLinear], load: Load
) -> None:
    """FalconLinear rounds the product before it adds the bias."""
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bias=True
    )
    falcon = transformers.FalconForCausalLM(config).bfloat16()
    with torch.no_grad():
        for name, parameter in falcon.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    out = export(tmp_path, falcon, coded)
    model = load(out)
    assert model.packed_report.layers == 0
    assert torch.equal(logits(model), logits(discquant.load(out, mode="plain")))


def llama(tied: bool) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_head_is_not_tied(
    tmp_path: Path, coded: Callable[..., QuantizedLinear], load: Load, bits: int
) -> None:
    """Whatever config.json says: the file holds the head's own weight, packed or, at 8 bits, plain."""
    out = export(tmp_path, llama(tied=False), coded, lm_head=bits)
    config = (out / "config.json").read_text()
    assert '"tie_word_embeddings": false' in config
    (out / "config.json").write_text(
        config.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    model = load(out)
    assert (type(model.lm_head) is PackedLinear) == (bits == 4)
    assert torch.equal(logits(model), logits(discquant.load(out, mode="plain")))


@pytest.mark.parametrize("every", [0, 1])
def test_rwkv_which_writes_into_its_weights_says_so(
    coded: Callable[..., QuantizedLinear], every: int
) -> None:
    """It halves weights of every sixth layer in place, which codes cannot follow."""
    transformers = pytest.importorskip("transformers")
    config = transformers.RwkvConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, context_length=64, rescale_every=every
    )
    model = transformers.RwkvForCausalLM(config).eval()
    layers = [coded(name, m.weight) for name, m in model.rwkv.named_modules() if isinstance(m, nn.Linear)]
    load_packed(model.rwkv, layers)
    if every == 0:
        assert logits(model).isfinite().all()
        return
    with pytest.raises(NotImplementedError, match=r"weight must be only read, got div_ on it.*mode='plain'"):
        logits(model)
