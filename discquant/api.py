# SPDX-License-Identifier: Apache-2.0
"""The Python API: quantize a model in memory, a plain module, or load what was written."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from discquant import _extension
from discquant.calibration import Windows, given_windows, load_windows
from discquant.config import ComputeDtype, QuantizeConfig
from discquant.environment import compute_device
from discquant.errors import ConfigError, MissingModelError, either
from discquant.formats.checkpoint import check_finite, read_json, stated_quantization
from discquant.formats.coded import CodedLayer
from discquant.formats.codes import QuantizedLinear
from discquant.formats.registry import quantized as quantized_format
from discquant.formats.safetensors_format import SafetensorsFormat
from discquant.formats.source import open_source
from discquant.grids import Grid
from discquant.ops.packed_linear import MODES, Mode, modes_on
from discquant.run.checks import check_groups, check_ignore
from discquant.run.directory import RunDirectory
from discquant.run.served import load_run_model
from discquant.run.summary import coded_layers
from discquant.solver.chain import Chain, DecoderChain
from discquant.solver.engine import Engine
from discquant.solver.layers import full_precision
from discquant.solver.layerwise import layerwise_codes
from discquant.solver.lent import lent
from discquant.solver.module_chain import ModuleChain
from discquant.solver.rows import TokenRows
from discquant.solver.solve import lay_grids, solve
from discquant.solver.solver import Solver, StepRecord
from discquant.solver.usage import unseen_experts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantized:
    """Codes of a model in memory.

    Attributes:
        model: The model that was given, its weights unchanged until `apply`.
        codes: Final codes by module name, uint8, [out_features, in_features], on the CPU.
        grids: Grid of each module as its codes are served, on the CPU.
        served: Dtype to which served weights are rounded.
        records: Record of every step (empty for layer-wise methods).
        unseen: Expert matrices that no calibration token reached, and of gptq and greedy the layers that were never
            called; they are rounded to nearest.
    """

    model: nn.Module
    codes: Mapping[str, Tensor]
    grids: Mapping[str, Grid]
    served: torch.dtype
    records: tuple[StepRecord, ...]
    unseen: frozenset[str] = frozenset()

    def layers(self) -> Iterator[QuantizedLinear]:
        """Yield codes with their uniform grids, as `discquant.formats` takes them.

        Raises:
            UnrepresentableError: A grid is not uniform; `coded_layers` gives all kinds.
        """
        for layer in self.coded_layers():
            yield layer.linear()

    def coded_layers(self) -> Iterator[CodedLayer]:
        """Yield codes with their grids."""
        return coded_layers(self.codes, self.grids)

    def apply(self) -> nn.Module:
        """Overwrite the model's weights with the served ones, in place; return the model."""
        from discquant.run.served import apply_layers

        return apply_layers(self.model, self.coded_layers(), self.served)


def _in_dtype(config: QuantizeConfig, dtype: torch.dtype) -> QuantizeConfig:
    """Return the configuration with a model's dtype as its compute dtype: the model stays as it was given.

    Raises:
        ConfigError: The solver does not compute in that dtype (layer-wise methods take any).
    """
    if config.method != "discquant":
        return config
    name = str(dtype).removeprefix("torch.")
    if name not in get_args(ComputeDtype):
        raise ConfigError(
            f"quantize: DiscQuant computes in the model's dtype, one of {', '.join(get_args(ComputeDtype))}, got a "
            f"model in {name} (and compute_dtype = {config.solver.compute_dtype}, which does not convert it); load the "
            "model in one of them"
        )
    solver = dataclasses.replace(config.solver, compute_dtype=cast(ComputeDtype, name))
    return dataclasses.replace(config, solver=solver)


def _served_dtype(function: str, argument: str, model: Any, config: Any) -> torch.dtype:
    """Check what is given; return the dtype of the model's parameters, in which they are served.

    Raises:
        TypeError: It is no module, or the configuration is of another type.
        ValueError: It has no parameters, or one of them is not finite or without memory (on the meta device).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}: {argument} must be of type = nn.Module (see discquant.load), got {type(model).__name__}"
        )
    if config is not None and not isinstance(config, QuantizeConfig):
        raise TypeError(f"{function}: config must be of type = QuantizeConfig, got {type(config).__name__}")
    first = next(model.parameters(), None)
    if first is None:
        raise ConfigError(f"{function}: {type(model).__name__} has no parameters, so nothing to quantize")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{function}: {argument} must have its weights in memory, got {name} on the meta device"
            )
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.detach())
    return first.dtype


def _run(
    chain: Chain,
    rows: TokenRows,
    config: QuantizeConfig,
    served: torch.dtype,
    on_step: Callable[[StepRecord], None] | None,
) -> Quantized:
    engine = Engine(device=chain.device)
    grids = lay_grids(chain, config.grid_of)
    if config.method != "discquant":
        batches = rows.batches(range(min(config.gptq_samples, len(rows))))
        unreached: set[str] = set()
        codes = layerwise_codes(
            chain, grids, batches, config.method, damp=config.gptq_damp, served=served, unreached=unreached
        )
        unseen = unseen_experts(chain, batches) | unreached
        # Held, not computed when asked for: `apply` changes the weights.
        return Quantized(chain.model, dict(codes), grids, served, (), unseen)
    records: list[StepRecord] = []

    def note(solver: Solver, record: StepRecord) -> None:
        records.append(record)
        if on_step is not None:
            on_step(record)

    finished = solve(chain, grids, rows, config, note, served=served, engine=engine)
    # On memory of their own: the state that `grids` are views of goes.
    grids = dict(finished.grids())
    return Quantized(chain.model, finished.codes(), grids, served, tuple(records), finished.unseen)


def quantize(
    model: nn.Module,
    tokenizer: Any = None,
    config: QuantizeConfig | None = None,
    *,
    calibration: Windows | Tensor | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> Quantized:
    """Round the linear layers of a causal language model.

    Args:
        model: A `transformers` decoder-only model of nn.Linear layers. Its dtype is the compute dtype, whatever the
            configuration or autocast says (load it in float32 for the CPU), and it is computed where it is: move it to
            a GPU to solve there. Its `training` and `requires_grad` are afterwards as they were.
        tokenizer: Its tokenizer; may be None with token ids or `config.data.dataset = "self"`.
        config: Everything else; default: DiscQuant, 4 bits, group 64, text sampled from the model itself. Its
            `format`, `baselines`, `validation_windows` and `checkpoint_every` are not used: nothing is held out,
            measured or written.
        calibration: Windows, or token ids int64 [rows, seqlen]; None loads `config.data`.
        on_step: Called after every step.

    Returns:
        Quantized; call `.apply()` to put the rounded weights into the model.

    Raises:
        TypeError: `model` is no module, `config` no QuantizeConfig, or `calibration` neither windows nor a tensor.
        ValueError: Bad configuration, data (empty, ids beyond the vocabulary, longer than the model's positions), a
            weight that is not finite or made in inference mode, or a model in float16 with DiscQuant.
        NotImplementedError: The model is no chain of decoder blocks with a linear head, or has other layers than
            nn.Linear in them (GPT-2's Conv1D).
    """
    served = _served_dtype("quantize", "model", model, config)
    config = _in_dtype(config or QuantizeConfig(), served)
    check_ignore(model, config.ignore)
    with lent(model):
        chain = DecoderChain(model, config.ignore)
        check_groups(chain, config)
        data = config.data
        windows = (
            load_windows(
                data.dataset, tokenizer, nsamples=data.nsamples, seqlen=data.seqlen, seed=config.seed, model=model,
                chat_template=data.chat_template, text_key=data.text_key,
            )
            if calibration is None
            else given_windows(calibration, model)
        )  # fmt: skip
        chain.verify(windows.input_ids[:1])
        rows = TokenRows(chain, windows.input_ids, windows.mask, config.solver.micro_batch)
        return _run(chain, rows, config, served, on_step)


def quantize_module(
    module: nn.Module,
    inputs: Tensor,
    config: QuantizeConfig | None = None,
    *,
    on_step: Callable[[StepRecord], None] | None = None,
) -> Quantized:
    """Round the linear and convolution layers of any module that maps one tensor to logits.

    These are nn.Linear and nn.Conv1d to nn.Conv3d, subclasses included. Other matrices stay at full precision, and one
    warning of the logger names them: in_proj_weight of nn.MultiheadAttention (its out_proj is rounded), transposed
    convolutions, recurrent layers, `transformers`' Conv1D, position tables. Embeddings stay without a word.

    Args:
        module: A vision transformer or convolutional network, say; a chain of one block, computed where it is and in
            its dtype, whatever autocast says. Its `training` and `requires_grad` are afterwards as they were.
        inputs: Calibration inputs, [samples, ...].
        config: See `quantize`; `data` and `format` are not used.
        on_step: Called after every step.

    Returns:
        Quantized.

    Raises:
        TypeError: `module` is no module, `inputs` no tensor, or `config` no QuantizeConfig.
        ValueError: Nothing to quantize, no inputs, logits that are not [samples, ..., classes], a weight that is not
            finite or made in inference mode, or a module in float16 with DiscQuant.
        NotImplementedError: The module gives no tensor, a weight is computed from others (weight_norm), or gptq and
            greedy cannot gather the inputs of a layer of its kind.
    """
    served = _served_dtype("quantize_module", "module", module, config)
    if not isinstance(inputs, Tensor):
        raise TypeError(f"quantize_module: inputs must be of type = Tensor, got {type(inputs).__name__}")
    if inputs.ndim == 0 or inputs.numel() == 0:
        raise ConfigError(
            f"quantize_module: inputs must be = [samples, ...], at least one, got {list(inputs.shape)}"
        )
    config = _in_dtype(config or QuantizeConfig(ignore=()), served)
    check_ignore(module, config.ignore)
    with lent(module):
        chain = ModuleChain(module, config.ignore)
        chain.verify(inputs[:1])
        left = list(full_precision(module, [ref.parameter for ref in chain.weights[0]], config.ignore))
        if left:
            logger.warning(
                "quantize_module: only nn.Linear and nn.Conv1d to nn.Conv3d are rounded; at full precision stay %s",
                ", ".join(left),
            )
        rows = TokenRows(chain, inputs, None, config.solver.micro_batch)
        return _run(chain, rows, config, served, on_step)


def refine(
    quantized: str | Path,
    out: str | Path,
    original: str | Path,
    config: QuantizeConfig | None = None,
    *,
    device: str = "auto",
) -> dict[str, Any]:
    """Lower the KL divergence of a quantized file to its original: same format, size and engine, other codes.

    Args:
        quantized: The file, in any format that `discquant.formats.registry` reads.
        out: Run directory; the refined file lands in it under the format's name. An interrupted run is continued.
        original: Folder of the model that it was quantized from.
        config: Solver, data, seed, baselines; grid, format and ignored modules are those of the file.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.

    Returns:
        The run's summary; its entry `refine` holds the KL on held-out text before and after.

    Raises:
        ValueError: The file is damaged, or does not derive from this original; or the device is not there.
        FileNotFoundError: A path is no model.
    """
    from discquant.run.refine import RefinePipeline

    engine = Engine(device=compute_device(device))
    return RefinePipeline(quantized, out, original, config, engine=engine).execute()


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    mode: Mode | Literal["plain"] = "exact",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> nn.Module:
    """Load an exported model, a run directory (its exported model, else its original with the codes), or an original.

    Quantized layers of 3 and 4 bits stay packed in memory, where the compiled extension is there and the kernels cover
    the grid (groups of 32, 64, a multiple of 128, or the row); all others become ordinary weights. So do those of MLX,
    GGUF and ONNX: their own engines serve them, here they are decoded.

    Args:
        path: Folder, or a GGUF or ONNX file with config.json beside it.
        dtype: Compute dtype; None keeps the checkpoint's, for GGUF and ONNX float32.
        mode: "exact": logits are those of the rounded model, bit for bit. "auto": the fast kernels. On the CPU a matmul
            then errs by at most the sum over its blocks of 2^-15 * largest activation * absolute weights, plus float32
            rounding; on a GPU it is a float32 sum over weights in the compute dtype. "a15", "a8", "fp32": on the CPU,
            see `packed_linear`. "plain": ordinary weights for all.
        device: None is the CPU.
        trust_remote_code: Allow a model that brings code of its own; that code then runs.
        allow_pickle: Read .bin weights of an original with torch's restricted loader.

    Returns:
        A `transformers` model with the served weights.

    Raises:
        FileNotFoundError: No model there, or nothing says what the model in a file is.
        ValueError: A damaged checkpoint, an unknown mode or one that the device has not, or a device that is not there.
        RuntimeError: "a15", "a8" or "fp32" without the compiled extension.

    Note:
        Threads may call it at once. transformers sets the default dtype of the whole process while it builds a model.
    """
    if mode not in (*MODES, "plain"):
        raise ConfigError(f"load: mode must be one of {either((*MODES, 'plain'))}, got {mode!r}")
    target = None if device is None else _device_there(device)
    known = (*modes_on(target or torch.device("cpu")), "plain")
    if mode not in known:
        raise ConfigError(
            f"load: mode on {target} must be one of {either(known)}, got {mode!r} (for the CPU)"
        )
    trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    model = _open_model(Path(path), dtype, mode, target, trust)
    return model if target is None else model.to(target)


def _device_there(device: torch.device | str) -> torch.device:
    """The device that an argument means, once it is known to be there.

    Raises:
        ConfigError: torch knows no such device, has it not, or it holds no numbers (meta).
    """
    try:
        found = torch.device(device)
        if found.type == "cuda":
            compute_device(str(found))
        torch.empty(0, device=found)
    except (AssertionError, ImportError, RuntimeError, TypeError) as cause:  # torch raises all of them
        raise ConfigError(f"load: device must be one that torch has here, got {device!r}") from cause
    if found.type == "meta":
        raise ConfigError(f"load: device must hold numbers, got {device!r}")
    return found


def _open_model(
    place: Path,
    dtype: torch.dtype | None,
    mode: Mode | Literal["plain"],
    device: torch.device | None,
    trust: Mapping[str, bool],
) -> nn.Module:
    from discquant.formats.load import load_quantized
    from discquant.formats.load_packed import load_packed_model

    own_code = trust["trust_remote_code"]
    if RunDirectory.is_run(place):
        exported = served_directory(place)
        if exported is None:
            return load_run_model(
                place, dtype, trust_remote_code=own_code, allow_pickle=trust["allow_pickle"]
            )
        place = exported
    chosen = quantized_format(place)
    if chosen is None:
        if not (place / "config.json").is_file():
            raise MissingModelError(f"load: {place} is neither a model nor a run directory")
        original: nn.Module = open_source(place, dtype=dtype, **trust).model
        return original
    if mode != "plain" and isinstance(chosen, SafetensorsFormat):
        if mode not in ("auto", "exact"):
            _extension.load()  # a kernel that is asked for by name is not left out without a word
        packed: nn.Module | None = None
        if _extension.available():
            packed = load_packed_model(place, dtype, mode=mode, device=device, trust_remote_code=own_code)
        if packed is not None:
            return packed
    loaded: nn.Module = load_quantized(place, dtype, original=original_of(place), trust_remote_code=own_code)
    return loaded


def served_directory(run: Path) -> Path | None:
    """Return the exported model of a run that is run in this process, None where it wrote none of that kind.

    MLX, GGUF and ONNX are not: their engines compute with other roundings than the solver's model has. MLX is where the
    original is gone.

    Raises:
        ConfigError: `run` is no run directory.
    """
    if not RunDirectory.is_run(run):
        raise ConfigError(f"{run} is no run directory")
    found = RunDirectory(run)
    folders = [run / name for name in found.formats()]
    folders = [folder for folder in folders if (folder / "config.json").is_file()]
    for folder in folders:
        if stated_quantization(read_json(folder / "config.json")):
            return folder
    if Path(found.config()["source"]).exists() or found.config().get("quantized"):
        return None
    # Without the original the codes are no model: then rather what stands alone.
    return next((folder for folder in folders if quantized_format(folder) is not None), None)


def original_of(place: Path) -> Path | None:
    """Return the original model of a folder or file in a run directory; None elsewhere, and where it is gone."""
    for parent in place.absolute().parents[:2]:  # a file lies in the folder of its format
        if RunDirectory.is_run(parent):
            original = Path(RunDirectory(parent).config()["source"])
            return original if original.is_dir() else None
    return None
