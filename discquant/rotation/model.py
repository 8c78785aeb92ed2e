# SPDX-License-Identifier: Apache-2.0
"""Write a model whose stream between blocks, and whose heads' values, are turned by random orthogonal matrices.

The rotated model computes what the original computes, in layers of the same shapes. Its weights have fewer
outliers, which stretch the scales of a grid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discquant.environment import compute_device
from discquant.errors import CheckpointError, ConfigError, ProofError, UnrepresentableError
from discquant.formats.card import ROTATION
from discquant.formats.checkpoint import Checkpoint, stated_quantization
from discquant.formats.coded import DEFAULT_SHARD_BYTES
from discquant.formats.output import ShardWriter, atomic_directory, check_space, check_target, check_writable
from discquant.formats.safetensors_file import DTYPE_BITS, DTYPE_NAMES, read_bytes
from discquant.formats.source import digest_and_check, read_config, resolve
from discquant.formats.write import copy_side_files
from discquant.rotation.places import EMBEDDING, HEAD, Place, check_family, places
from discquant.rotation.record import write_record
from discquant.rotation.turn import Rotation, Sizes, relative_error, turned

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_FLOATING = ("F64", "F32", "BF16", "F16")


def rotate(
    model: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    values: bool = True,
    dtype: str | None = None,
    device: str = "auto",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write MODEL rotated: h' = R h between blocks, R a randomized Hadamard matrix; v' = R_l v in all heads of block l.

    Whoever reads the stream gets W diag(norm) R^T, whoever writes it R W, and norms become 1; query and key, and what
    is inside the MLP, stay in their own basis. A head that shares the embedding's weights gets its own (the file grows
    by that matrix). Read and written tensor by tensor, computed in float64, rounded once. Before the folder appears,
    what was written is read from disk: its bytes must be those computed, and turned back they must be the original's
    values within rounding. The same arguments give the same bytes (on one kind of device).

    Args:
        model: Folder with config.json and safetensors, or a hub name.
        out: Where to write; must not exist or be empty.
        seed: Of the signs, 0 to 2^32 - 1; the signs land in OUT/discquant_rotation.json.
        values: Turn the values of every head too.
        dtype: "bfloat16", "float16" or "float32" for all tensors; None keeps each one's.
        device: Where to compute, see `environment.compute_device`.
        shard_bytes: Largest size of a shard's data.
        say: Gets a line per stage.

    Returns:
        What discquant_rotation.json holds, see `record.write_record`.

    Raises:
        MissingModelError, CheckpointError, NonFiniteError: The model cannot be read.
        ConfigError: An argument is none of those named.
        UnrepresentableError: The model is of a kind whose function a rotation may change, a tensor does not fit its
            configuration, no Hadamard matrix of its size is known, or `dtype` cannot hold a weight.
        OutputExistsError, DiskSpaceError: See `output.atomic_directory`.
        PermissionError: `out` cannot be written.
        ProofError: What was written does not turn back into the original.

    Source:
        Rotations that merge into the weights: QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed must be in 0..2^32-1, got {seed}")
    # Resolved: a link to an empty folder cannot be replaced by a rename.
    folder, target, place = resolve(model), Path(out).expanduser().resolve(), compute_device(device)
    check_target(target)
    check_writable(target, target.parent)
    config = read_config(folder)
    if stated_quantization(config):
        raise CheckpointError(f"{folder} is quantized already; rotate the original model")
    if (folder / ROTATION).exists():
        raise CheckpointError(f"{folder} is rotated already (it has {ROTATION}); rotate the original model")
    check_family(config["model_type"])
    checkpoint = Checkpoint(folder)
    library = _library_config(folder)
    if values and getattr(library, "clip_qkv", None) is not None:
        raise UnrepresentableError(
            "rotate: the model clips its values one by one (clip_qkv), which no rotation keeps; leave them out "
            "(--no-values)"
        )
    sizes = _sizes(library)
    tied = _tied(folder, library, checkpoint)
    found = places(
        [*checkpoint.tensors, *([HEAD] if tied and HEAD not in checkpoint.tensors else [])], sizes.layers
    )
    job = _Job(checkpoint, found, Rotation.random(sizes, seed, values=values), dtype, place)
    job.check_shapes()
    check_space(target, job.space(shard_bytes))
    say(f"reading {folder}")
    sha256 = digest_and_check(checkpoint)
    with atomic_directory(target) as partial:
        say(f"rotating {sum(p.turns for p in found.values())} tensors, seed {seed}")
        writer = ShardWriter(partial, shard_bytes)
        for name in found:
            job.write(name, writer)
        writer.close()
        copy_side_files(folder, partial)
        _write_config(partial, config, dtype, tied)
        say("reading what was written, and turning it back")
        worst = job.prove(Checkpoint(partial), writer)
        return write_record(partial, folder, sha256, job.rotation, seed, head_untied=tied, worst=worst)


class _Job:
    """One model under way: what is done to each tensor and what must come of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        places: dict[str, Place],
        rotation: Rotation,
        dtype: str | None,
        device: torch.device,
    ) -> None:
        self.checkpoint, self.places, self.rotation = checkpoint, places, rotation
        self.dtype, self.device = None if dtype is None else DTYPES[dtype], device

    def stored_name(self, name: str) -> str:
        """Name of a tensor in the original, where a shared head lies under the embedding's."""
        return EMBEDDING if name == HEAD and name not in self.checkpoint.tensors else name

    def _copied(self, name: str) -> bool:
        """Whether a tensor goes byte for byte."""
        place, info = self.places[name], self.checkpoint.tensors[self.stored_name(name)]
        same = self.dtype is None or info.dtype not in _FLOATING or info.dtype == DTYPE_NAMES[self.dtype]
        return same and not (place.turns or place.neutral)

    def space(self, shard_bytes: int) -> int:
        """Bytes of what will be written, and of the spool that its largest shard is joined from."""
        sizes = []
        for name in self.places:
            info = self.checkpoint.tensors[self.stored_name(name)]
            changed = self.dtype is not None and not self._copied(name)
            bits = DTYPE_BITS[DTYPE_NAMES[self.dtype] if self.dtype and changed else info.dtype]
            sizes.append(info.num_bytes * bits // DTYPE_BITS[info.dtype])
        return sum(sizes) + min(sum(sizes), max(shard_bytes, *sizes))

    def check_shapes(self) -> None:
        """Refuse tensors that do not fit the configuration, or whose dtype cannot be turned.

        Raises:
            UnrepresentableError: Naming the tensor.
        """
        sizes = self.rotation.sizes
        hidden, values, kv = sizes.hidden_size, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        for name, place in self.places.items():
            if not (place.turns or place.neutral):
                continue
            info = self.checkpoint.tensors[self.stored_name(name)]
            if info.dtype not in _FLOATING:
                raise UnrepresentableError(
                    f"rotate: {name} has the dtype {info.dtype}, which cannot be turned"
                )
            vector = place.neutral or name.endswith(".bias")
            right = len(info.shape) == (1 if vector else 2) and info.shape[0] > 0
            if right and place.columns is not None:
                right = info.shape[1] == (hidden if place.columns == "stream" else values)
            if right and (place.neutral or place.rows == "stream"):
                right = info.shape[0] == hidden
            elif right and place.rows == "values":
                right = info.shape[0] == (kv if ".v_proj." in name else values + 2 * kv)
            if not right:
                raise UnrepresentableError(
                    f"rotate: {name} has the shape {list(info.shape)}, which does not fit config.json"
                )

    def _factors(self, place: Place) -> Tensor | None:
        """Weight of the norm in front, float64."""
        return None if place.norm is None else self.checkpoint.read(place.norm).double()

    def write(self, name: str, writer: ShardWriter) -> None:
        """Append one tensor of the rotated model; what does not change goes byte for byte.

        Raises:
            UnrepresentableError: The dtype cannot hold a weight.
        """
        place, stored = self.places[name], self.stored_name(name)
        if self._copied(name):
            info = self.checkpoint.tensors[stored]
            writer.add_bytes(name, info.dtype, info.shape, info.num_bytes, read_bytes(info))
            return
        tensor = self.checkpoint.read(stored)
        dtype = self.dtype or tensor.dtype
        if place.neutral:
            writer.add(name, torch.ones(tensor.shape, dtype=dtype))
            return
        if place.turns:
            new = turned(tensor, place, self.rotation, self._factors(place), dtype, self.device)
        else:
            new = tensor.to(dtype)
        if not bool(torch.isfinite(new).all()):
            raise UnrepresentableError(
                f"rotate: {name} has values beyond {dtype} when rotated; take a wider --dtype"
            )
        writer.add(name, new)

    def prove(self, written: Checkpoint, writer: ShardWriter) -> tuple[str, float]:
        """Compare what lies on disk with what was computed, and turned back with the original.

        Returns:
            Name and relative error of the tensor that is furthest from the original.

        Raises:
            ProofError: A byte on disk is another than was computed, or an error is beyond what rounding explains.
        """
        worst = ("", 0.0)
        for name, place in self.places.items():
            info = written.tensors.get(name)
            sha = hashlib.sha256()
            for piece in () if info is None else read_bytes(info):
                sha.update(piece)
            if sha.hexdigest() != writer.tensors[name].sha256:
                raise ProofError(f"rotate: {name} on disk is not what was written")
            if not place.turns:
                continue
            new = written.read(name)
            source, factors = self.checkpoint.read(self.stored_name(name)), self._factors(place)
            error = relative_error(new, source, place, self.rotation, factors, self.device)
            # The second term is the arithmetic's own error in float64.
            bound = torch.finfo(new.dtype).eps / 2 + 1e-12
            if not error <= bound:
                raise ProofError(
                    f"rotate: {name} turned back differs by {error:.3g} of its norm, rounding to {new.dtype} explains "
                    f"{bound:.3g}; its values may be too small for that dtype (--dtype)"
                )
            worst = max(worst, (name, error), key=lambda row: row[1])
        return worst


def _library_config(folder: Path) -> Any:
    """config.json with the defaults that `transformers` gives its model type."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as cause:  # ValueError, KeyError, OSError and validation errors alike
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise CheckpointError(
            f"{folder / 'config.json'} is no configuration that transformers reads: {reason}"
        ) from cause


def _sizes(library: Any) -> Sizes:
    heads, hidden = int(library.num_attention_heads), int(library.hidden_size)
    return Sizes(
        hidden,
        int(getattr(library, "head_dim", None) or hidden // heads),
        heads,
        int(getattr(library, "num_key_value_heads", None) or heads),
        int(library.num_hidden_layers),
    )


def _tied(folder: Path, library: Any, checkpoint: Checkpoint) -> bool:
    """Whether the head has the embedding's weights.

    Raises:
        CheckpointError: The configuration says so, and the file holds two that differ.
    """
    if not library.tie_word_embeddings:
        return False
    stored = [checkpoint.read(name) for name in (HEAD, EMBEDDING) if name in checkpoint.tensors]
    if len(stored) == 2 and not torch.equal(*stored):
        raise CheckpointError(
            f"{folder}: config.json ties the output head to the embedding, and the weights of the two differ"
        )
    return True


def _write_config(partial: Path, config: dict[str, Any], dtype: str | None, untied: bool) -> None:
    # The library has these model types itself; code beside an original is not needed, and may not be there.
    config = {key: value for key, value in config.items() if key != "auto_map"}
    if untied:
        config["tie_word_embeddings"] = False
    if dtype is not None:
        config.update({key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"dtype": dtype})
    (partial / "config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
