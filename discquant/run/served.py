# SPDX-License-Identifier: Apache-2.0
"""The model that a run's codes make: the original with what is served in place of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discquant.errors import CheckpointError, MissingModelError
from discquant.formats.checkpoint import read_json
from discquant.formats.coded import CodedLayer
from discquant.formats.codes import QuantizedLinear
from discquant.formats.lazy import reader_of, substitute
from discquant.run.directory import SUMMARY, RunDirectory
from discquant.solver.weight_ref import WeightRef


def served_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype in which a checkpoint's weights are served, from its config.json; float32 if it names none."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)


def _served(layer: CodedLayer | QuantizedLinear, served: torch.dtype, weight: Tensor) -> Callable[[], Tensor]:
    dtype, shape = weight.dtype, weight.shape
    return lambda: layer.dequantize(served).to(dtype).reshape(shape)


def _served_experts(
    model: torch.nn.Module,
    refs: Sequence[WeightRef],
    layers: Sequence[CodedLayer | QuantizedLinear],
    served: torch.dtype,
) -> Callable[[], Tensor]:
    """Return what reads a fused parameter: each part from its codes, what has none from where it was read before."""
    name, dtype, shape = refs[0].param_name, refs[0].parameter.dtype, refs[0].parameter.shape
    covered = sum(ref.matrix_size for ref in refs) == refs[0].parameter.numel()
    before = None if covered else reader_of(model, name)

    def read() -> Tensor:
        whole = torch.empty(shape, dtype=dtype) if before is None else before().to(dtype)
        for ref, layer in zip(refs, layers, strict=True):
            ref.view(whole).copy_(layer.dequantize(served))
        return whole

    return read


@torch.no_grad()
def apply_layers(
    model: torch.nn.Module, layers: Iterable[CodedLayer | QuantizedLinear], served: torch.dtype
) -> torch.nn.Module:
    """Overwrite the weights of `model` in place with what is served: the codes' product, rounded to `served`.

    Raises:
        CheckpointError: A layer does not exist in the model or has another shape.
    """
    from discquant.solver.experts import expert_refs

    # Experts are fused in memory and separate in the checkpoint, whose names the layers bear.
    experts = {ref.name: ref for ref in expert_refs(model, model, "", lambda name: True, strict=False)}
    unread: dict[str, list[tuple[WeightRef, CodedLayer | QuantizedLinear]]] = {}
    for layer in layers:
        if layer.name in experts:
            ref = experts[layer.name]
            if ref.parameter.is_meta:
                unread.setdefault(ref.param_name, []).append((ref, layer))
                continue
            weight = ref.view(ref.parameter)
        else:
            try:
                weight = model.get_submodule(layer.name).weight  # type: ignore[assignment]
            except AttributeError as error:
                raise CheckpointError(f"run: the model has no module {layer.name}") from error
        if weight.is_meta:
            substitute(model, f"{layer.name}.weight", _served(layer, served, weight))
            continue
        value = layer.dequantize(served).to(weight.dtype)
        if value.numel() != weight.numel():
            raise CheckpointError(
                f"run: {layer.name} has {list(weight.shape)} in the model, {list(value.shape)} in codes"
            )
        weight.copy_(value.reshape(weight.shape))
    for name, parts in unread.items():
        refs, codes = zip(*parts, strict=True)
        substitute(model, name, _served_experts(model, refs, codes, served))
    return model


def load_run_model(
    path: Path,
    dtype: torch.dtype | None = None,
    *,
    original: str | Path | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> torch.nn.Module:
    """Return the original model of a run with its final codes in place.

    Args:
        path: The run.
        dtype: Of the model; None is the original's.
        original: Where the run's original is now; None is where it was.
        trust_remote_code: As for `open_source`; that a run says it was trusted does not count, for runs are files.
        allow_pickle: Likewise.

    Raises:
        MissingModelError: `path` is no finished run, or its original model is gone.
        CheckpointError: The original model has changed since, or `original` is another.
    """
    from discquant.formats.source import open_source

    run = RunDirectory(Path(path))
    config = run.config()
    home = Path(original or config["source"])
    refined = refined_model(run)
    if refined is not None:
        # Its codes may stand for weights scaled per channel, with norms that only the file has.
        from discquant.formats.load import load_quantized

        loaded: torch.nn.Module = load_quantized(
            refined,
            dtype,
            original=home if home.is_dir() else None,
            trust_remote_code=trust_remote_code,
        )
        return loaded
    if original is None and not home.is_dir():
        raise MissingModelError(
            f"run: the original model of {path} is not at {home} any more, and its codes alone are no model. Put it "
            f"back, or write a model that stands alone: discquant export {path} --format compressed-tensors "
            "--original MODEL"
        )
    summary = read_json(run.path / SUMMARY) if run.complete else {}
    if summary.get("refine", {}).get("derivation", {}).get("folded"):
        raise CheckpointError(
            f"run: the file that {path} refined has scaled weights; its codes do not fit the original, and the refined "
            "file is gone"
        )
    source = open_source(
        home,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    if source.digest != config["identity"]["source_digest"]:
        raise CheckpointError(
            f"run: the model at {home} has changed since the run in {path}"
            if original is None
            else f"run: the model at {home} is not the one that the run in {path} rounded"
        )
    return apply_layers(source.model, run.coded_layers(), served_dtype(source.config))


def refined_model(run: RunDirectory) -> Path | None:
    """Return the file or folder that a run of refine wrote; None of other runs, and where it is not there (yet).

    A lone file lies in the folder of its format under its own name; earlier versions put it into the run itself.

    Raises:
        MissingModelError: There is no run.
    """
    config = run.config()
    if not config.get("quantized"):
        return None
    folder = run.path / str(config["identity"]["config"]["format"])
    name = Path(config["quantized"]).name
    lone = next((file for file in (folder / name, run.path / name) if file.is_file()), None)
    return lone or (folder if folder.is_dir() else None)
