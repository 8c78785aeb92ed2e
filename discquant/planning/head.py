# SPDX-License-Identifier: Apache-2.0
"""What is held behind the last block: logits of a loss, and of labels that the model draws (`solver.sampled`)."""

from __future__ import annotations

import torch

from discquant.planning.setting import Setting
from discquant.planning.shape import ModelShape

CHUNK = 1024  # tokens whose logits exist at once on a device
MASKS = "masks of attention"


def _chunk(shape: ModelShape, setting: Setting) -> int:
    """Return how many tokens' logits exist at once where there are as many (the engine's own rule)."""
    from discquant.solver.losses import head_chunk

    return CHUNK if setting.accelerator else head_chunk(shape.vocab, torch.device("cpu"))


def logit_bytes(shape: ModelShape, setting: Setting) -> float:
    """Return the bytes of one chunk's logits."""
    tokens = min(_chunk(shape, setting), setting.micro_tokens)
    return (4.0 if setting.element < 8 else 8.0) * tokens * shape.vocab


def loss_bytes(shape: ModelShape, setting: Setting) -> float:
    """Return what the logits of a step's loss take: two tensors on a device, here those that the reference makes.

    Ten of one chunk, where the cap of the logits has a slope twelve; of the chunk before a part is still there.
    """
    one, several = logit_bytes(shape, setting), setting.micro_tokens > _chunk(shape, setting)
    if setting.accelerator:
        return 2 * one
    return one * (12 + 2 * several if shape.capped else 10 + several)


def loss_copy(shape: ModelShape, setting: Setting) -> float:
    """Return the bytes of a copy of the head that a loss multiplies with: the reference does so in float32."""
    return 0.0 if setting.accelerator else head_copy(shape, setting)


def head_copy(shape: ModelShape, setting: Setting) -> float:
    """Return the bytes of a copy of the head in float32, where it is narrower."""
    return 4.0 * shape.vocab * shape.hidden if setting.element < 4 else 0.0


def label_items(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """Return what drawing labels takes, between the passes forward and back: no activations of a block are there.

    Logits and probabilities, then these and what draws; a cap of the logits holds five tensors of that size.
    """
    one = logit_bytes(shape, setting)
    return {"logits": one * (5 if shape.capped else 2), "head in float32": head_copy(shape, setting)}


def back_items(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """Return what taking one micro-batch back through a block holds, without gradients of weights."""
    element, seqlen, tokens = setting.element, setting.config.data.seqlen, setting.micro_tokens
    return {
        "activations of a block": shape.largest.saved_bytes(element, setting.accelerator, seqlen) * tokens,
        "gradients of activations": shape.largest.back_bytes(element, seqlen) * tokens,
    }


def masks(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """Return the masks of a micro-batch."""
    return {MASKS: shape.mask_bytes(setting.element, setting.micro_tokens, setting.config.data.seqlen)}
