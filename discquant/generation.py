# SPDX-License-Identifier: Apache-2.0
"""Streaming text from a quantized or ordinary model."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from discquant.api import load, original_of, served_directory
from discquant.calibration.positions import positions_of
from discquant.errors import ConfigError, MissingModelError
from discquant.formats.source import load_tokenizer
from discquant.modules import PackedReport
from discquant.run.directory import RunDirectory
from discquant.run.served import refined_model

# Logits are divided by it in float32, and must stay finite there.
LEAST_TEMPERATURE = 1e-30
# What torch takes as a seed.
SEEDS = (-(2**63), 2**64 - 1)


def _tokenizer(path: Path, trust_remote_code: bool) -> Any:
    """The tokenizer of what `load` opens: its own, or that of the original of the run that it lies in."""
    folders: list[Path | None] = [path if path.is_dir() else path.parent, original_of(path)]
    if RunDirectory.is_run(path):
        run = RunDirectory(path)
        refined = refined_model(run)
        written = [folder for name in run.formats() if (folder := path / name).is_dir()]
        folders = [served_directory(path), Path(run.config()["source"]), *written]
        folders += [] if refined is None else [refined if refined.is_dir() else refined.parent]
    for place in folders:
        found = None if place is None else load_tokenizer(place, trust_remote_code=trust_remote_code)
        if found is not None:
            return found
    raise MissingModelError(
        f"generate: {path} has no tokenizer; put the original's tokenizer files beside its weights"
    )


def _check(prompt: str, temperature: float, max_new_tokens: int, seed: int) -> None:
    """Refuse what would fail, or come out as noise, only after the model is loaded."""
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"generate: temperature must be finite and at least 0, got {temperature}")
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ConfigError(
            f"generate: temperature must be 0 (greedy) or at least {LEAST_TEMPERATURE}, got {temperature}"
        )
    if not SEEDS[0] <= seed <= SEEDS[1]:
        raise ConfigError(f"generate: seed must be from -2**63 to 2**64 - 1, got {seed}")
    try:
        prompt.encode()
    except UnicodeEncodeError as cause:
        raise ConfigError(
            f"generate: prompt must be text that UTF-8 holds, got {prompt[cause.start]!a} at place {cause.start}"
        ) from cause


def _room(config: Any, prompt: int, max_new_tokens: int) -> int:
    """How many new tokens the model has positions for; says so where those are fewer than asked for.

    Raises:
        ConfigError: None at all.
    """
    positions = positions_of(config)
    if positions is None or prompt + max_new_tokens <= positions.reach:
        return max_new_tokens
    room = positions.reach - prompt
    if room < 1:
        raise ConfigError(
            f"generate: the prompt has {prompt} tokens, and the model {positions.reach} positions, the new tokens' "
            "included; give a shorter one"
        )
    print(
        f"note: the model has {positions.reach} positions, {prompt} of them for the prompt: at most {room} new tokens, "
        f"not {max_new_tokens}",
        file=sys.stderr,
    )
    return room


def _ids(tokenizer: Any, prompt: str, chat_template: bool) -> torch.Tensor:
    """Token ids of the prompt, or of a chat in which it is the user's message, [1, tokens].

    Raises:
        ConfigError: The tokenizer has no chat template, or it does not take this prompt.
        ValueError: An empty prompt, and the tokenizer puts no begin token before it.
    """
    if chat_template:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("generate: --chat-template: the model's tokenizer has none; leave it out")
        try:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        except Exception as cause:  # templates are programs of their authors and raise what they like
            raise ConfigError(f"generate: the prompt does not fit the chat template: {cause}") from cause
    # A chat template writes the begin token itself.
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat_template)[
        "input_ids"
    ]
    if ids.numel() == 0:
        raise ValueError("generate: the prompt is empty, and the tokenizer puts no begin token before it")
    return ids


def _one_text(settings: Any) -> None:
    """Take from a model's own settings what gives no single text to stream, or asks for code from elsewhere."""
    settings.num_beams = settings.num_return_sequences = 1
    settings.penalty_alpha = settings.dola_layers = None
    settings.return_dict_in_generate = False


def stream(
    path: Path, prompt: str, *, max_new_tokens: int, temperature: float, seed: int, mode: str = "auto",
    device: str | None = None, chat_template: bool = False, trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Continue a prompt on standard output, without special tokens; tokens per second go to standard error.

    Args:
        path: Exported model (folder or file), run directory, or ordinary model folder.
        prompt: Text; an empty one is begun with the tokenizer's begin token.
        max_new_tokens: Limit; what the model has positions for is another, and a note says so where it is lower.
        temperature: 0 is greedy; else at least 1e-30.
        seed: Of sampling, from -2**63 to 2**64 - 1.
        mode: How quantized layers are computed, see `discquant.load`.
        device: None is the GPU where there is one, else the CPU.
        chat_template: Put the prompt through the tokenizer's chat template, as a user's message.
        trust_remote_code: As for `discquant.load`.
        allow_pickle: As for `discquant.load`.

    Returns:
        `text` (without special tokens), `tokens`, `seconds`, `packed_bytes` (0 without packed layers).

    Raises:
        FileNotFoundError: No model or no tokenizer there.
        ValueError: A temperature, seed or number of tokens out of range, a prompt that is no UTF-8, too long for the
            model's positions, or empty where the tokenizer has no begin token, a chat template that the tokenizer has
            not, an unknown mode or one that the device has not, or a device that is not there.
    """
    from transformers import TextStreamer

    _check(prompt, temperature, max_new_tokens, seed)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"generate: device must be cpu, there is no CUDA device here, got {device}")
    model: Any = load(
        path,
        mode=mode,  # type: ignore[arg-type]
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    tokenizer = _tokenizer(Path(path), trust_remote_code)
    ids = _ids(tokenizer, prompt, chat_template).to(device)
    limit = _room(model.config, ids.shape[1], max_new_tokens)
    torch.manual_seed(seed)
    options: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    _one_text(model.generation_config)
    begin = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        tokenizer=tokenizer,  # for settings with `stop_strings`
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **options,
    )
    seconds = time.perf_counter() - begin
    tokens = int(output.shape[1] - ids.shape[1])
    report: PackedReport | None = getattr(model, "packed_report", None)
    packed = report.packed_bytes if report is not None else 0
    what = (
        "plain weights"
        if report is None or not report.layers
        else f"{report.layers} packed layers of {packed / 1e6:.1f} MB"
    )
    if report is not None and report.layers and report.plain:
        what += f", {report.plain} plain ones"
    print(f"{tokens} tokens, {tokens / seconds:.1f} tokens/s ({what}, {device})", file=sys.stderr)
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return {"text": text, "tokens": tokens, "seconds": seconds, "packed_bytes": packed}
