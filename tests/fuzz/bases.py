# SPDX-License-Identifier: Apache-2.0
"""Small valid files of every format and layout, for the harness to damage: ours, and as other tools leave them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from discquant.config import GRID_KINDS, GridConfig
from discquant.errors import UnrepresentableError, UserError
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer, Format
from discquant.grids import place_grid

WIDTHS, WIDE, VOCABULARY = (64, 256), 256, 40  # the second width for grids whose blocks have 256 columns
# Every layout that a format has: a format's cases take those that it can hold in turn.
GRIDS = (
    *(GridConfig(bits, 32, sym) for bits in (4, 3, 2, 8) for sym in (True, False)),
    *(GridConfig.of_kind(kind) for kind in GRID_KINDS),
)
# Of all layers but the last of a block, and of that.
MIXED = (
    *(
        (GridConfig(4, 32, sym), GridConfig(bits, size, sym))
        for sym in (True, False)
        for bits, size in ((8, 32), (4, 64))
    ),
    (GridConfig(3, 32), GridConfig(4, 32)),
    (GridConfig.of_kind("q4_k"), GridConfig.of_kind("q6_k")),
    (GridConfig.of_kind("q4_0"), GridConfig.of_kind("q5_1")),
)


def source_model(folder: Path, hidden: int) -> Path:
    """A Llama of one block as plain files: enough for every writer, without building a model."""
    generator = torch.Generator().manual_seed(7)

    def tensor(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.05).bfloat16()

    block = "model.layers.0"
    tensors = {
        "model.embed_tokens.weight": tensor(VOCABULARY, hidden),
        "lm_head.weight": tensor(VOCABULARY, hidden),
        "model.norm.weight": tensor(hidden),
        f"{block}.input_layernorm.weight": tensor(hidden),
        f"{block}.post_attention_layernorm.weight": tensor(hidden),
        **{f"{block}.self_attn.{n}_proj.weight": tensor(hidden, hidden) for n in "qkvo"},
        **{f"{block}.mlp.{n}_proj.weight": tensor(WIDE, hidden) for n in ("gate", "up")},
        f"{block}.mlp.down_proj.weight": tensor(hidden, WIDE),
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "head_dim": hidden // 4,
        "intermediate_size": WIDE, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64,
        "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    _tokenizer(folder)
    return folder


def _tokenizer(folder: Path) -> None:
    """A byte-pair tokenizer of the right size, because some formats carry one."""
    letters = [chr(code) for code in range(97, 97 + VOCABULARY - 3)]
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
                "added_tokens": [
                    {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                     "normalized": False, "special": True} for i, t in enumerate(("<unk>", "<s>", "</s>"))
                ],
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                  "use_regex": True},
                "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True,
                                                    "trim_offsets": True, "use_regex": True},
                "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                          "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                          "merges": []},
            }
        )
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )


def base_files(chosen: Format, folder: Path) -> list[Path]:
    """Small valid files of a format, one of each grid that it can hold, and of each mix of two."""
    found = []
    for index, (grid, last) in enumerate([*((grid, grid) for grid in GRIDS), *MIXED]):
        hidden = next((w for w in WIDTHS if _fits(chosen, grid, w) and _fits(chosen, last, w)), None)
        if hidden is None:
            continue
        # Some refuse only the values, a scale that the served dtype does not have, and some to state a mix.
        with suppress(UnrepresentableError):
            found.append(_base(chosen, grid, last, hidden, folder, f"{chosen.name}_{index}"))
    others = {"gptq": _old, "awq": _old_awq, "compressed-tensors": _with_activations}
    if chosen.name in others:
        made = [shutil.copytree(base, base.with_name(f"{base.name}_foreign")) for base in found]
        for copied in made:
            others[chosen.name](copied)
        found += made
    if chosen.name == "gguf":
        found += [_base_of(chosen, family, folder) for family in ("mixture", "gemma")]
    return found


def _base_of(chosen: Format, family: str, folder: Path) -> Path:
    """A file of another family: experts in tensors of three dimensions, or norms that are stored otherwise."""
    source = source_model(folder / family, WIDTHS[0])
    tensors, block = load_file(source / "model.safetensors"), "model.layers.0"
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    wide, narrow = tensors[f"{block}.mlp.up_proj.weight"], tensors[f"{block}.mlp.down_proj.weight"]
    if family == "mixture":
        config |= {
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 2,
            "num_experts_per_tok": 1,
        }  # fmt: skip
        tensors = {name: value for name, value in tensors.items() if ".mlp." not in name}
        tensors[f"{block}.block_sparse_moe.gate.weight"] = wide[:2].clone()
        for expert in range(2):
            made = {"w1": wide, "w2": narrow, "w3": wide}
            tensors |= {
                f"{block}.block_sparse_moe.experts.{expert}.{n}.weight": w.clone() for n, w in made.items()
            }
    else:
        config |= {
            "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "tie_word_embeddings": True,
            "sliding_window": 8, "query_pre_attn_scalar": config["head_dim"], "hidden_activation": "gelu_pytorch_tanh",
        }  # fmt: skip
        del tensors["lm_head.weight"]
        for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
            tensors[f"{block}.{name}.weight"] = wide[0].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    grid, target = GridConfig.of_kind("q4_0"), folder / f"gguf_{family}"
    chosen.write(Checkpoint(source), target, list(_layers(Checkpoint(source), grid, grid)))
    return target


def _layers(checkpoint: Checkpoint, grid: GridConfig, last: GridConfig) -> Iterator[CodedLayer]:
    """Nearest codes of every matrix of a block, those of down_proj on a grid of their own."""
    for key in checkpoint.tensors:
        if key.endswith(("proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")):
            weight = checkpoint.read(key).float()
            laid = place_grid(weight, last if "down_proj" in key else grid)
            yield CodedLayer(key.removesuffix(".weight"), laid.nearest(weight), laid)


def _old(folder: Path) -> None:
    """As AutoGPTQ left it: a configuration of its own, and tensors that change nothing."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "quantize_config.json").write_text(
        json.dumps(config.pop("quantization_config")), encoding="utf-8"
    )
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    name = "model.layers.0.self_attn"
    rotary = torch.ones(16)
    _more(folder, {f"{name}.q_proj.bias": torch.zeros(4), f"{name}.rotary_emb.inv_freq": rotary})


def _old_awq(folder: Path) -> None:
    """As AutoAWQ left it: a configuration of its own, by other names."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = config.pop("quantization_config")["group_size"]
    said = {"zero_point": True, "q_group_size": size, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(said), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _with_activations(folder: Path) -> None:
    """As a tool leaves it that quantizes activations too."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = {"num_bits": 4, "type": "float", "dynamic": "local", "strategy": "group"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _more(folder, {"model.layers.0.self_attn.q_proj.input_global_scale": torch.ones(1)})


def _more(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (file,) = folder.glob("*.safetensors")
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})


def _base(chosen: Format, grid: GridConfig, last: GridConfig, hidden: int, folder: Path, name: str) -> Path:
    source = folder / f"source{hidden}"
    if not source.exists():
        source_model(source, hidden)
    checkpoint, target = Checkpoint(source), folder / name
    chosen.write(checkpoint, target, list(_layers(checkpoint, grid, last)))
    return target


def _fits(chosen: Format, grid: GridConfig, hidden: int) -> bool:
    try:
        for shape in ((hidden, hidden), (WIDE, hidden), (hidden, WIDE)):
            chosen.check(shape, grid)
    except UserError:
        return False
    return True
