# SPDX-License-Identifier: Apache-2.0
"""`evaluate`: candidates on disk against their original, as rows and as JSON; `table` prints them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from discquant.calibration import Windows, load_windows
from discquant.calibration.arithmetic import problems
from discquant.calibration.positions import positions_of_config
from discquant.errors import CalibrationError, ConfigError
from discquant.evaluation.candidates import (
    bits_per_weight,
    candidate_original,
    check_candidate,
    open_candidate,
    vocabulary,
)
from discquant.evaluation.divergence import compare_models
from discquant.evaluation.exact_match import exact_match
from discquant.formats.source import open_source, read_config, resolve

logger = logging.getLogger(__name__)
PROBLEM_SEED = (
    20_000_003  # of the held-out problems; training and calibration use others, and their splits are disjoint
)


def _compute(model: Any, dtype: torch.dtype | None, device: torch.device) -> Any:
    """Move to the device and dtype of computation.

    On a CPU that is float32: the stored weights are exact in it, and 16-bit arithmetic would add noise of its own to
    both sides of the comparison.
    """
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    return model.to(device=device, dtype=dtype).eval()


def _fits_together(original: Any, count: int) -> bool:
    """Whether `count` candidates beside the original take less than half of the memory that is free."""
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return False
    size = 4 * sum(parameter.numel() for parameter in original.parameters())
    return bool((count + 1) * size < 0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def evaluate(
    original_path: str | Path,
    candidate_paths: Sequence[str | Path],
    dataset: str,
    *,
    nsamples: int = 256,
    seqlen: int = 256,
    exact_match_problems: int | None = None,
    seed: int = 1,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    max_new_tokens: int = 256,
    chat_template: bool = False,
    text_key: str = "text",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    open_run: Callable[[Path, str | Path | None], Any] | None = None,
    on_windows: Callable[[Windows], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure candidates against their original on one text.

    Args:
        original_path: Folder of the original model.
        candidate_paths: Model folders, quantized folders and files of any format that is read, run directories.
        dataset: As for `load_windows`; text that no candidate was calibrated on.
        nsamples: Windows at most.
        seqlen: Tokens per window.
        exact_match_problems: Held-out arithmetic problems to answer; None or 0 answers none.
        seed: Of the windows' choice, and of the samples for dataset `self` (calibration uses 0 by default).
        batch_size: Windows per forward pass.
        device: Where to compute; None is a GPU if there is one, else the CPU.
        dtype: Of computation; None is float32 on a CPU and each checkpoint's own on a GPU.
        max_new_tokens: Of an answer to a problem.
        chat_template: As for `load_windows`.
        text_key: As for `load_windows`.
        trust_remote_code: As for `open_source`.
        allow_pickle: As for `open_source`.
        open_run: Loads run directories, as for `open_candidate`; needed only where a candidate is one.
        on_windows: Called with the windows once they are loaded.

    Returns:
        One row per candidate, in order: `path` and the fields of `Divergence`, `bits_per_weight`, `dataset`, `windows`,
        `windows_digest`; with problems also `exact_match`, `exact_match_original`, `exact_match_problems`. None stands
        for what could not be measured.

    Raises:
        ValueError: No candidate, a number out of range, or a candidate with another vocabulary than the original.
        MissingModelError, CheckpointError, CalibrationError: As `open_source`, `open_candidate`, `load_windows`.
    """
    if not candidate_paths:
        raise ValueError("evaluate: candidate_paths must name at least one candidate, got none")
    _check_numbers(nsamples, seqlen, batch_size, exact_match_problems)
    for path in candidate_paths:
        check_candidate(path)
    folder = resolve(original_path, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    _check_models(folder, candidate_paths, seqlen)
    bits = {str(path): bits_per_weight(path) for path in candidate_paths}  # first: it reads every header
    allowed: dict[str, Any] = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    source = open_source(original_path, **allowed)
    origins = {str(path): candidate_original(path, source) for path in candidate_paths}
    if exact_match_problems and source.tokenizer is None:
        raise CalibrationError(f"{original_path} has no tokenizer, so it cannot be asked problems")
    chosen = (
        torch.device(device)
        if device is not None
        else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    original = _compute(source.model, dtype, chosen)
    windows = load_windows(
        dataset, source.tokenizer, nsamples=nsamples, seqlen=seqlen, seed=seed, model=original,
        chat_template=chat_template, text_key=text_key,
    )  # fmt: skip
    if on_windows is not None:
        on_windows(windows)
    stories = problems("heldout", exact_match_problems, PROBLEM_SEED) if exact_match_problems else []
    answered = _answers(original, source.tokenizer, stories, max_new_tokens)
    together = _fits_together(original, len(candidate_paths)) if chosen.type == "cpu" else False
    groups = [list(candidate_paths)] if together else [[path] for path in candidate_paths]
    rows = []
    for group in groups:
        models = {
            str(place): _compute(
                open_candidate(path, original=origins[str(path)], open_run=open_run, **allowed),
                dtype,
                chosen,
            )
            for place, path in enumerate(group)
        }
        measured = compare_models(original, models, windows, batch_size=batch_size, device=chosen)
        for place, path in enumerate(group):
            row: dict[str, Any] = {"path": str(path), **measured[str(place)].to_dict()}
            row["bits_per_weight"] = bits[str(path)]
            row |= {"dataset": dataset, "windows": len(windows), "windows_digest": windows.digest}
            if stories:
                itself = Path(path).resolve() == Path(original_path).resolve()  # asked once already
                row["exact_match"] = (
                    answered
                    if itself
                    else _answers(models[str(place)], source.tokenizer, stories, max_new_tokens)
                )
                row |= {"exact_match_original": answered, "exact_match_problems": len(stories)}
            rows.append(row)
            logger.info("%s: mean KL %s", path, row["kl_mean"])
        del models
    return rows


def _check_numbers(nsamples: int, seqlen: int, batch_size: int, problems: int | None) -> None:
    """Refuse before a model is read what would fail after it, by the names of the options.

    Raises:
        ConfigError: A number is out of range.
    """
    for option, least, given in (
        ("nsamples", 1, nsamples),
        ("seqlen", 2, seqlen),
        ("batch-size", 1, batch_size),
        ("exact-match", 0, problems),
    ):
        if given is not None and given < least:
            raise ConfigError(f"evaluate: --{option} must be at least {least}, got {given}")


def _check_models(original: Path, candidate_paths: Sequence[str | Path], seqlen: int) -> None:
    """Refuse by config.json alone what could not be compared.

    Raises:
        ConfigError: A candidate has another vocabulary, or the original fewer positions than a window.
    """
    known = vocabulary(original)
    for path in candidate_paths:
        own = vocabulary(path)
        if None not in (known, own) and own != known:
            raise ConfigError(
                f"evaluate: {path} has a vocabulary of {own} tokens and {original} one of {known}: they give no "
                "distributions over the same tokens to compare"
            )
    positions = positions_of_config(read_config(original))
    if positions is not None:
        positions.check(
            seqlen, "evaluate: --seqlen"
        )  # what only a scaling reaches is told when the text is read


def _answers(model: Any, tokenizer: Any, stories: list[Any], max_new_tokens: int) -> float | None:
    return exact_match(model, tokenizer, stories, max_new_tokens=max_new_tokens) if stories else None


def write_json(rows: Sequence[dict[str, Any]], file: str | Path) -> None:
    """Write rows of `evaluate` as a JSON list, whole or not at all."""
    target = Path(file)
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_text(json.dumps(list(rows), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
