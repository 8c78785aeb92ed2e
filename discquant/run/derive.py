# SPDX-License-Identifier: Apache-2.0
"""Does a quantized file derive from an original? And if its weights were scaled first (AWQ), in which basis?

Every layer must be about as near to the original as rounding alone explains, every other tensor equal to it. Scales
that a tool folded into norms and neighbouring layers are recovered where folding them leaves the original's function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from discquant.errors import CheckpointError
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer, Format
from discquant.formats.load import other_tensors
from discquant.formats.safetensors_format import SafetensorsFormat, inert
from discquant.formats.source import Source

# A file's squared distance to the original may be this many times that of rounding to nearest on its own grid: GPTQ
# trades weight error for output error, and stays within about twice. A scaled, rotated or foreign weight is far beyond.
ROUNDING_MARGIN = 6.0
# Matrices in types that are not refined may differ by this much (squared, relative): 3 bits stay below.
CODED = 0.06
# Largest difference of logits, relative to the largest logit, that folding scales may make in float32.
LOGIT_BOUND = 1e-3
SUM_ROUNDING = 2.0**-24  # of a float32 sum, of its size
# What embeddings are called; a head that is tied to one may lie in a file as well.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
NORM_FOLDS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
LINEAR_FOLDS = (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj"))


@dataclass(frozen=True)
class Derivation:
    """What the comparison of file and original found.

    Attributes:
        layers: Quantized layers compared.
        worst_correlation: Least correlation of a row of the file's weights with the original's, and its layer.
        worst_layer: See there.
        untouched: Other tensors compared, all equal.
        not_compared: Tensors of the original that the file stores in a way that is not compared (GGUF's own
            quantized embeddings, say), or not at all (tied heads).
        folded: Modules whose scales were folded back.
    """

    layers: int
    worst_correlation: float
    worst_layer: str
    untouched: int
    not_compared: tuple[str, ...]
    folded: tuple[str, ...]


def distance(weight: Tensor, decoded: Tensor) -> float:
    """Return |decoded - weight|^2 / |weight|^2."""
    return float(
        (decoded - weight).double().square().sum() / weight.double().square().sum().clamp(min=1e-300)
    )


def row_correlations(weight: Tensor, decoded: Tensor) -> Tensor:
    """Return the cosine of each row with its original, 1 where both are zero; float32, [out_features]."""
    product = (weight * decoded).sum(dim=1)
    norms = weight.norm(dim=1) * decoded.norm(dim=1)
    return torch.where(norms == 0, (weight.norm(dim=1) == decoded.norm(dim=1)).float(), product / norms)


def derives(weight: Tensor, layer: CodedLayer) -> bool:
    """Whether rounding alone explains how far a layer of the file is from the original."""
    allowed = distance(weight, layer.grid.dequantize(layer.grid.nearest(weight), torch.float32))
    return distance(weight, layer.dequantize(torch.float32)) <= ROUNDING_MARGIN * allowed + 1e-9


class _Weights:
    """Weight matrices of a model by the names of its checkpoint, fused experts included; views, so writable."""

    def __init__(self, model: nn.Module) -> None:
        from discquant.solver.experts import expert_refs

        self.model = model
        self.experts = {
            ref.name: ref for ref in expert_refs(model, model, "", lambda name: True, strict=False)
        }

    def __call__(self, name: str) -> Tensor:
        ref = self.experts.get(name)
        if ref is not None:
            return ref.view(ref.parameter.detach())
        found: Any = self.model.get_submodule(name).weight
        weight: Tensor = found.detach()
        return weight


def _originals(source: Source) -> Callable[[str], Tensor | None]:
    """How to read a tensor of the original as its checkpoint has it; None where there is none of that name."""
    if any(source.path.glob("*.safetensors")):
        return _reader(Checkpoint(source.path))
    state = source.model.state_dict()
    return lambda name: state.get(name)


def _reader(original: Checkpoint) -> Callable[[str], Tensor | None]:
    """The same of a checkpoint. A head that it lacks is its embedding, unless its configuration denies that."""
    tensors, tied = original.tensors, original.config().get("tie_word_embeddings") is not False
    embeddings = [name for name in tensors if name.endswith(EMBEDDINGS)]

    def read(name: str) -> Tensor | None:
        if name in tensors:
            return original.read(name)
        if tied and len(embeddings) == 1 and name.endswith("lm_head.weight"):
            return original.read(embeddings[0])
        return None

    return read


def _names(source: Source) -> list[str]:
    if any(source.path.glob("*.safetensors")):
        return list(Checkpoint(source.path).tensors)
    return list(source.model.state_dict())


def _same(stored: Tensor, original: Tensor) -> bool:
    """Equal after the cast that the file's dtype implies."""
    if stored.shape != original.shape:
        return False
    if not stored.is_floating_point():
        return torch.equal(stored, original)
    if torch.equal(stored, original.to(stored.dtype)):
        return True
    # A GGUF file holds Gemma's norms as 1 + weight in float32: the weight comes back within that sum's rounding.
    near = (stored.double() - original.double()).abs() <= SUM_ROUNDING * (1 + original.double().abs())
    return stored.dim() == 1 and stored.dtype == torch.float32 and bool(near.all())


def _compare_rest(
    chosen: Format, path: Path, original_of: Callable[[str], Tensor | None], seen: set[str], task: str
) -> tuple[int, dict[str, Tensor]]:
    """Compare what a file holds besides coded layers; names are added to `seen`.

    Returns:
        How many tensors were compared, and those that differ.

    Raises:
        CheckpointError: The original lacks one.
    """
    compared, different = 0, dict[str, Tensor]()
    for name, stored in other_tensors(chosen, path):
        original = original_of(name)
        if original is None:
            if inert(name, stored.detach):
                continue
            raise CheckpointError(f"{task}: the file has a tensor {name} that the original lacks")
        if not _same(stored, original):
            coded = not isinstance(chosen, SafetensorsFormat) and stored.dim() == 2
            if (
                coded
                and stored.shape == original.shape
                and distance(original.float(), stored.float()) < CODED
            ):
                continue  # in a type that is not refined: near, and told as not compared
            different[name] = stored
        seen.add(name)
        compared += 1
    return compared, different


@torch.no_grad()
def check_unscaled(chosen: Format, path: Path, original: Checkpoint) -> None:
    """Refuse a file whose codes do not stand for this original's weights as they are; one layer in memory at a time.

    Unlike `check_derivation` it builds no model and recovers no scales: a file in a scaled basis is refused.

    Args:
        chosen: Format of the file.
        path: The file.
        original: What it is said to be quantized from.

    Raises:
        CheckpointError: Layers, shapes or tensors do not belong to this original, or its weights were scaled, rotated
            or trained on before they were quantized.
    """
    hint = (
        "the file comes from another model, or from weights that were scaled first (AWQ, SmoothQuant) or rotated; "
        "its codes do not fit this original"
    )
    seen: set[str] = set()
    # Norms and embeddings first: small, and most wrong pairs show there.
    if isinstance(chosen, SafetensorsFormat) or hasattr(chosen, "rest"):
        _, different = _compare_rest(chosen, path, _reader(original), seen, "export")
        if different:
            names = ", ".join(sorted(different)[:4])
            raise CheckpointError(
                f"export: {len(different)} tensors differ from the original ({names}): {hint}"
            )
    for layer in chosen.read(path):
        info = original.tensors.get(f"{layer.name}.weight")
        if info is None:
            raise CheckpointError(f"export: the original has no layer {layer.name}: another architecture")
        if tuple(info.shape) != tuple(layer.q.shape):
            raise CheckpointError(
                f"export: {layer.name} is {list(layer.q.shape)} in the file, {list(info.shape)} in the original"
            )
        if not derives(original.read(f"{layer.name}.weight").float(), layer):
            raise CheckpointError(
                f"export: {layer.name} is further from the original than rounding explains: {hint}"
            )


@torch.no_grad()
def check_derivation(
    chosen: Format, path: Path, layers: Mapping[str, CodedLayer], source: Source, tokens: Tensor
) -> Derivation:
    """Refuse a file that was not made from this original; fold recoverable scales into its model, in place.

    Args:
        chosen: Format of the file.
        path: The file.
        layers: Its quantized layers.
        source: The original; where the file's norms are scaled ones, norms and weights of its model are changed so
            that it computes the same function in the file's basis.
        tokens: Ids on which that is checked, int64, [rows, length].

    Returns:
        What was found.

    Raises:
        CheckpointError: Layers, shapes or tensors do not belong to this original, or its weights were transformed in a
            way that cannot be undone.
    """
    weight_of = _Weights(source.model)
    for name, layer in layers.items():
        try:
            shape = tuple(weight_of(name).shape)
        except AttributeError as error:
            raise CheckpointError(
                f"refine: the original has no layer {name}: another architecture"
            ) from error
        if shape != tuple(layer.q.shape):
            raise CheckpointError(
                f"refine: {name} is {list(layer.q.shape)} in the file, {list(shape)} in the original"
            )
    seen = {f"{name}.weight" for name in layers}
    compared, different = _compare_rest(chosen, path, _originals(source), seen, "refine")
    folded = _fold(source.model, weight_of, layers, different, tokens)
    if different:
        names = ", ".join(sorted(different)[:4])
        raise CheckpointError(
            f"refine: {len(different)} tensors that quantization leaves alone differ from the original ({names}): "
            "the file comes from another model, or its weights were rotated or smoothed in a way that is not "
            "recovered; give the model that it was quantized from"
        )
    worst, worst_layer = 2.0, ""
    for name, layer in layers.items():
        weight = weight_of(name).float()
        least = float(row_correlations(weight, layer.dequantize(torch.float32)).min())
        if least < worst:
            worst, worst_layer = least, name
        if not derives(weight, layer):
            raise CheckpointError(
                f"refine: {name} is further from the original than rounding explains (least correlation of a row "
                f"{least:.3f}): the file comes from another model, or from weights that were rotated or scaled first"
            )
    missing = sorted(name for name in _names(source) if name not in seen)
    return Derivation(len(layers), worst, worst_layer, compared, tuple(missing), folded)


def _fold(
    model: nn.Module,
    weight_of: _Weights,
    layers: Mapping[str, CodedLayer],
    different: dict[str, Tensor],
    tokens: Tensor,
) -> tuple[str, ...]:
    """Bring `model` into the basis of a file whose weights were scaled per channel, where that is its basis.

    Scaled norms: norm * s with columns / s leaves the function for any s, so s = original norm / file's norm. Between
    two linear layers s is estimated from the rows of the first; again any s leaves the function.
    Norms that are explained are taken out of `different`.
    """
    if not different:
        return ()
    before = _logits(model, tokens)
    folded: list[str] = []
    for key in sorted(different):
        name = key.removesuffix(".weight")
        prefix, _, norm = name.rpartition(".")
        consumers = next((names for last, names in NORM_FOLDS if last == norm), ())
        found = [f"{prefix}.{consumer}" for consumer in consumers if f"{prefix}.{consumer}" in layers]
        stored = different[key].float()
        if not found or len(found) < len(consumers) or bool((stored == 0).any()):
            continue
        original = weight_of(name)
        if original.shape != stored.shape:
            continue
        ratio = original.float() / stored
        if not bool(torch.isfinite(ratio).all()) or bool((ratio == 0).any()):
            continue
        for consumer in found:
            weight = weight_of(consumer)
            weight.mul_(ratio.to(weight.dtype))
        original.copy_(stored)
        del different[key]
        folded.append(name)
    for first, second in LINEAR_FOLDS:
        for name in [name for name in layers if name.endswith(f".{second}")]:
            producer = name.removesuffix(second) + first
            if producer in layers and _fold_linear(model, weight_of, layers[producer], layers[name]):
                folded.append(producer)
    if folded:
        after = _logits(model, tokens)
        error = float((after - before).abs().max() / before.abs().max().clamp(min=1e-30))
        if not error <= LOGIT_BOUND:
            raise CheckpointError(
                f"refine: the file's norms are scaled ({folded[0]}), and undoing that changes the original's logits "
                f"by {error:.1e} of their size: its transform cannot be recovered"
            )
    return tuple(folded)


def _fold_linear(model: nn.Module, weight_of: _Weights, first: CodedLayer, second: CodedLayer) -> bool:
    """Scale rows of `first` and columns of `second` as the file has them, if `second` is otherwise no rounding."""
    producer, weight = weight_of(first.name), weight_of(second.name)
    if producer.shape[0] != weight.shape[1] or derives(weight.float(), second):
        return False
    plain, decoded = producer.float(), first.dequantize(torch.float32)
    ratio = (plain * decoded).sum(dim=1) / plain.square().sum(dim=1).clamp(min=1e-30)
    if bool((ratio <= 1e-3).any()) or not bool(torch.isfinite(ratio).all()):
        return False
    scaled = weight.float() / ratio
    if not derives(scaled, second):
        return False
    producer.copy_(plain * ratio.unsqueeze(1))
    weight.copy_(scaled)
    bias: Any = getattr(model.get_submodule(first.name), "bias", None)
    if isinstance(bias, Tensor):
        bias.mul_(ratio)
    return True


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    found: Any = model(tokens)
    logits: Tensor = found.logits
    return logits.float()


def common_grid(layers: Mapping[str, CodedLayer]) -> tuple[int, int, bool]:
    """Return (bits, group size, symmetric) of most layers of a file, for reports.

    Raises:
        CheckpointError: The file has no quantized layer.
    """
    if not layers:
        raise CheckpointError("refine: the file has no quantized layer")
    kinds = [(layer.grid.num_bits, layer.grid.group_size, layer.grid.symmetric) for layer in layers.values()]
    return max(set(kinds), key=kinds.count)
