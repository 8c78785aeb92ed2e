# SPDX-License-Identifier: Apache-2.0
"""Open an original model, with everything that can be wrong with it found before any long work.

Cheap checks first (configuration, file headers, tokenizer size), then one streamed pass over the weights that
hashes the files and looks for NaN and Inf, and only then is the model built. Nothing here unpickles: weights other
than safetensors are refused, or, if allowed, read by torch's restricted loader, which runs no code of the file.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from discquant.errors import (
    CalibrationError,
    CheckpointError,
    DiskSpaceError,
    MissingModelError,
    NonFiniteError,
    OutputExistsError,
)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_CHUNK = 1 << 24
_MAX_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True, eq=False)
class Source:
    """An original model, opened.

    Attributes:
        model: The `transformers` model, in eval mode, on the CPU.
        tokenizer: Its tokenizer; None where the folder holds none.
        path: The folder.
        digest: SHA-256 over the names and bytes of config.json and all weight files, hexadecimal.
        config: config.json as it stands.
    """

    model: Any
    tokenizer: Any
    path: Path
    digest: str
    config: dict[str, Any]


def resolve(path: str | Path) -> Path:
    """Folder of a model: a local path, or a hub name `owner/name` whose safetensors are fetched or cached.

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
        return Path(snapshot_download(str(path), allow_patterns=list(_HUB_FILES)))
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
        MissingModelError: There is none, or it describes no model.
        CheckpointError: It is not JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise MissingModelError(f"{folder} is no model: it has no config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as cause:
        raise CheckpointError(f"{file} is not valid JSON: {cause}") from cause
    if not isinstance(config, dict) or "model_type" not in config:
        raise MissingModelError(f"{folder} is no model: its config.json names no model_type")
    return config


def weight_files(folder: Path, *, allow_pickle: bool = False) -> list[Path]:
    """Weight files of a model folder, sorted by name: safetensors, or pickles where allowed and nothing else is there.

    Raises:
        MissingModelError: No weights, or a shard that the index names is missing.
        CheckpointError: Only pickled weights and not allowed, or a broken index.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as cause:
            raise CheckpointError(f"{index} is no index of safetensors shards: {cause!r}") from cause
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"{index} names a shard outside the folder: {name!r}")
            if not (folder / name).is_file():
                raise MissingModelError(f"{folder} lacks the shard {name} that its index names")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = sorted(file for pattern in PICKLES for file in folder.glob(pattern))
    if pickles and not allow_pickle:
        raise CheckpointError(
            f"{folder} holds pickled weights ({pickles[0].name}) and no safetensors; a pickle can run code. "
            "Convert it to safetensors, or allow it explicitly, to read it without running code"
        )
    if not pickles:
        raise MissingModelError(f"{folder} is no model: it has no {SINGLE} and no {INDEX}")
    return pickles


def check_header(file: Path) -> dict[str, dict[str, Any]]:
    """Validate a safetensors file by its header alone: sizes, places and the length of the file agree.

    Args:
        file: The file.

    Returns:
        Header entries by tensor name, `__metadata__` left out.

    Raises:
        CheckpointError: The file is truncated or corrupt.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{file} is truncated or corrupt: its header does not fit in {size} bytes")
        raw = opened.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        end = 0
        for start, stop, name in spans:
            if start != end or stop < start:
                raise CheckpointError(
                    f"{file} is corrupt: {name} lies at bytes {start} to {stop}, not from {end} on"
                )
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError) as cause:
        if isinstance(cause, CheckpointError):
            raise
        raise CheckpointError(f"{file} is corrupt: its header cannot be read ({cause!r})") from cause
    if size != 8 + length + end:
        raise CheckpointError(
            f"{file} is truncated or corrupt: it has {size} bytes, its header says {8 + length + end}"
        )
    return header  # type: ignore[no-any-return]


def content_digest(folder: Path, files: list[Path]) -> str:
    """SHA-256 over name, size and bytes of config.json and the weight files, streamed."""
    sha = hashlib.sha256()
    for file in [folder / "config.json", *files]:
        sha.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK):
                sha.update(chunk)
    return sha.hexdigest()


def _refuse_nonfinite(name: str, tensor: torch.Tensor, where: Path) -> None:
    """Raise if a float tensor holds NaN or Inf."""
    if not tensor.is_floating_point():
        return
    values = tensor.float() if tensor.element_size() == 1 else tensor  # isfinite has no float8
    # A sum is finite only if all terms are; it needs no mask of the tensor's size. An overflow is looked at closely.
    if bool(torch.isfinite(values.sum(dtype=torch.float64))):
        return
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        kind = "NaN" if bool(torch.isnan(values).any()) else "Inf"
        raise NonFiniteError(f"{where}: {name} holds {kind} in {int(bad.sum())} of {bad.numel()} weights")


def check_finite(files: list[Path]) -> None:
    """Look at every float tensor of safetensors or pickle files, one at a time.

    Raises:
        NonFiniteError: A weight is NaN or infinite; names the tensor.
        CheckpointError: A file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                        _refuse_nonfinite(name, opened.get_tensor(name), file)
            except SafetensorError as cause:
                raise CheckpointError(f"{file} is corrupt: {cause}") from cause
            continue
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (
            Exception
        ) as cause:  # the restricted loader raises many kinds; each means that the file is no weights
            raise CheckpointError(
                f"{file} holds more than plain weights, or is corrupt; it was not loaded"
            ) from cause
        for name, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, torch.Tensor):
                _refuse_nonfinite(str(name), value, file)


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


def _build(folder: Path, *, dtype: torch.dtype | None, trust_remote_code: bool, pickled: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=not pickled,
            weights_only=True,
            output_loading_info=True,
        )
    except (
        Exception
    ) as cause:  # transformers raises ValueError, OSError, KeyError, RuntimeError for bad folders
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise CheckpointError(f"{folder} does not load as a causal language model: {reason}") from cause
    missing = sorted(found.get("missing_keys", ()))
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} among them"
        )
    wrong = sorted(
        str(entry[0] if isinstance(entry, tuple) else entry) for entry in found.get("mismatched_keys", ())
    )
    if wrong:
        raise CheckpointError(f"{folder}: {wrong[0]} has not the shape that config.json gives it")
    return model.eval()


def open_source(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Source:
    """Open an original model after checking it.

    Args:
        path: Folder with config.json, safetensors weights and a tokenizer, or a hub name.
        dtype: Of the model in memory; None keeps the checkpoint's.
        trust_remote_code: Allow a model whose configuration names code of its own; that code then runs.
        allow_pickle: Allow pickled weights where there are no safetensors; read without running code.

    Returns:
        The opened source.

    Raises:
        MissingModelError: The path is no model, or a file of it is missing.
        CheckpointError: Truncated or corrupt files; pickled weights or own code not allowed; an already quantized
            model; weights that do not fit the configuration; a tokenizer that does not load.
        NonFiniteError: A weight is NaN or infinite.
        CalibrationError: The tokenizer has more tokens than the embedding has rows.
    """
    folder = resolve(path)
    config = read_config(folder)
    own_code = config.get("auto_map")
    tokenizer_config = folder / "tokenizer_config.json"
    if not own_code and tokenizer_config.is_file():
        try:
            own_code = json.loads(tokenizer_config.read_text(encoding="utf-8")).get("auto_map")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as cause:
            raise CheckpointError(f"{tokenizer_config} is not valid JSON: {cause}") from cause
    if own_code and not trust_remote_code:
        raise CheckpointError(
            f"{folder} wants to run code of its own (auto_map in its configuration); "
            "pass trust_remote_code if you trust its authors"
        )
    if config.get("quantization_config"):
        raise CheckpointError(f"{folder} is quantized already; give the original model")
    files = weight_files(folder, allow_pickle=allow_pickle)
    shapes = {}
    for file in files:
        if file.suffix == ".safetensors":
            shapes |= {name: entry.get("shape") for name, entry in check_header(file).items()}
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    # Before the weights are read: the embedding's rows by its usual names. After, the built model decides.
    rows = next(
        (shape[0] for name, shape in shapes.items() if name.endswith("embed_tokens.weight") and shape), None
    )
    if rows is not None:
        _check_vocabulary(folder, tokenizer, rows)
    digest = content_digest(folder, files)
    check_finite(files)
    pickled = files[0].suffix != ".safetensors"
    model = _build(folder, dtype=dtype, trust_remote_code=trust_remote_code, pickled=pickled)
    _check_vocabulary(folder, tokenizer, int(model.get_input_embeddings().weight.shape[0]))
    return Source(model, tokenizer, folder, digest, config)


def _check_vocabulary(folder: Path, tokenizer: Any, rows: int) -> None:
    if tokenizer is not None and len(tokenizer) > rows:
        raise CalibrationError(
            f"the tokenizer in {folder} does not fit: it has {len(tokenizer)} tokens, the embedding {rows} rows"
        )


def check_output_dir(
    out: str | Path,
    resume: bool,
    *,
    run_files: tuple[str, ...] = ("run.json", "metrics.jsonl", "config.json"),
) -> Path:
    """See that results can be written to a folder; nothing is written.

    Args:
        out: The folder; it need not exist.
        resume: Continue the run that is there, if there is one.
        run_files: Any of these marks a folder as a run; config.json only if it is not a model's.

    Returns:
        The folder as a Path.

    Raises:
        OutputExistsError: It is a file; it holds something and `resume` is off; it holds something that is no run.
        PermissionError: The folder cannot be made or written there.
    """
    import os

    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file; the output must be a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not resume:
            raise OutputExistsError(
                f"{folder} is not empty; give another folder, or --resume to continue the run in it"
            )
        if not any(_is_run_file(folder / name) for name in run_files):
            raise OutputExistsError(f"{folder} holds something that is no run, so there is nothing to resume")
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written: no permission in {parent}")
    return folder


def _is_run_file(file: Path) -> bool:
    if not file.is_file():
        return False
    if file.name != "config.json":
        return True
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(config, dict) and "model_type" not in config


def check_disk_space(out: str | Path, needed: int) -> None:
    """See that a file system has room.

    Args:
        out: Folder to be written; it need not exist.
        needed: Bytes.

    Raises:
        DiskSpaceError: Less is free.
    """
    folder = Path(out).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskSpaceError(f"{out} needs {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free")
