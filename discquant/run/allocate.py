# SPDX-License-Identifier: Apache-2.0
"""From a model folder to a file of grids, one for each layer; and the rules that such a file holds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from discquant.allocation import Allocation, allocate
from discquant.allocation.allocate import Codes, Measured, check_request, sizes_of
from discquant.calibration.load import check_named, load_windows
from discquant.config import GridConfig, LayerGrid, QuantizeConfig
from discquant.environment import versions
from discquant.errors import CheckpointError, ConfigError, MissingModelError, OutputExistsError
from discquant.formats import registry
from discquant.formats.bits import stored_bits
from discquant.formats.lazy import settle
from discquant.formats.output import check_writable
from discquant.formats.source import open_source
from discquant.planning.allocating import options
from discquant.planning.setting import Allocating
from discquant.planning.shape import stored_dtype
from discquant.run.checks import check_ignore, check_text, holds
from discquant.run.choices import check_choices, check_joined, fallback_notes
from discquant.run.directory import write_atomic
from discquant.run.identity import run_identity
from discquant.run.lock import locked
from discquant.run.measured import Unfinished
from discquant.run.planned import place_run
from discquant.solver.boundaries import Boundaries
from discquant.solver.chain import DecoderChain
from discquant.solver.engine import Engine
from discquant.solver.rows import TokenRows

MARKER = "discquant_allocation"  # in the file: its version


def allocate_model(
    model: str | Path,
    out: Path,
    config: QuantizeConfig,
    choices: Mapping[str, GridConfig],
    average_bits: float,
    *,
    codes: Codes = "gptq",
    engine: Engine | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] | None = None,
) -> Allocation:
    """Choose a grid for each layer of a model, and write the choice; killed at any moment, the same call continues.

    Args:
        model: Folder of the original, or a hub name.
        out: JSON file to write.
        config: Text, dtype, seed, GPTQ's damping, what to leave alone, and the formats that must hold each grid; the
            rest is not used.
        choices: Grids by their words.
        average_bits: See `allocation.allocate`.
        codes: See there.
        engine: Where and how; `auto` is settled by the plan (`planning.allocating`).
        trust_remote_code: As for `open_source`.
        allow_pickle: As for `open_source`.
        say: Takes each note.
        progress: Called with (blocks done, blocks).

    Returns:
        What was written.

    Raises:
        UserError: Bad input, found before any long work.
    """
    check_request(choices, average_bits, codes)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "allocate: one process does the work; start it without torchrun (WORLD_SIZE is above 1)"
        )
    _check_out(out)
    for name in config.formats:
        registry.by_name(name)
    check_named(config.data.dataset)
    engine = dataclasses.replace(engine or Engine())
    with _at_work(out) as scratch:
        sampled = config.data.dataset == "self"
        plan = place_run(
            str(model), options(config), engine, out, trust_remote_code=trust_remote_code,
            allocating=Allocating(len(choices), codes == "gptq"),
        )  # fmt: skip
        if engine.where == "auto":
            engine.where = "resident" if plan is None else plan.setting.placement
        dtype = getattr(torch, config.solver.compute_dtype)
        source = open_source(
            model, dtype=dtype, lazy=engine.streamed and not sampled, trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )  # fmt: skip
        check_ignore(source.model, config.ignore)
        check_text(source, config, windows=1)
        settle(source.model, engine.device, stream=engine.streamed and engine.device.type == "cuda")
        chain, data = DecoderChain(source.model, config.ignore), config.data
        stored = stored_dtype(source.model.config)

        @functools.cache
        def allowed(name: str, shape: tuple[int, int], grid: GridConfig) -> bool:
            return all(holds(chosen, name, shape, grid, stored) for chosen in config.formats)

        def sized(shape: tuple[int, int], grid: GridConfig) -> int:
            return max(stored_bits(chosen, shape, grid) for chosen in config.formats or ("",))

        check_choices(chain, choices)
        refs = {ref.name: ref for own in chain.weights for ref in own}
        sizes_of(refs, choices, average_bits, allowed=allowed, sized=sized)
        asked = ((ref, grid) for ref in refs.values() for grid in choices.values())
        taken = ((ref.name, ref.shape, grid) for ref, grid in asked if allowed(ref.name, ref.shape, grid))
        for note in fallback_notes(taken):
            say(f"note: {note}")
        check_joined(source.model.config.to_dict(), chain, config.formats, choices, allowed)
        identity = {
            **run_identity(source, config, engine.device),
            "choices": {word: dataclasses.asdict(grid) for word, grid in choices.items()},
            "codes": codes,
        }
        unfinished = Unfinished(out, identity)
        windows = unfinished.windows or load_windows(
            data.dataset, source.tokenizer, nsamples=data.nsamples, seqlen=data.seqlen, seed=config.seed,
            model=source.model, chat_template=data.chat_template, text_key=data.text_key,
            warn=False,
        )  # fmt: skip
        if len(windows) < data.nsamples:
            say(f"note: {data.dataset} gives {len(windows)} of the {data.nsamples} windows asked for")
        chain.verify(windows.input_ids[:1])
        if unfinished.measured:
            say(f"note: {len(unfinished.measured)} layers were measured before; the others follow")
        unfinished.keep(windows, {})
        blocks = len(chain.blocks) - chain.first

        def done(index: int, made: Mapping[str, Measured]) -> None:
            if made:
                unfinished.keep(windows, made)
            if progress is not None:
                progress(blocks - (index - chain.first), blocks)

        boundaries = Boundaries(engine.activations or engine.where, engine.device, scratch)
        try:
            with engine.reproducible():
                found = allocate(
                    chain,
                    TokenRows(chain, windows.input_ids, windows.mask, 1),
                    choices,
                    average_bits,
                    codes=codes,
                    damp=config.gptq_damp,
                    seed=config.seed,
                    allowed=allowed,
                    sized=sized,
                    boundaries=boundaries,
                    known=unfinished.measured,
                    done=done,
                )
        finally:
            boundaries.close()
        text = {
            "source": windows.source,
            "windows": len(windows),
            "tokens": windows.tokens,
            "digest": windows.digest,
        }
        facts = {
            MARKER: 1, "model": named(model), "codes": codes, "text": text, "seed": config.seed,
            "versions": versions(),
        }  # fmt: skip
        _write(out, found, average_bits, facts)
        unfinished.remove()
        return found


@contextlib.contextmanager
def _at_work(out: Path) -> Iterator[Path]:
    """Keep every other process from a file while it is made; yield a folder for block inputs, gone afterwards.

    Raises:
        OutputExistsError: Another process is at work on it, or has just written it.
    """
    folder = out.with_name(f".{out.name}.state")

    def clear() -> None:
        for left in folder.glob("*.act"):
            left.unlink()

    with locked(folder, file=out):
        try:
            _check_out(out)
            clear()  # of a process that was killed
            yield folder
        finally:
            clear()
            with contextlib.suppress(OSError):  # somebody else's files
                folder.rmdir()


def choose_again(
    measured: Path,
    out: Path,
    average_bits: float,
    *,
    model: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Allocation:
    """Choose at another size from the figures of a file of `allocate_model`, and write that; no model is read.

    Args:
        measured: That file.
        out: The file to write.
        average_bits: Bits per weight at most.
        model: What the caller takes the model to be; a note says where the file is of another name.
        say: Takes the note.

    Raises:
        UserError: Bad input.
    """
    _check_out(out)
    before = _read(measured)
    try:
        figures = Allocation.of_dict(before)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as cause:
        raise CheckpointError(f"{measured}: its figures cannot be read: {cause}") from cause
    check_request(figures.grids, average_bits, "rtn")
    own_name = before.get("model")
    if model is not None and own_name not in (None, named(model)):
        say(f"note: the figures in {measured} are of {own_name}, not of {named(model)}")
    found = figures.at(average_bits)
    own = (*found.to_dict(), "average_bits", "layers")
    _write(out, found, average_bits, {key: value for key, value in before.items() if key not in own})
    return found


def named(model: str | Path) -> str:
    """Return the name that a file of figures has for a model: its folder's."""
    return Path(str(model)).name


def _write(out: Path, found: Allocation, average_bits: float, facts: Mapping[str, Any]) -> None:
    rules = [dataclasses.asdict(rule) for rule in found.layers]
    whole = {**facts, "average_bits": average_bits, **found.to_dict(), "layers": rules}
    write_atomic(out, json.dumps(whole, indent=1) + "\n")


def _check_out(out: Path) -> None:
    """Refuse a file that is there already, has no folder, or cannot be written there.

    Raises:
        OutputExistsError, ConfigError, PermissionError: So it is.
    """
    if out.exists():
        raise OutputExistsError(f"allocate: {out} exists; choose another OUT")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"allocate: there is no folder {out.absolute().parent}")
    check_writable(out, out.absolute().parent)


def read_layers(path: Path) -> tuple[LayerGrid, ...]:
    """Read the rules of a file that `allocate_model` wrote.

    Raises:
        MissingModelError: There is none.
        CheckpointError: It holds something else.
    """
    found = _read(path)
    try:
        return tuple(LayerGrid(rule["modules"], GridConfig(**rule["grid"])) for rule in found["layers"])
    except (KeyError, TypeError, ValueError) as cause:
        raise CheckpointError(f"{path}: its layers cannot be read: {cause}") from cause


def _read(path: Path) -> dict[str, Any]:
    """Read a file of `allocate_model`.

    Raises:
        MissingModelError: There is none.
        CheckpointError: It holds something else.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise MissingModelError(f"{path} cannot be read: {cause.strerror}") from cause
    except ValueError as cause:
        raise CheckpointError(f"{path} is no JSON: {cause}") from cause
    if not isinstance(found, dict) or found.get(MARKER) != 1:
        raise CheckpointError(f"{path} is no file of `discquant allocate` (it has no {MARKER} = 1)")
    return found
