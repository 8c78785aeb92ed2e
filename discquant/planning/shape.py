# SPDX-License-Identifier: Apache-2.0
"""Sizes of a model from its config.json: built without weights, so every shape is the real one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from discquant.calibration.positions import Positions, positions_of
from discquant.calibration.sampling import cache_elements
from discquant.errors import CheckpointError, MissingModelError
from discquant.formats.checkpoint import stated_quantization
from discquant.formats.lazy import without_memory
from discquant.formats.registry import quantized, refuse_run

if TYPE_CHECKING:
    from discquant.solver.chain import Chain


# Of eager attention, per score and by bytes of an element: what exists at once without autograd (scores, softmax in
# float32, and its result), what autograd keeps (capped scores, softmax, result), and what the way back has besides.
SCORES_PASSING = {2: 10.0, 4: 8.0, 8: 20.0}
SCORES_SAVED = {2: 8.0, 4: 8.0, 8: 20.0}
SCORES_BACK = {2: 10.0, 4: 8.0, 8: 20.0}


@dataclass(frozen=True)
class Matrix:
    """`count` equal matrices of a block, [rows, columns] each.

    `active` is the share of tokens that pass one; `plain` says that each is a linear layer of its own; `modules` are
    their names in the model.
    """

    name: str
    rows: int
    columns: int
    count: int = 1
    active: float = 1.0
    plain: bool = True
    modules: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Weights of all of them."""
        return self.rows * self.columns * self.count


@dataclass(frozen=True)
class Block:
    """One decoder block: matrices to quantize, parameters that stay, and whether a GPU has kernels for its norms.

    `eager` counts the heads of attention whose scores exist as tensors; kernels keep none.
    """

    matrices: tuple[Matrix, ...]
    frozen: int
    fused_norms: bool = False
    eager: int = 0

    @property
    def weights(self) -> int:
        """Weights to quantize."""
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def active_weights(self) -> float:
        """Weights that one token is multiplied with."""
        return sum(matrix.weights * matrix.active for matrix in self.matrices)

    @property
    def inner_elements(self) -> float:
        """Activations per token between the matrices of a feed-forward network."""
        hidden = self.matrices[0].columns
        return sum(m.columns * m.count * m.active for m in self.matrices if m.columns != hidden)

    def saved_bytes(self, element: int, accelerator: bool = False, seqlen: int = 0) -> float:
        """Activations per token that autograd keeps: outputs, inputs of inner layers, norms, residuals, eager scores.

        Norms compute in float32, so two copies of the hidden state are twice as wide where `element` is 2; kernels of
        an accelerator keep one copy as it is (counted by saved_tensors_hooks on a Llama block without its input: 22.6
        times the hidden state, 22.5 here; with kernels 19.8, 19.5 here).
        """
        hidden = self.matrices[0].columns
        outputs = sum(matrix.rows * matrix.count * matrix.active for matrix in self.matrices)
        copies = 4 if element >= 4 else 2 if accelerator and self.fused_norms else 5
        scores = SCORES_SAVED[element] * self.eager * seqlen
        return element * (outputs + 2 * self.inner_elements + copies * hidden) + scores

    def back_bytes(self, element: int, seqlen: int) -> float:
        """What the gradients of eager scores take per token."""
        return SCORES_BACK[element] * self.eager * seqlen

    def passing_bytes(self, element: int, seqlen: int) -> float:
        """Activations per token that exist at once without autograd: the hidden states, and the more of two.

        Gate, up and product; what all experts of a token get and give; scores of eager attention.
        """
        widest = max(max(matrix.rows, matrix.columns) for matrix in self.matrices)
        scores = SCORES_PASSING[element] * self.eager * seqlen
        return 3.0 * element * self.matrices[0].columns + max(
            3.0 * element * widest, element * self._routed_elements, scores
        )

    @property
    def _routed_elements(self) -> float:
        """Activations per token of fused experts: outputs, and the input that parts of one parameter share."""
        routed = [matrix for matrix in self.matrices if not matrix.plain]
        inputs = {m.name.partition("[")[0]: m.columns * m.count * m.active for m in routed}
        return sum(m.rows * m.count * m.active for m in routed) + sum(inputs.values())


@dataclass(frozen=True)
class ModelShape:
    """What a plan needs to know about a model.

    Attributes:
        name: For messages.
        blocks: In order.
        hidden: Width of the hidden state.
        vocab: Rows of the head.
        attention: heads * head_dim, the width in which scores are computed.
        frozen: Parameters outside the blocks: embedding, final norm, head (once where tied).
        file_bytes: Bytes per weight in the checkpoint.
        blockwise: Its blocks can be read one by one (`formats.lazy`).
        positions: How long windows may be; None where the configuration does not say.
        cache: Keys and values that a token leaves in all layers while text is sampled.
        masks: Kinds of masks that eager attention is called with; kernels get none.
        capped: Whether the head caps its logits.
    """

    name: str
    blocks: tuple[Block, ...]
    hidden: int
    vocab: int
    attention: int
    frozen: int
    file_bytes: int = 2
    blockwise: bool = True
    positions: Positions | None = None
    cache: int = 1
    masks: int = 0
    capped: bool = False

    def mask_bytes(self, element: int, tokens: int, seqlen: int) -> float:
        """Masks of `tokens` tokens that pass together; all micro-batches of one size share them."""
        return 1.0 * self.masks * tokens * seqlen * element

    @property
    def weights(self) -> int:
        """Weights to quantize."""
        return sum(block.weights for block in self.blocks)

    @property
    def active_weights(self) -> float:
        """Weights to quantize that one token is multiplied with."""
        return sum(block.active_weights for block in self.blocks)

    @property
    def untouched(self) -> int:
        """Parameters that are not quantized."""
        return self.frozen + sum(block.frozen for block in self.blocks)

    @property
    def largest(self) -> Block:
        """The block with the most weights."""
        return max(self.blocks, key=lambda block: block.weights)

    @property
    def head(self) -> int:
        """Weights of the output head."""
        return self.vocab * self.hidden


def open_config(model: str | Path, trust_remote_code: bool = False) -> Any:
    """Return the configuration of a model: a folder with config.json, that file, or a hub name.

    Raises:
        MissingModelError: There is none.
        CheckpointError: It cannot be used, or is that of a quantized model.
    """
    from transformers import AutoConfig

    path = Path(model).expanduser()
    folder = path.parent if path.is_file() and path.name == "config.json" else path
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise MissingModelError(f"plan: {folder} has no config.json")
    if not folder.is_dir() and (path.exists() or str(model).count("/") != 1 or str(model)[0] in "./~"):
        raise MissingModelError(f"plan: {model} is no folder with a config.json, and no hub name")
    refuse_run(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as cause:  # unknown model types, broken JSON and unreachable hubs come as many classes
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise CheckpointError(f"plan: the configuration of {model} cannot be used: {reason}") from cause
    if stated_quantization(config.to_dict()) or (folder.is_dir() and quantized(folder)):
        raise CheckpointError(f"{folder} is quantized already; give the original model")
    return config


def empty_model(config: Any, trust_remote_code: bool = False) -> Any:
    """Return the model of a configuration without memory for its weights (on the meta device).

    Raises:
        CheckpointError: The configuration describes no causal language model.
        NotImplementedError: It describes an encoder-decoder.
    """
    from transformers import AutoModelForCausalLM

    from discquant.solver.chain import refuse_encoder_decoder

    refuse_encoder_decoder(config)
    try:
        with without_memory():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as cause:  # as above
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise CheckpointError(f"plan: config.json makes no causal language model: {reason}") from cause


def read_shape(
    model: str | Path, ignore: Sequence[str] = ("lm_head",), *, trust_remote_code: bool = False
) -> ModelShape:
    """Read a model's sizes; no weight file is needed or opened.

    Args:
        model: Folder with config.json, that file, or a hub name.
        ignore: As in a run.
        trust_remote_code: Allow a configuration that names code of its own.

    Returns:
        The shape.

    Raises:
        MissingModelError: There is no config.json.
        CheckpointError: It describes no causal language model.
        NotImplementedError: The model is no chain of blocks.
    """
    config = open_config(model, trust_remote_code)
    return shape_of(empty_model(config, trust_remote_code), ignore, name=Path(str(model)).name)


def shape_of(model: Any, ignore: Sequence[str] = ("lm_head",), *, name: str = "model") -> ModelShape:
    """Return the sizes of a model in memory or on the meta device."""
    from discquant.solver.chain import DecoderChain

    return chain_shape(DecoderChain(model, ignore), name=name)


def stored_dtype(config: Any) -> torch.dtype:
    """Return the dtype of a checkpoint's weights by its configuration; bfloat16 where that does not say."""
    stored = getattr(getattr(config, "text_config", config), "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.bfloat16


def chain_shape(chain: Chain, *, name: str = "model") -> ModelShape:
    """Return the same of a model that is a chain already."""
    from discquant.solver.norms import rms_norms

    assert chain.head is not None
    model: Any = chain.model
    config = getattr(model.config, "text_config", model.config)
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_top_k", None) or 1
    hidden = int(chain.head.weight.shape[1])
    eager = getattr(config, "_attn_implementation", None) == "eager"
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    blocks = []
    for block, refs in zip(chain.blocks, chain.weights, strict=True):
        found: dict[tuple[str, int, int], list[str]] = {}
        experts: dict[tuple[str, int, int], float] = {}
        plain: dict[tuple[str, int, int], bool] = {}
        for ref in refs:
            if ref.part is None:
                rows = int(ref.parameter.shape[0])
                key = (ref.param_name, rows, ref.parameter.numel() // rows)
            else:
                columns = ref.parameter.shape[1 if ref.part.transposed else 2]
                key = (
                    f"{ref.param_name}[{ref.part.begin}:{ref.part.end}]",
                    ref.part.end - ref.part.begin,
                    columns,
                )
                experts[key] = min(1.0, chosen / ref.parameter.shape[0])
            found.setdefault(key, []).append(ref.name)
            plain[key] = ref.has_factors
        matrices = tuple(
            Matrix(*key, len(names), experts.get(key, 1.0), plain[key], tuple(names))
            for key, names in found.items()
        )
        total = sum(parameter.numel() for parameter in block.parameters())
        wide = [n for n in rms_norms(block) if sum(p.numel() for p in n.parameters()) == hidden]
        blocks.append(
            Block(matrices, total - sum(matrix.weights for matrix in matrices), len(wide) >= 2, heads * eager)
        )
    width = int(getattr(config, "head_dim", None) or hidden // heads) * heads
    inside = {id(p) for block in chain.blocks for p in block.parameters()}
    frozen = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    size = stored_dtype(model.config).itemsize
    vocab = int(chain.head.weight.shape[0])
    return ModelShape(
        name,
        tuple(blocks),
        hidden,
        vocab,
        width,
        frozen,
        size,
        positions=positions_of(model.config),
        cache=cache_elements(model.config),
        masks=len(set(getattr(config, "layer_types", None) or (None,))) if eager else 0,
        capped=chain.head.softcap is not None,
    )


def repeated(shape: ModelShape, depth: int) -> ModelShape:
    """Return the shape with `depth` copies of its first block."""
    return dataclasses.replace(shape, blocks=(shape.blocks[0],) * depth)
