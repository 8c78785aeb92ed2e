# SPDX-License-Identifier: Apache-2.0
"""Divergence of a candidate's next-token distribution from the original's, on the same windows.

Which positions count: position t of a window counts for KL and top-1 where its token is not padding, the
last one included (its next-token distribution exists though no target does); for perplexity where token
t + 1 is not padding either. Non-finite positions are counted apart and enter no average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discquant.calibration.windows import Windows

CHUNK = 1 << 24  # logits of one float64 chunk: 128 MiB per tensor
LOGITS = 1 << 28  # entries of the logits of one forward pass


@dataclass(frozen=True)
class Divergence:
    """Measurements of one candidate; NaN where nothing finite was measured.

    Attributes:
        kl_mean: KL(original || candidate), mean over counted positions, nats.
        kl_stderr: Standard error of kl_mean over windows (windows are the sampling unit), nats.
        kl_median: Median over positions, nats.
        kl_p99: 99 % quantile over positions, nats.
        kl_p999: 99.9 % quantile, nats.
        kl_max: Largest, nats.
        top1: Share of positions where both put the same token first.
        perplexity: exp of the candidate's mean negative log-likelihood of the text.
        perplexity_original: The original's on the same positions.
        perplexity_ratio: perplexity / perplexity_original.
        tokens: Positions that count, the non-finite ones included.
        nonfinite: Of these, positions left out because a logit or the KL is NaN or infinite.
    """

    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    top1: float
    perplexity: float
    perplexity_original: float
    perplexity_ratio: float
    tokens: int
    nonfinite: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Return plain data for JSON, which has no NaN: None stands for it."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


@dataclass(frozen=True)
class TokenMeasures:
    """What is measured per position; every tensor [tokens].

    Attributes:
        kl: KL(original || candidate), nats, float64.
        same: Whether the largest logits agree, bool.
        nll: The candidate's -log p(target), nats, float64; 0 without a target.
        nll_original: The original's.
        finite: Whether all of these can be averaged, bool.
    """

    kl: Tensor
    same: Tensor
    nll: Tensor
    nll_original: Tensor
    finite: Tensor


def token_measures(original: Tensor, candidate: Tensor, target: Tensor) -> TokenMeasures:
    """Compare two sets of logits position by position.

    Args:
        original: Logits of the original, any float dtype, [tokens, vocab_size]; used as float32.
        candidate: Logits of the candidate, same shape.
        target: Next token, int64, [tokens]; -1 where there is none.

    Returns:
        The measures, on the CPU.

    Raises:
        ValueError: Shapes disagree.

    Note:
        An entry of probability 0 in the original adds 0, as in the limit; where the candidate alone gives 0, KL is
        infinite and the position is not finite. The sums are float64: at 4 bits and more the KL of many positions is
        below what float32 leaves of a difference of logarithms.
    """
    if original.shape != candidate.shape or original.shape[:1] != target.shape:
        raise ValueError(
            "token_measures: candidate and target must fit original = "
            f"{list(original.shape)}, got {list(candidate.shape)} and {list(target.shape)}"
        )
    parts = []
    rows = max(1, CHUNK // max(1, original.shape[1]))
    for start in range(0, original.shape[0], rows):
        here = slice(start, start + rows)
        p = torch.log_softmax(original[here].float().double(), dim=-1)
        q = torch.log_softmax(candidate[here].float().double(), dim=-1)
        probability = p.exp()
        # NaN must survive the choice: `probability > 0` is false for it, `probability == 0` too.
        kl = torch.where(probability == 0, 0.0, probability * (p - q)).sum(dim=-1)
        has_target = target[here] >= 0
        index = target[here].clamp(min=0).unsqueeze(1)
        nll = torch.where(has_target, -q.gather(1, index).squeeze(1), 0.0)
        nll_original = torch.where(has_target, -p.gather(1, index).squeeze(1), 0.0)
        finite = kl.isfinite() & nll.isfinite() & nll_original.isfinite() & ~q.isnan().any(dim=-1)
        same = p.argmax(dim=-1) == q.argmax(dim=-1)
        parts.append([kl, same, nll, nll_original, finite])
    if not parts:
        nothing = torch.zeros(0, dtype=torch.float64)
        return TokenMeasures(nothing, nothing.bool(), nothing, nothing, nothing.bool())
    return TokenMeasures(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def summarize(measures: TokenMeasures, window: Tensor, has_target: Tensor) -> Divergence:
    """Average per-position measures.

    Args:
        measures: Of all counted positions.
        window: Window that each position belongs to, int64, [tokens].
        has_target: Whether the next token is text, bool, [tokens].

    Returns:
        The divergence.
    """
    finite = measures.finite
    kl = measures.kl[finite].numpy()
    tokens, count = finite.numel(), int(finite.sum())
    scored = finite & has_target
    nan = math.nan
    mean = float(kl.mean()) if count else nan
    stderr = nan
    if count:
        # Ratio estimator: windows hold different numbers of counted positions.
        rows = window[finite].numpy()
        per_window = np.bincount(rows, minlength=1)
        residual = (np.bincount(rows, weights=kl) - mean * per_window)[per_window > 0]
        if len(residual) > 1:
            stderr = math.sqrt(len(residual) / (len(residual) - 1) * float((residual**2).sum())) / count
    median, p99, p999, largest = map(float, np.quantile(kl, [0.5, 0.99, 0.999, 1.0]) if count else [nan] * 4)
    top1 = float(measures.same[finite].double().mean()) if count else nan
    has_text = bool(scored.any())
    nll = float(measures.nll[scored].mean()) if has_text else nan
    nll_original = float(measures.nll_original[scored].mean()) if has_text else nan
    return Divergence(
        kl_mean=mean,
        kl_stderr=stderr,
        kl_median=median,
        kl_p99=p99,
        kl_p999=p999,
        kl_max=largest,
        top1=top1,
        perplexity=_exp(nll),
        perplexity_original=_exp(nll_original),
        perplexity_ratio=_exp(nll - nll_original),
        tokens=tokens,
        nonfinite=tokens - count,
    )


def _exp(value: float) -> float:
    """exp, infinite instead of an overflow error: a broken candidate has such perplexities."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def device_of(model: Any) -> torch.device:
    """Where a model takes its token ids: the device of its embedding, else of its first parameter or buffer."""
    if hasattr(model, "get_input_embeddings"):
        embedding = model.get_input_embeddings()
        weight = getattr(embedding, "weight", None)
        if isinstance(weight, Tensor):
            return weight.device
    for tensor in [*model.parameters(), *model.buffers()]:
        return torch.device(tensor.device)
    return torch.device("cpu")


def _logits(model: Any, ids: Tensor) -> Tensor:
    # Padding is on the right and attention causal: no attention mask is needed.
    arguments = {"use_cache": False} if hasattr(model, "config") else {}
    output = model(input_ids=ids.to(device_of(model)), **arguments)
    logits = output if isinstance(output, Tensor) else output.logits
    assert isinstance(logits, Tensor)
    return logits


def rows_at_once(model: Any, windows: Windows, most: int) -> int:
    """Return how many windows' logits may exist at once: at most LOGITS entries, at least one window.

    The vocabulary is what the model's head gives (the configuration of a composite model does not say), else what the
    configuration says, else a single entry.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    vocabulary = getattr(head, "out_features", None) or getattr(
        getattr(model, "config", None), "vocab_size", None
    )
    vocabulary = int(vocabulary or 1)
    return min(most, max(1, LOGITS // (windows.seqlen * vocabulary)))


@torch.no_grad()
def compare_models(
    original: Any,
    candidates: Mapping[str, Any],
    windows: Windows,
    *,
    batch_size: int = 8,
    device: str | torch.device | None = None,
) -> dict[str, Divergence]:
    """Measure how far candidates are from the original; its logits are computed once per batch for all of them.

    Args:
        original: Causal language model: `model(input_ids=...)` gives logits, or an object with `logits`.
        candidates: Models of the same vocabulary by name.
        windows: Token windows; see the module for the positions that count.
        batch_size: Windows per forward pass at most; fewer where the logits of so many would exceed LOGITS.
        device: Where logits are compared; None is the original's device. Models stay where they are.

    Returns:
        A divergence per candidate, in the order given.

    Raises:
        ValueError: No window, no counted position, batch_size below 1, or a candidate of another vocabulary.
    """
    if batch_size < 1:
        raise ValueError(f"compare_models: batch_size must be at least 1, got {batch_size}")
    if windows.tokens == 0:
        raise ValueError(
            f"compare_models: windows must hold a token that counts, got {len(windows)} windows of padding"
        )
    largest = int(windows.input_ids.max())
    for name, model in candidates.items():
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        rows_known = getattr(getattr(embedding, "weight", None), "shape", (largest + 1,))[0]
        if largest >= rows_known:  # an index beyond the embedding's rows ends a GPU's context
            raise ValueError(
                f"compare_models: {name} must know the windows' tokens, got the token id {largest} and a vocabulary of "
                f"{rows_known}"
            )
    where = torch.device(device) if device is not None else device_of(original)
    models = [original, *candidates.values()]
    modes = [model.training for model in models]
    found: dict[str, list[TokenMeasures]] = {name: [] for name in candidates}
    mask = windows.mask
    target = torch.where(mask[:, 1:] & mask[:, :-1], windows.input_ids[:, 1:], -1)
    target = torch.nn.functional.pad(target, (0, 1), value=-1)
    try:
        for model in models:
            model.eval()
        rows = rows_at_once(original, windows, batch_size)
        for start in range(0, len(windows), rows):
            here = slice(start, start + rows)
            counted = mask[here]
            if not bool(counted.any()):
                continue
            ids, wanted = windows.input_ids[here], target[here][counted].to(where)
            teacher = _logits(original, ids).to(where)[counted.to(where)]
            for name, model in candidates.items():
                student = _logits(model, ids).to(where)[counted.to(where)]
                if student.shape != teacher.shape:
                    raise ValueError(
                        f"compare_models: {name} must have the original's vocabulary = {teacher.shape[1]}, "
                        f"got {student.shape[1]}"
                    )
                found[name].append(token_measures(teacher, student, wanted))
                del student
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
    window = torch.arange(len(windows)).unsqueeze(1).expand_as(mask)[mask]
    return {
        name: summarize(
            TokenMeasures(
                *(
                    torch.cat([getattr(part, field) for part in parts])
                    for field in TokenMeasures.__match_args__
                )
            ),
            window,
            target[mask] >= 0,
        )
        for name, parts in found.items()
    }
