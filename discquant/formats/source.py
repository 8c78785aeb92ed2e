# SPDX-License-Identifier: Apache-2.0
"""Open an original model, with everything that can be wrong with it found before any long work.

Cheap checks first (configuration, file headers, tokenizer size), then one streamed pass over the weights that
hashes the files and looks for NaN and Inf, and only then is the model built. Nothing here unpickles: weights other
than safetensors are refused, or, if allowed, read by torch's restricted loader, which runs no code of the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from discquant.errors import CalibrationError, CheckpointError, MissingModelError, OutputExistsError
from discquant.formats.card import read_rotation
from discquant.formats.checkpoint import (
    PICKLES,
    RUN_MARKER,
    Checkpoint,
    check_finite,
    read_json,
    stated_quantization,
)
from discquant.formats.lazy import build_lazy
from discquant.formats.output import check_writable
from discquant.formats.registry import quantized, refuse_run
from discquant.formats.safetensors_file import TORCH_DTYPES, read_bytes, read_tensor, tensor_bytes

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
# As transformers names them; what training leaves beside them holds more than weights.
_HUB_PICKLES = "pytorch_model*.bin"
# The same weights once more, in the layout of the model's makers.
_HUB_DUPLICATES = ("consolidated*", "original/*")
_CHUNK = 1 << 24
# Held while transformers builds a model: the default dtype that it sets meanwhile, and its verbosity, are those of the
# whole process, and two threads that put them back in turn would leave the other's for good.
BUILDING = threading.RLock()


@dataclass(frozen=True, eq=False)
class Source:
    """An original model, opened.

    Attributes:
        model: The `transformers` model, in eval mode, on the CPU.
        tokenizer: Its tokenizer; None where the folder holds none.
        path: The folder.
        digest: SHA-256 over config.json and every tensor (however they are sharded), hexadecimal.
        config: config.json as it stands.
    """

    model: Any
    tokenizer: Any
    path: Path
    digest: str
    config: dict[str, Any]


def resolve(path: str | Path, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> Path:
    """Folder of a model: a local path, or a hub name `owner/name` whose safetensors are fetched or cached.

    Code that the model brings is fetched only where it is trusted, pickled weights only where they are allowed and
    there are no safetensors.

    Raises:
        MissingModelError: Neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise MissingModelError(
            f"{path} is a file; a model is a folder with config.json and safetensors weights"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
        raise MissingModelError(f"{path} is no model: there is no such folder")
    from huggingface_hub import snapshot_download

    try:
        wanted, duplicates = [*_HUB_FILES, *(["*.py"] if trust_remote_code else [])], list(_HUB_DUPLICATES)
        fetched = Path(snapshot_download(str(path), allow_patterns=wanted, ignore_patterns=duplicates))
        if allow_pickle and not any(fetched.glob("*.safetensors")):
            wanted.append(_HUB_PICKLES)
            fetched = Path(snapshot_download(str(path), allow_patterns=wanted, ignore_patterns=duplicates))
        return fetched
    except (
        Exception
    ) as cause:  # offline, unknown, private, no cache: to the user all mean that it is not to be had
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise MissingModelError(
            f"{path} is no model: there is no such folder, and the hub does not give it ({reason})"
        ) from cause


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        MissingModelError: There is none, or it describes no model, or a run.
        CheckpointError: It is not JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise MissingModelError(f"{folder} is no model: it has no config.json")
    refuse_run(folder)
    config = read_json(file)
    if "model_type" not in config:
        raise MissingModelError(f"{folder} is no model: its config.json names no model_type")
    return config


def pickled_files(folder: Path) -> list[Path]:
    """Pickled weights of a folder that holds no safetensors; empty where it does."""
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return []
    return sorted(file for pattern in PICKLES for file in folder.glob(pattern))


def digest_and_check(checkpoint: Checkpoint) -> str:
    """Hash every tensor and look for NaN and Inf in the same pass.

    Returns:
        What `checkpoint.sha256()` returns.

    Raises:
        NonFiniteError: A weight is NaN or infinite; names the tensor.
    """
    sha = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        sha.update(json.dumps([name, info.dtype, list(info.shape)]).encode())
        if info.dtype in TORCH_DTYPES:
            tensor = read_tensor(info)
            sha.update(tensor_bytes(tensor))
            check_finite(name, tensor)
        else:
            for piece in read_bytes(info):
                sha.update(piece)
    return sha.hexdigest()


def model_digest(weights: str, config: dict[str, Any]) -> str:
    """`Source.digest` of a model, from the hash of its tensors (`Checkpoint.sha256`) and its config.json."""
    return hashlib.sha256(f"{weights}\n{json.dumps(config, sort_keys=True)}".encode()).hexdigest()


def _digest_and_check_pickles(files: list[Path]) -> str:
    """The same for pickled weights, hashing whole files; torch's restricted loader runs no code of theirs."""
    sha = hashlib.sha256()
    for file in files:
        sha.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK):
                sha.update(chunk)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (
            Exception
        ) as cause:  # it raises many kinds of error; each means that the file is no plain weights
            raise CheckpointError(
                f"{file} holds more than plain weights, or is corrupt; it was not loaded"
            ) from cause
        for name, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, torch.Tensor):
                check_finite(str(name), value)
    return sha.hexdigest()


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder, or None where the folder holds none.

    Raises:
        CheckpointError: Its files do not load.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as cause:  # a broken file surfaces as any class there
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise CheckpointError(f"the tokenizer in {folder} does not load: {reason}") from cause


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """Loading without transformers' progress bar and table of defects: what matters is in our own error.

    One thread at a time.
    """
    from transformers.utils import logging

    with BUILDING:
        verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bar:
                logging.enable_progress_bar()


def _build(folder: Path, *, dtype: torch.dtype | None, trust_remote_code: bool, pickled: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with quiet_library():
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto" if dtype is None else dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=not pickled,
                weights_only=True,
                # Reported below by name; the library's own error names no tensor.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (
        Exception
    ) as cause:  # transformers raises ValueError, OSError, KeyError, RuntimeError for bad folders
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise CheckpointError(f"{folder} does not load as a causal language model: {reason}") from cause
    for name, stored, expected in sorted(found.get("mismatched_keys", ())):
        raise CheckpointError(
            f"{folder}: {name} has the shape {list(stored)}, and config.json makes it {list(expected)}"
        )
    missing = sorted(found.get("missing_keys", ()))
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} among them"
        )
    return model.eval()


def refuse_quantized(folder: Path) -> None:
    """Refuse a quantized model where the original is wanted.

    Raises:
        CheckpointError: It is one, by its configuration or its files.
    """
    config = folder / "config.json"
    if (config.is_file() and stated_quantization(read_json(config))) or quantized(folder) is not None:
        raise CheckpointError(f"{folder} is quantized already; give the original model")


def open_source(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    lazy: bool = False,
) -> Source:
    """Open an original model after checking it.

    Args:
        path: Folder with config.json, safetensors weights and a tokenizer, or a hub name.
        dtype: Of the model in memory; None keeps the checkpoint's.
        trust_remote_code: Allow a model whose configuration names code of its own; that code then runs.
        allow_pickle: Allow pickled weights where there are no safetensors; read without running code.
        lazy: Leave the blocks' matrices in the checkpoint until a block runs (`lazy.build_lazy`), where that can be.

    Returns:
        The opened source.

    Raises:
        MissingModelError: The path is no model, or a file of it is missing.
        CheckpointError: Truncated or corrupt files; pickled weights or own code not allowed; an already quantized
            model; weights that do not fit the configuration; a tokenizer that does not load.
        NonFiniteError: A weight is NaN or infinite.
        CalibrationError: The tokenizer has more tokens than the embedding has rows.
    """
    folder = resolve(path, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    config = read_config(folder)
    own_code = config.get("auto_map")
    if (folder / "tokenizer_config.json").is_file():
        own_code = own_code or read_json(folder / "tokenizer_config.json").get("auto_map")
    if own_code and not trust_remote_code:
        raise CheckpointError(
            f"{folder} wants to run code of its own (auto_map in its configuration); "
            "allow it (--trust-remote-code) if you trust its authors"
        )
    refuse_quantized(folder)
    read_rotation(folder)  # damage to it would show only when a card is written
    pickles = pickled_files(folder)
    if not pickles and not any(folder.glob("*.safetensors")) and not Path(path).expanduser().is_dir():
        raise MissingModelError(
            f"{path} has neither safetensors nor {_HUB_PICKLES} on the hub"
            if allow_pickle
            else f"{path} has no safetensors on the hub; pickled weights are fetched only where they are allowed "
            "(--allow-pickle)"
        )
    if pickles and not allow_pickle:
        raise CheckpointError(
            f"{folder}: {pickles[0].name} is a pickle, which can run code when read; allow torch's restricted loader, "
            "which runs none (--allow-pickle), or convert it on a machine you trust with save_pretrained()"
        )
    checkpoint = None if pickles else Checkpoint(folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    # Before the weights are read: the embedding's rows under their usual name. Afterwards the built model decides.
    for name, info in checkpoint.tensors.items() if checkpoint else ():
        if name.endswith("embed_tokens.weight") and len(info.shape) == 2:
            _check_vocabulary(folder, tokenizer, info.shape[0])
    weights = digest_and_check(checkpoint) if checkpoint else _digest_and_check_pickles(pickles)
    digest = model_digest(weights, config)
    model = None
    if lazy and checkpoint is not None and dtype is not None:
        model = build_lazy(folder, checkpoint, dtype, trust_remote_code=trust_remote_code)
    if model is None:
        model = _build(folder, dtype=dtype, trust_remote_code=trust_remote_code, pickled=checkpoint is None)
    _check_vocabulary(folder, tokenizer, int(model.get_input_embeddings().weight.shape[0]))
    return Source(model, tokenizer, folder, digest, config)


def _check_vocabulary(folder: Path, tokenizer: Any, rows: int) -> None:
    if tokenizer is not None and len(tokenizer) > rows:
        raise CalibrationError(
            f"the tokenizer in {folder} does not fit: it has {len(tokenizer)} tokens, the embedding {rows} rows"
        )


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory, by its config.json."""
    try:
        return bool(read_json(folder / "config.json").get(RUN_MARKER))
    except (OSError, CheckpointError):
        return False


def check_output_dir(out: str | Path, resume: bool) -> Path:
    """See that results can be written to a folder; nothing is written.

    Args:
        out: The folder; it need not exist.
        resume: Continue the run that is there, if there is one.

    Returns:
        The folder as a Path.

    Raises:
        OutputExistsError: It or a parent is a file; it holds a run and `resume` is off; it holds something else.
        PermissionError: The folder cannot be made or written there.
    """
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file; the output must be a folder")
    # A process killed while it wrote its first file leaves that file's hidden temporary and nothing else.
    if folder.is_dir() and any(not file.name.endswith(".tmp") for file in folder.iterdir()):
        if not is_run(folder):
            raise OutputExistsError(f"{folder} is not empty and holds no run; give another folder")
        if not resume:
            raise OutputExistsError(
                f"{folder} holds a run; give another folder, or --resume to continue that run"
            )
    check_writable(folder, folder)
    return folder
