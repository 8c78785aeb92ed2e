# SPDX-License-Identifier: Apache-2.0
"""Refine of files that hold several GGUF types, as llama.cpp's mixes do: every layer on its own grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from discquant.config import DataConfig, GridConfig, GridKind, QuantizeConfig, SolverConfig, StateFormat
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.formats.gguf import FORMAT
from discquant.formats.gguf_file import GgufFile
from discquant.formats.gguf_types import TYPES
from discquant.grids import place_grid
from discquant.run.refine import RefinePipeline

pytest.importorskip("gguf")
# By the last part of a module's name. Rows of 288 columns have no block of 256: a fallback is among them.
MIX: dict[str, GridKind] = {
    "q_proj": "q2_k", "k_proj": "iq4_xs", "v_proj": "q6_k", "o_proj": "q5_k", "gate_proj": "q4_k", "up_proj": "q3_k",
    "down_proj": "q6_k",
}  # fmt: skip


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A model of rows of 256, its file of nearest codes on a mix of types, and text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("mixed")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=288, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    ids = torch.randint(3, 97, (40, 32), generator=torch.Generator().manual_seed(0))
    save_file({"calibration": ids.short()}, folder / "tokens.safetensors")
    source = Checkpoint(folder / "model")
    layers = []
    for key in source.tensors:
        module = key.removesuffix(".weight")
        kind = MIX.get(module.rpartition(".")[2])
        if kind is not None:
            weight = source.read(key).float()
            grid = place_grid(weight, GridConfig.of_kind(kind))
            layers.append(CodedLayer(module, grid.nearest(weight), grid))
    FORMAT.write(source, folder / "gguf", layers, prove_from=lambda: layers)
    return folder / "model", folder / "gguf" / "model.gguf", f"{folder / 'tokens.safetensors'}:calibration"


@pytest.mark.parametrize("state", ["fp32", "u8"])
def test_only_codes_of_a_mixed_file_change(
    mixed: tuple[Path, Path, str], tmp_path: Path, state: StateFormat
) -> None:
    model, file, dataset = mixed
    config = QuantizeConfig(
        solver=SolverConfig(iters=12, batch_size=4, micro_batch=4, warmup=2, state=state),
        data=DataConfig(dataset, 24, 32), gptq_samples=8, baselines=(),
    )  # fmt: skip
    summary = RefinePipeline(file, tmp_path / "out", model, config).execute()
    found, diff = summary["refine"], summary["byte_diff"]
    assert found["improved"] and found["kl_after"] < found["kl_before"]
    assert diff["outside"] == 0 and set(diff["layers"]) == {layer.name for layer in FORMAT.read(file)}
    # Byte by byte, by the layout alone.
    refined = tmp_path / "out" / "gguf" / "model.gguf"
    before, after = GgufFile(file), GgufFile(refined)
    assert {before.tensors[name].type for name in before.tensors} >= {
        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS",
    }  # fmt: skip
    changed = torch.from_numpy(np.fromfile(file, np.uint8) != np.fromfile(refined, np.uint8))
    for tensor in before.tensors.values():
        assert after.tensors[tensor.name] == tensor
        if (kind := TYPES.get(tensor.type)) is not None:
            blocks = changed[tensor.start : tensor.start + tensor.num_bytes].view(-1, kind.size)
            for first, last in kind.codes:
                blocks[:, first:last] = False
    assert not bool(changed.any())
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.splitlines()[2].startswith("DiscQuant on the file's own grids: ")
    assert all(f"{kind} (1 layer)" in report for kind in ("Q2_K", "Q3_K", "Q4_K", "IQ4_XS"))
