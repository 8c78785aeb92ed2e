# SPDX-License-Identifier: Apache-2.0
"""Write a model whose stream between blocks, and whose heads' values, are turned by random orthogonal matrices.

The rotated model computes what the original computes, in the same layers: every tool and engine takes it. Its weights
have fewer outliers, so that a grid of few bits loses less.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discquant import environment
from discquant.environment import compute_device
from discquant.errors import CheckpointError, ConfigError, ProofError, UnrepresentableError
from discquant.formats.card import CARD, ROTATION, inherited, origin_of
from discquant.formats.checkpoint import Checkpoint, stated_quantization
from discquant.formats.coded import DEFAULT_SHARD_BYTES
from discquant.formats.output import ShardWriter, atomic_directory, check_space, check_target
from discquant.formats.safetensors_file import DTYPE_BITS, DTYPE_NAMES, read_bytes
from discquant.formats.source import digest_and_check, read_config, resolve
from discquant.formats.write import copy_side_files
from discquant.rotation.places import EMBEDDING, FAMILIES, HEAD, Place, places
from discquant.rotation.turn import Rotation, relative_error, turned

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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

    Whoever reads the stream gets W diag(norm) R^T, whoever writes it R W, and norms become neutral; query and key, and
    what is inside the MLP, stay in their own basis. A head that shares the embedding's weights gets its own (the file
    grows by that matrix). Read and written tensor by tensor, computed in float64, rounded once. What was written is
    read from disk, turned back and compared with the original before the folder appears. The same arguments give the
    same bytes (on one kind of device).

    Args:
        model: Folder with config.json and safetensors, or a hub name.
        out: Where to write; must not exist or be empty.
        seed: Of the signs, which land in OUT/discquant_rotation.json.
        values: Turn the values of every head too.
        dtype: "bfloat16", "float16" or "float32" for all tensors that turn; None keeps each one's.
        device: Where to compute, see `environment.compute_device`.
        shard_bytes: Largest size of a shard's data.
        say: Gets a line per stage.

    Returns:
        What discquant_rotation.json holds: source, seed, signs (hexadecimal, 1 is +1, first sign first), the largest
        relative error of a tensor.

    Raises:
        MissingModelError, CheckpointError, NonFiniteError: The model cannot be read.
        ConfigError: An argument is none of those named.
        UnrepresentableError: The model is of a kind whose function a rotation may change, or no Hadamard matrix of its
            size is known.
        OutputExistsError, DiskSpaceError: See `output.atomic_directory`.
        ProofError: What was written does not turn back into the original.

    Source:
        Rotations that merge into the weights: QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    folder, target, place = resolve(model), Path(out).expanduser(), compute_device(device)
    check_target(target)
    config = read_config(folder)
    if stated_quantization(config):
        raise CheckpointError(f"{folder} is quantized already; rotate the original model")
    if (folder / ROTATION).exists():
        raise CheckpointError(f"{folder} is rotated already (it has {ROTATION}); rotate the original model")
    checkpoint = Checkpoint(folder)
    found, untied = _places(folder, config, checkpoint)
    rotation = _rotation(folder, seed, values)
    job = _Job(checkpoint, found, rotation, FAMILIES[config["model_type"]], dtype, place)
    job.check_shapes()
    check_space(target, job.num_bytes())
    say(f"reading {folder}")
    sha256 = digest_and_check(checkpoint)
    with atomic_directory(target) as partial:
        say(f"rotating {sum(p.turns for p in found.values())} tensors, seed {seed}")
        writer = ShardWriter(partial, shard_bytes)
        for name in found:
            job.write(name, writer)
        writer.close()
        copy_side_files(folder, partial)
        _write_config(partial, config, dtype, untied)
        say("turning what was written back, for comparison")
        worst = job.prove(Checkpoint(partial))
        record = {
            "rotation_version": 1,
            "versions": environment.versions(),
            "source": origin_of(folder, sha256),
            "seed": seed,
            "stream": _hexadecimal(rotation.stream),
            "values": [_hexadecimal(signs) for signs in rotation.values],
            "head_untied": untied,
            "largest_relative_error": worst[1],
            "largest_relative_error_at": worst[0],
        }
        (partial / ROTATION).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _write_card(partial, folder, record)
    return record


class _Job:
    """One model under way: what is done to each tensor and what must come of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        places: dict[str, Place],
        rotation: Rotation,
        offset: float,
        dtype: str | None,
        device: torch.device,
    ) -> None:
        self.checkpoint, self.places, self.rotation = checkpoint, places, rotation
        self.offset, self.device = offset, device
        self.dtype = None if dtype is None else DTYPES[dtype]

    def stored_name(self, name: str) -> str:
        """Name of a tensor in the original, where a shared head lies under the embedding's."""
        return EMBEDDING if name == HEAD and name not in self.checkpoint.tensors else name

    def num_bytes(self) -> int:
        """Size of what will be written."""
        total = 0
        for name, place in self.places.items():
            info = self.checkpoint.tensors[self.stored_name(name)]
            kept = self.dtype is None or not place.turns
            bits = DTYPE_BITS[info.dtype if kept or self.dtype is None else DTYPE_NAMES[self.dtype]]
            total += info.num_bytes * bits // DTYPE_BITS[info.dtype]
        return total

    def check_shapes(self) -> None:
        """Refuse tensors that do not fit the rotation or whose dtype cannot be turned, before anything is written."""
        for name, place in self.places.items():
            info = self.checkpoint.tensors[self.stored_name(name)]
            if not (place.turns or place.neutral):
                continue
            if info.dtype not in ("F64", "F32", "BF16", "F16"):
                raise UnrepresentableError(
                    f"rotate: {name} has the dtype {info.dtype}, which cannot be turned"
                )
            sizes = ((info.shape[-1], place.columns), (info.shape[0], place.rows))
            for size, space in sizes:
                wrong = space == "stream" and size != self.rotation.stream.numel()
                if space == "values" and self.rotation.values:
                    wrong = size % self.rotation.values[0].numel() != 0
                    wrong |= place.layer >= len(self.rotation.values)
                if wrong or len(info.shape) > 2:
                    raise UnrepresentableError(
                        f"rotate: {name} has the shape {list(info.shape)}, which does not fit config.json"
                    )

    def _factors(self, place: Place) -> Tensor | None:
        """Weight of the norm in front, float64, as the model applies it."""
        return None if place.norm is None else self.checkpoint.read(place.norm).double() + self.offset

    def write(self, name: str, writer: ShardWriter) -> None:
        """Append one tensor of the rotated model; what does not change goes byte for byte."""
        place, stored = self.places[name], self.stored_name(name)
        if not (place.turns or place.neutral):
            info = self.checkpoint.tensors[stored]
            writer.add_bytes(name, info.dtype, info.shape, info.num_bytes, read_bytes(info))
            return
        tensor = self.checkpoint.read(stored)
        if place.neutral:
            writer.add(name, torch.full_like(tensor, 1.0 - self.offset))
            return
        factors, dtype = self._factors(place), self.dtype or tensor.dtype
        writer.add(name, turned(tensor, place, self.rotation, factors, dtype, self.device))

    def prove(self, written: Checkpoint) -> tuple[str, float]:
        """Compare every tensor that turned with the original; return the name and size of the largest error.

        Raises:
            ProofError: An error is beyond what rounding explains.
        """
        worst = ("", 0.0)
        for name, place in self.places.items():
            if not place.turns:
                continue
            error, bound = relative_error(
                written.read(name), self.checkpoint.read(self.stored_name(name)), place, self.rotation,
                self._factors(place), self.device,
            )  # fmt: skip
            if not error <= bound:
                raise ProofError(
                    f"rotate: {name} turned back differs by {error:.3g}, rounding explains {bound:.3g}"
                )
            worst = max(worst, (name, error), key=lambda row: row[1])
        return worst


def _places(folder: Path, config: dict[str, Any], checkpoint: Checkpoint) -> tuple[dict[str, Place], bool]:
    """Places of what will be written, and whether the head is one that was the embedding until now."""
    names = dict.fromkeys(checkpoint.tensors)
    tied = bool(_library_config(folder).tie_word_embeddings)
    if tied:
        # Some files hold the shared matrix twice; the model reads the embedding.
        names.pop(HEAD, None)
    return places(str(config["model_type"]), [*names, *([HEAD] if tied or HEAD not in names else [])]), tied


def _library_config(folder: Path) -> Any:
    """config.json with the defaults that `transformers` gives its model type."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as cause:  # ValueError, KeyError, OSError and validation errors alike
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise CheckpointError(
            f"{folder / 'config.json'} is no configuration that transformers reads: {reason}"
        ) from cause


def _rotation(folder: Path, seed: int, values: bool) -> Rotation:
    config = _library_config(folder)
    heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
    return Rotation.random(
        hidden,
        int(getattr(config, "head_dim", None) or hidden // heads),
        int(getattr(config, "num_key_value_heads", None) or heads),
        int(config.num_hidden_layers),
        seed,
        values=values,
    )


def _write_config(partial: Path, config: dict[str, Any], dtype: str | None, untied: bool) -> None:
    config = dict(config)
    if untied:
        config["tie_word_embeddings"] = False
    if dtype is not None:
        config.update({key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"dtype": dtype})
    (partial / "config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _write_card(partial: Path, folder: Path, record: dict[str, Any]) -> None:
    """A card that passes licence and language on, and says what this is."""
    from huggingface_hub import ModelCard, ModelCardData

    origin = record["source"]
    data = ModelCardData(**inherited(folder / CARD), base_model=origin["hub"], tags=["discquant", "rotated"])
    lines = [
        f"# {origin['name']}, rotated",
        "",
        f"`{origin['hub'] or origin['name']}` with its hidden states (and the values of its attention heads) in "
        f"another basis, by discquant, seed {record['seed']}: it computes what the original does, up to the rounding "
        f"of its weights. `{ROTATION}` has the signs that undo it. Meant to be quantized.",
    ]
    (partial / CARD).write_text(
        str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")), encoding="utf-8"
    )


def _hexadecimal(signs: Tensor) -> str:
    """Bits, 1 for +1, first sign first, four to a digit."""
    bits = "".join("1" if sign > 0 else "0" for sign in signs.tolist())
    bits += "0" * (-len(bits) % 4)
    return "".join(f"{int(bits[i : i + 4], 2):x}" for i in range(0, len(bits), 4))
