# SPDX-License-Identifier: Apache-2.0
"""The Python API: quantize a model in memory or a plain module, allocate bits, refine a file."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from discquant.allocation import Allocation
from discquant.allocation import allocate as choose_grids
from discquant.allocation.allocate import Codes
from discquant.calibration import Windows, given_windows, load_windows
from discquant.config import ComputeDtype, DataConfig, GridConfig, QuantizeConfig, parse_grid
from discquant.environment import compute_device
from discquant.errors import ConfigError
from discquant.formats.checkpoint import check_finite
from discquant.formats.coded import CodedLayer
from discquant.formats.codes import QuantizedLinear
from discquant.grids import Grid
from discquant.run.checks import check_groups, check_ignore
from discquant.run.summary import coded_layers
from discquant.solver.chain import Chain, DecoderChain
from discquant.solver.energies import energies_of
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
        with engine.reproducible():
            energies = energies_of(chain, batches, config) if config.method == "guided" else None
        codes = layerwise_codes(
            chain,
            grids,
            batches,
            config.method,
            damp=config.gptq_damp,
            served=served,
            unreached=unreached,
            energies=energies,
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
        windows = _windows(model, tokenizer, config, calibration)
        chain.verify(windows.input_ids[:1])
        rows = TokenRows(chain, windows.input_ids, windows.mask, config.solver.micro_batch)
        return _run(chain, rows, config, served, on_step)


def allocate(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    average_bits: float,
    choices: Sequence[str | GridConfig] = ("2", "3", "4", "5", "6", "8"),
    config: QuantizeConfig | None = None,
    codes: Codes = "gptq",
    calibration: Windows | Tensor | None = None,
) -> Allocation:
    """Choose a grid for each linear layer of a causal language model, so that KL is least at a given size.

    Put the result's `layers` into the configuration of `quantize`.

    Args:
        model: As of `quantize`.
        tokenizer: As of `quantize`.
        average_bits: Bits per weight at most, scales and zero points included, on average over the layers.
        choices: Grids that a layer may get: `GridConfig`, or words as of the command (`3`, `q4_k`), which take from
            `config.grid` what they do not say.
        config: Text, what to leave alone, seed, GPTQ's damping; the rest is not used.
        codes: Whose errors are measured: `gptq` or `rtn`, see `allocation.allocate`.
        calibration: As of `quantize`; None loads `config.data`, 256 windows of 256 tokens by default.

    Returns:
        The allocation.

    Raises:
        TypeError, ValueError, NotImplementedError: As `quantize`; also where no choices fit the size.
    """
    _served_dtype("allocate", "model", model, config)
    config = config or QuantizeConfig(data=DataConfig(nsamples=256))
    words = {}
    for choice in choices:
        grid = choice if isinstance(choice, GridConfig) else parse_grid(choice, config.grid)
        words[str(choice) if isinstance(choice, str) else f"{grid.kind} {grid.bits}g{grid.group_size}"] = grid
    check_ignore(model, config.ignore)
    with lent(model):
        chain = DecoderChain(model, config.ignore)
        windows = _windows(model, tokenizer, config, calibration)
        chain.verify(windows.input_ids[:1])
        rows = TokenRows(chain, windows.input_ids, windows.mask, 1)
        with Engine(device=chain.device).reproducible():
            return choose_grids(
                chain, rows, words, average_bits, codes=codes, damp=config.gptq_damp, seed=config.seed
            )


def _windows(
    model: nn.Module, tokenizer: Any, config: QuantizeConfig, calibration: Windows | Tensor | None
) -> Windows:
    """Return the windows that were given, or those of the configuration."""
    if calibration is not None:
        return given_windows(calibration, model)
    data = config.data
    return load_windows(
        data.dataset, tokenizer, nsamples=data.nsamples, seqlen=data.seqlen, seed=config.seed, model=model,
        chat_template=data.chat_template, text_key=data.text_key,
    )  # fmt: skip


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
