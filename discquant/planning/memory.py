# SPDX-License-Identifier: Apache-2.0
"""Peak memory of each phase on the device, the host and the disk, item by item (memory.md section 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from discquant.calibration.load import token_file
from discquant.config import QuantizeConfig
from discquant.formats.coded import DEFAULT_SHARD_BYTES
from discquant.planning.evaluating import measuring_items
from discquant.planning.head import MASKS, back_items, label_items, loss_bytes, loss_copy, masks
from discquant.planning.heap import heap_items
from discquant.planning.rounding import (
    WIDE_POSITIONS,
    Kept,
    boundaries,
    energy_items,
    energy_tokens,
    layerwise_items,
)
from discquant.planning.setting import (
    Setting,
    grid_share,
    keeps_graph,
    mean_over,
    remembers_teacher,
    rows_sampled,
    state_of,
)
from discquant.planning.shape import ModelShape
from discquant.planning.traffic import factor_bytes, factor_entries

SLOTS = 3  # one block arriving, one at work, one leaving
VALIDATION_ROWS = 8  # of run.solving, a layer above: windows that a solve is watched on
# What CUDA's libraries and kernels take of the host, at the first matmul and once all sorts have run, and cuBLAS of the
# device: as an H200 with torch 2.11 showed (benchmarks/results/nvidia-h200-quantize.json).
LIBRARIES_FIRST, LIBRARIES, CUBLAS_WORKSPACE = 0.45e9, 0.9e9, float(1 << 25)
# Reading text: the tokenizer and what it holds, and per token the lists that windows are cut from. As runs of the
# bundled model with 4,096 and 16,384 windows showed (resident memory against the plan, Linux, glibc).
TEXT, TOKEN_LISTS = 45e6, 25.0
Items = Mapping[str, float]


@dataclass
class PhasePeak:
    """Peak of one phase in bytes, by item; on a machine without an accelerator everything is on the host."""

    name: str
    gpu: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    disk: dict[str, float] = field(default_factory=dict)

    def total(self, where: str) -> float:
        """Return the sum of "gpu", "host" or "disk"."""
        items: Mapping[str, float] = getattr(self, where)
        return float(sum(items.values()))


def gain_bytes(shape: ModelShape) -> float:
    """Return what finding the gain holds: gradients sampled from every matrix, joined, and their quantile (a sort)."""
    from discquant.solver.calibrate import GAIN_POOLED, GAIN_SAMPLES

    def thinned(count: int, most: int) -> int:
        return -(-count // max(1, count // most))

    count = sum(
        m.count * thinned(m.rows * m.columns, GAIN_SAMPLES) for block in shape.blocks for m in block.matrices
    )
    # float32 twice; of the quantile sorted values and their places.
    return 8.0 * count + 12.0 * thinned(count, GAIN_POOLED)


def state_bytes(shape: ModelShape, setting: Setting) -> float:
    """Return bytes of the solver's state of a model, without scales."""
    return shape.weights * state_of(shape.blocks, setting).total + factor_bytes(shape.blocks, setting.config)


def _gathering(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """Return what gathering the curvature's factors holds besides the state and the boundaries; empty without them."""
    solver, element, tokens = setting.config.solver, setting.element, setting.gathered_tokens
    if not solver.curved:
        return {}
    # Sums as they are gathered are wide and whole, whatever the state keeps, and exist once more when they are scaled.
    wide = (
        2.0 * max(4, element) * max(factor_entries(block.matrices, setting.config) for block in shape.blocks)
    )
    always = {
        "teacher weights": float(shape.largest.weights * element)
        if setting.teacher_in_state or setting.streamed
        else 0.0,
        "hidden states": 3.0 * tokens * shape.hidden * element,
        **masks(shape, setting),
    }
    moments = (label_items(shape, setting), {"factors of a block": wide, **back_items(shape, setting)})
    return always | max(moments, key=lambda items: sum(items.values()))


def tree_bytes(gradient: float, kept: float, passes: int) -> float:
    """Return the most that a block's gradients and what is kept for them take beyond all that is kept, in bytes.

    After `done` passes there is a partial sum for each bit set in it, and the gradient that is being made; that share
    of `kept` has gone. Of all numbers with as many bits the smallest, 2^k - 1, has let go of least.

    Args:
        gradient: Bytes of one gradient.
        kept: Bytes that are kept for the backward passes, of which each lets go of its share.
        passes: Passes of a step.
    """
    return max(
        gradient * (1 + levels) - kept * ((1 << levels) - 1) / passes for levels in range(passes.bit_length())
    )


def term_bytes(setting: Setting, matrix: float, factors: float) -> float:
    """Return what the curvature's term of one matrix holds at most, in bytes; 0 without it.

    E, E H, its pieces and G E H, and the factors unpacked. A GPU cuts nothing into pieces; what it multiplies in
    bfloat16 has half the bytes, so that both weights and their difference are the most.

    Args:
        setting: Of the run.
        matrix: Weights of the matrix.
        factors: Entries of its factors as whole blocks.
    """
    solver, wide = setting.config.solver, 4.0 if setting.element < 8 else 8.0
    if not solver.curved:
        return 0.0
    if not setting.accelerator:
        return wide * (4 * matrix + factors)
    narrow = solver.state != "fp32" and wide == 4
    return 10 * matrix + 2 * factors if narrow else wide * (3 * matrix + factors)


def _working(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """Return what one step needs besides state and weights."""
    largest, element, tokens = shape.largest, setting.element, setting.tokens
    from discquant.solver.solver import JOURNAL_BYTES

    keep = keeps_graph(shape, setting)
    depth = len(shape.blocks)
    wide = 4 if element < 8 else 8
    seqlen = setting.config.data.seqlen
    saved = largest.saved_bytes(element, setting.accelerator, seqlen)
    # The teacher's weights are made beside the student's, unless the loaded model is the teacher.
    sides = 2 if setting.teacher_in_state or setting.streamed else 1
    students = depth if keep else 1
    # Micro-batches are summed in a tree, in float32: a partial sum per level, and the gradient that is being made. Kept
    # graphs go meanwhile. Of narrower elements one gradient exists in both widths, but for the GPU's own layers.
    narrow = element if element < wide and not setting.accelerator else 0
    kept = float(saved * tokens) if keep else 0.0
    sums = tree_bytes(float(wide * largest.weights), kept, setting.passes)
    logits = loss_bytes(shape, setting) + loss_copy(shape, setting)
    graphs = float(saved * tokens * depth)
    undo = float(min(shape.weights * state_of(shape.blocks, setting).written, JOURNAL_BYTES))
    # The curvature's term is made when the logits are gone.
    matrix = max(m.rows * m.columns for m in largest.matrices)
    factors = max(factor_entries([m], setting.config) / m.count for m in largest.matrices)
    term = term_bytes(setting, matrix, factors)
    # Codes that a step reads in place of `frac_ref`, where the state has a bit for them; made after the term is added.
    anchor = float(matrix) if setting.config.solver.state == "u8" and setting.layout.side else 0.0
    # A gated product has all three gradients before any of what was kept for it goes; the logits have gone by then.
    gated = 3.0 * largest.inner_elements * element
    backward = max(gated, largest.back_bytes(element, seqlen)) * setting.micro_tokens
    return {
        "student and teacher weights": float(sides + students - 1) * largest.weights * element,
        "weight gradient": sums + narrow * largest.weights,
        "another rank's gradient of a matrix": float(wide) * matrix if setting.ranks > 1 else 0.0,
        "gradients of activations": max(0.0, backward - logits),
        "curvature of a matrix": max(0.0, term - max(logits, backward)),
        "anchor of a matrix": max(0.0, anchor - max(term, logits, backward)),
        "activations of a block": saved * (tokens * depth if keep else setting.micro_tokens),
        MASKS: shape.mask_bytes(element, setting.micro_tokens, seqlen),
        "hidden states": 4.0 * tokens * shape.hidden * element,
        "logits": logits,
        # What the step replaces is kept until it ends, up to a limit. Block by block it takes the place of kept graphs,
        # so that only one end of the backward pass can be the peak.
        "bytes to undo a step": max(graphs + undo / depth, graphs / depth + undo) - graphs if keep else undo,
    }


def sampling_items(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """Return what sampling text from the model holds besides it: keys and values of the rows at once, and a step's own.

    A step copies one layer's keys to a tensor that is one token longer. Afterwards a token is drawn: logits in float32,
    and two tensors of as many float64.
    """
    rows, element = rows_sampled(shape, setting), setting.element
    cache = float(rows * setting.config.data.seqlen * shape.cache * element)
    passing = shape.largest.passing_bytes(element, setting.config.data.seqlen) * rows
    step = max(cache / (2 * len(shape.blocks)) + passing, rows * shape.vocab * (4.0 + 2 * 8.0))
    return {"keys and values": cache, "sampling a token": step}


def calibrating_items(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """Return what reading windows holds where the model runs: sampling them, then a look at what the chain computes.

    All logits of one window are compared: the model's, the chain's and their difference; five while those are capped.
    """
    element, tokens = setting.element, setting.config.data.seqlen
    verifying = {
        "logits of one window": (6.0 if shape.capped else 3.0) * tokens * shape.vocab * element,
        "activations of a block": shape.largest.passing_bytes(element, tokens) * tokens,
        MASKS: shape.mask_bytes(element, tokens, tokens),
    }
    return max(sampling_items(shape, setting), verifying, key=lambda items: sum(items.values()))


def placed(name: str, setting: Setting, device: Items, host: Items, disk: Items) -> PhasePeak:
    """Return a phase's peak; without an accelerator all is on the host."""
    if not setting.accelerator:
        return PhasePeak(name, {}, {**host, **device}, dict(disk))
    return PhasePeak(name, dict(device), dict(host), dict(disk))


def model_items(shape: ModelShape, setting: Setting) -> tuple[dict[str, float], dict[str, float]]:
    """Return what is there in every phase, on the device and on the host: the original and the process."""
    own = float(shape.weights * setting.element)
    device = {"frozen parameters": shape.untouched * float(setting.element)}
    held = {"process": setting.process}
    if setting.whole_model and setting.streamed and setting.accelerator:
        # They stay with the host; a block's come to the device while it runs.
        held["original weights"] = own
        device["original weights of a block"] = max(b.weights for b in shape.blocks) * float(setting.element)
    elif setting.whole_model:
        device["original weights"] = own
    return device, held


def reading_items(shape: ModelShape, setting: Setting) -> tuple[dict[str, float], dict[str, float]]:
    """Return what opening the original holds beside it, on the device and on the host."""
    # The library maps the whole checkpoint while it converts it; block-wise reading holds one matrix.
    mapped = float(shape.weights + shape.untouched) * shape.file_bytes if setting.whole_model else 0.0
    matrix = float(max(m.rows * m.columns for m in shape.largest.matrices))
    reading = {"largest matrix as read": matrix * (shape.file_bytes + setting.element)}
    return reading, {"checkpoint as mapped": mapped}


def text_items(config: QuantizeConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Return what reading text leaves, and what it holds besides for a moment."""
    text = config.data.dataset != "self" and token_file(config.data.dataset) is None
    tokens = config.data.nsamples * config.data.seqlen
    return {"tokenizer and text": TEXT if text else 0.0}, {
        "token lists": TOKEN_LISTS * tokens if text else 0.0
    }


def phase_peaks(shape: ModelShape, setting: Setting) -> list[PhasePeak]:
    """Return the peak of each phase: open, grid, calibrate, start, teacher, solve, export, evaluate, in that order.

    `start` and `teacher` are there where the run has them: GPTQ, and the teacher's last hidden states remembered.
    """
    config, layout, element = setting.config, state_of(shape.blocks, setting), setting.element
    grid = grid_share(shape, config)
    weights, largest = float(shape.weights), shape.largest
    matrix = max(m.rows * m.columns for m in largest.matrices)
    grids, state = weights * grid, state_bytes(shape, setting)
    windows = config.data.nsamples * config.data.seqlen * 8.0
    block = max(
        b.weights * (state_of([b], setting).total + grid) + factor_bytes([b], config) for b in shape.blocks
    )
    slots = min(SLOTS, len(shape.blocks)) * block
    teacher = (
        config.data.nsamples * config.data.seqlen * shape.hidden * 4.0
        if remembers_teacher(shape, setting)
        else 0.0
    )
    discquant = config.method == "discquant"
    started = discquant and config.solver.start == "gptq"
    packed = weights * mean_over(shape.blocks, config, lambda own, _: 0.5 if own.bits <= 4 else 1.0)
    device, held = model_items(shape, setting)
    stored: dict[str, float] = {}

    def peak(name: str, at_device: Items, at_host: Items, at_disk: Items = MappingProxyType({})) -> PhasePeak:
        return placed(name, setting, {**device, **at_device}, {**held, **at_host}, {**stored, **at_disk})

    peaks = [peak("open", *reading_items(shape, setting))]
    if setting.accelerator:
        held["GPU libraries"], device["cuBLAS workspace"] = LIBRARIES_FIRST, CUBLAS_WORKSPACE
    text, lists = text_items(config)
    held |= text
    peaks.append(peak("grid", {"searching scales": WIDE_POSITIONS * matrix, "scales": grids}, {}))
    held["scales"] = grids
    peaks.append(peak("calibrate", calibrating_items(shape, setting), {"windows": windows} | lists))
    held["windows"] = windows
    if setting.accelerator:
        held["GPU libraries"] = LIBRARIES
    if started or config.method in ("gptq", "guided", "greedy"):
        method = "gptq" if started else config.method
        layer, away = layerwise_items(shape, setting, method), _guided_items(shape, setting, method)
        peaks.append(
            peak("start", layer | heap_items(shape, setting, layer), {"codes": packed} | away.host, away.disk)
        )
    if discquant and teacher:
        # All rows enter and pass block by block beside what entered; at the end they are joined.
        passing = {
            "hidden states": 2 * teacher,
            "activations of a block": largest.passing_bytes(element, config.data.seqlen)
            * setting.micro_tokens,
            MASKS: shape.mask_bytes(element, setting.micro_tokens, config.data.seqlen),
        }
        peaks.append(peak("teacher", {**passing, "teacher's last hidden states": teacher}, {}))
        device["teacher's last hidden states"] = teacher
    if discquant:
        stored["codes at the start"] = weights if started else 0.0
        work, gathering = _working(shape, setting), _gathering(shape, setting)
        longest = max(setting.tokens, setting.gathered_tokens)
        where = {"resident": device, "host": held, "disk": stored}[setting.placement]
        where["state"] = state + grids
        if setting.streamed or not setting.accelerator:
            held["scales"] = 0.0  # what was laid is a view of the state; beside one on a device it stays here
        if setting.placement == "disk":  # which all ranks share, each with files of its own
            stored["state"] = where["state"] * setting.ranks
        away = boundaries(shape, setting, longest)
        work |= boundaries(shape, setting, setting.tokens).device
        gathering |= boundaries(shape, setting, setting.gathered_tokens).device
        if setting.placement != "resident":
            work["block slots"] = gathering["block slots"] = slots
        # Before the first step every block's state is made: unpacked beside its place, from one matrix after the other.
        building = {
            "state of a block unpacked": block - largest.weights * grid,
            "positions of one matrix": WIDE_POSITIONS * matrix,
        }
        gain = {
            "gradients sampled for the gain": gain_bytes(shape) if config.solver.kl_weight is None else 0.0
        }
        # The next one is complete before the oldest goes.
        stored["checkpoints (three)"] = 3 * weights * layout.written
        moment = max(work, building, gathering, gain, key=lambda items: sum(items.values()))
        watched = float(min(VALIDATION_ROWS, config.validation_windows) * config.data.seqlen * shape.hidden)
        moment = {**moment, "teacher of the validation windows": watched * element}
        peaks.append(peak("solve", moment | heap_items(shape, setting, moment), away.host, away.disk))
    # Codes of a solve and of RTN are computed when they are asked for, those at the start lie in a file.
    held["codes"] = 0.0 if config.method in ("discquant", "rtn") else packed
    stored["codes"] = weights * (1 + grid)
    bits = mean_over(shape.blocks, config, lambda own, _: own.bits / 8.0)
    exported = weights * (bits + grid) + shape.untouched * float(shape.file_bytes)
    # One after the other, each joined shard by shard from what is spooled before.
    stored["exported models"] = exported * len(config.formats)
    stored["a shard's spool"] = min(exported, DEFAULT_SHARD_BYTES) if config.formats else 0.0
    # Codes to nearest are computed from the weights whenever they are asked for.
    computed = {}
    if config.method == "rtn":
        computed["positions of one matrix"] = WIDE_POSITIONS * matrix
        computed["a matrix as read"] = matrix * (element + shape.file_bytes) if setting.streamed else 0.0
    peaks.append(
        peak(
            "export",
            computed | heap_items(shape, setting, computed),
            {"one layer packed": matrix * (2 + bits)},
        )
    )
    known = {config.method, "gptq" if started else config.method}
    unknown = [name for name in config.baselines if name not in known]
    others = {"codes of baselines": packed * sum(name != "rtn" for name in unknown)}
    # Baselines are rounded first, then measured one after the other.
    moments = [measuring_items(shape, setting), *(layerwise_items(shape, setting, name) for name in unknown)]
    moment = max(moments, key=lambda items: sum(items.values()))
    away = _guided_items(shape, setting, "guided" if "guided" in unknown else "gptq")
    peaks.append(peak("evaluate", moment | heap_items(shape, setting, moment), others | away.host, away.disk))
    return peaks


def _guided_items(shape: ModelShape, setting: Setting, method: str) -> Kept:
    """Return what guided rounding keeps elsewhere than on the device; nothing of other methods."""
    if method != "guided":
        return Kept({}, {}, {})
    kept = boundaries(shape, setting, energy_tokens(setting.config))
    return Kept({}, kept.host | energy_items(shape, setting.config), kept.disk)


def needed(peaks: list[PhasePeak], where: str) -> float:
    """Return the largest peak of any phase on "gpu", "host" or "disk"."""
    return max(peak.total(where) for peak in peaks)
