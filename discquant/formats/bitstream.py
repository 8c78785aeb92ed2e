# SPDX-License-Identifier: Apache-2.0
"""The dense bit stream D_b that GPTQ, compressed-tensors, AutoRound and MLX share.

Code i occupies bits i*b .. i*b+b-1 of a little-endian bit string, cut into little-endian 32-bit words; the last word
is padded with zeros. Eight codes fill exactly b bytes, which is the unit of work here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

MIN_BITS, MAX_BITS = 1, 8
# Rows are taken in chunks of about this many codes, whose scratch stays in a core's cache.
_CHUNK = 1 << 18
# Eight codes side by side in a 64-bit unit: bytes, then 16-bit lanes of two codes, then 32-bit lanes of four.
_LANES = (8, 16, 32)


def words_for(count: int, num_bits: int) -> int:
    """Number of 32-bit words that hold `count` codes: ceil(count * num_bits / 32)."""
    return -(-count * num_bits // 32)


def pack(codes: Tensor, num_bits: int, *, dim: int = 1) -> Tensor:
    """Pack codes densely along one axis.

    Args:
        codes: Unsigned codes below 2^num_bits, uint8, [rows, columns].
        num_bits: Width of a code, 1 to 8.
        dim: Axis along which codes become a stream; 1 packs each row, 0 each column.

    Returns:
        Words, int32 on the CPU, [rows, ceil(columns * b / 32)], or [ceil(rows * b / 32), columns] for dim 0.

    Raises:
        TypeError: codes is not a Tensor.
        ValueError: Wrong dtype or rank, num_bits or dim out of range, or a code does not fit.

    Source:
        formats.md section 1; the words of compressed-tensors >= 0.18 `pack_to_int32` are the same.
    """
    _check("pack", "codes", codes, torch.uint8, num_bits, dim)
    if codes.numel() and int(codes.max()) >> num_bits:
        raise ValueError(f"pack: codes must be below 2^num_bits = {1 << num_bits}, got {int(codes.max())}")
    if dim == 0:
        return pack(codes.T, num_bits).T.contiguous()
    rows, columns = codes.shape
    words = words_for(columns, num_bits)
    out = np.zeros((rows, words * 4), dtype=np.uint8)
    step = max(1, _CHUNK // max(columns, 1))
    octets = -(-columns // 8)
    for start in range(0, rows, step):
        block = codes[start : start + step].contiguous().cpu().numpy()
        padded = np.zeros((len(block), octets * 8), dtype=np.uint8)
        padded[:, :columns] = block
        units = _gather(padded.view("<u8"), num_bits)
        # The low b bytes of each 64-bit unit are its part of the stream.
        stream = units.view(np.uint8).reshape(len(block), octets, 8)[:, :, :num_bits].reshape(len(block), -1)
        # Eight-code units may end past the last word, or before it: both sides hold zeros only.
        width = min(stream.shape[1], words * 4)
        out[start : start + step, :width] = stream[:, :width]
    return torch.from_numpy(out.view("<i4").astype(np.int32, copy=False))


def unpack(words: Tensor, num_bits: int, count: int, *, dim: int = 1) -> Tensor:
    """Undo `pack`.

    Args:
        words: Packed words, int32, [rows, ceil(count * b / 32)], or [ceil(count * b / 32), columns] for dim 0.
        num_bits: Width of a code, 1 to 8.
        count: Number of codes along the packed axis.
        dim: Axis that was packed.

    Returns:
        Codes, uint8 on the CPU, [rows, count] or [count, columns].

    Raises:
        TypeError: words is not a Tensor.
        ValueError: Wrong dtype, rank or number of words; num_bits or dim out of range.
    """
    _check("unpack", "words", words, torch.int32, num_bits, dim)
    if dim == 0:
        return unpack(words.T, num_bits, count).T.contiguous()
    rows = words.shape[0]
    if words.shape[1] != words_for(count, num_bits):
        raise ValueError(
            f"unpack: words must have ceil(count * num_bits / 32) = {words_for(count, num_bits)} columns, "
            f"got {words.shape[1]}"
        )
    out = np.empty((rows, count), dtype=np.uint8)
    step = max(1, _CHUNK // max(count, 1))
    octets = -(-count // 8)
    for start in range(0, rows, step):
        stream = (
            words[start : start + step].contiguous().cpu().numpy().astype("<i4", copy=False).view(np.uint8)
        )
        padded = np.zeros((len(stream), octets * num_bits), dtype=np.uint8)
        width = min(stream.shape[1], padded.shape[1])
        padded[:, :width] = stream[:, :width]
        units = np.zeros((len(stream), octets, 8), dtype=np.uint8)
        units[:, :, :num_bits] = padded.reshape(len(stream), octets, num_bits)
        codes = _scatter(units.view("<u8")[:, :, 0], num_bits).view(np.uint8)
        out[start : start + step] = codes[:, :count]
    return torch.from_numpy(out)


def _gather(units: np.ndarray[Any, Any], num_bits: int) -> np.ndarray[Any, Any]:
    """Eight codes, one in each byte, to 8 b adjacent bits: neighbouring lanes close up, three times."""
    for lane, held in zip(_LANES, (num_bits, 2 * num_bits, 4 * num_bits), strict=True):
        low = _repeated((1 << lane) - 1, 2 * lane)
        units = (units & low) | ((units & ~low) >> np.uint64(lane - held))
    return units


def _scatter(units: np.ndarray[Any, Any], num_bits: int) -> np.ndarray[Any, Any]:
    """Undo `_gather`."""
    for lane, held in zip(_LANES[::-1], (4 * num_bits, 2 * num_bits, num_bits), strict=True):
        low = _repeated((1 << held) - 1, 2 * lane)
        units = (units & low) | ((units & (low << np.uint64(held))) << np.uint64(lane - held))
    return units


def _repeated(mask: int, period: int) -> np.uint64:
    """A mask at every `period` bits of 64."""
    found: np.uint64 = np.uint64(sum(mask << place for place in range(0, 64, period)))
    return found


def pack_per_word(codes: Tensor, num_bits: int) -> Tensor:
    """Undo `unpack_per_word` along rows, for rewriting a file of that layout; idle bits are zero.

    Args:
        codes: Unsigned codes below 2^num_bits, uint8, [rows, columns].
        num_bits: Width of a code, 1 to 8.

    Returns:
        Words, int32 on the CPU, [rows, ceil(columns / (32 // b))].

    Raises:
        TypeError: codes is not a Tensor.
        ValueError: Wrong dtype or rank, num_bits out of range, or a code does not fit.
    """
    _check("pack_per_word", "codes", codes, torch.uint8, num_bits, 1)
    if codes.numel() and int(codes.max()) >> num_bits:
        raise ValueError(
            f"pack_per_word: codes must be below 2^num_bits = {1 << num_bits}, got {int(codes.max())}"
        )
    held = 32 // num_bits
    rows, columns = codes.shape
    words = -(-columns // held)
    padded = np.zeros((rows, words * held), dtype=np.uint8)
    padded[:, :columns] = codes.cpu().numpy()
    out = np.zeros((rows, words), dtype="<u4")
    for place in range(held):
        out |= padded[:, place::held].astype("<u4") << np.uint32(place * num_bits)
    return torch.from_numpy(out.view("<i4").astype(np.int32, copy=False))


def unpack_per_word(words: Tensor, num_bits: int, count: int, *, dim: int = 1) -> Tensor:
    """Unpack the layout of compressed-tensors before 0.18: floor(32 / b) codes in each word, high bits idle.

    Args:
        words: Packed words, int32, [rows, ceil(count / (32 // b))], or transposed for dim 0.
        num_bits: Width of a code, 1 to 8; the two layouts differ at 3, 5, 6 and 7.
        count: Number of codes along the packed axis.
        dim: Axis that was packed.

    Returns:
        Codes, uint8 on the CPU, [rows, count] or [count, columns].

    Raises:
        TypeError: words is not a Tensor.
        ValueError: Wrong dtype, rank or number of words; num_bits or dim out of range.
    """
    _check("unpack_per_word", "words", words, torch.int32, num_bits, dim)
    if dim == 0:
        return unpack_per_word(words.T, num_bits, count).T.contiguous()
    held = 32 // num_bits
    if words.shape[1] != -(-count // held):
        raise ValueError(
            f"unpack_per_word: words must have ceil(count / {held}) = {-(-count // held)} columns, got {words.shape[1]}"
        )
    values = words.contiguous().cpu().numpy().astype("<i4", copy=False).view("<u4")
    mask = np.uint32((1 << num_bits) - 1)
    codes = np.empty((*values.shape, held), dtype=np.uint8)
    for place in range(held):
        codes[:, :, place] = (values >> np.uint32(place * num_bits)) & mask
    return torch.from_numpy(
        np.ascontiguousarray(codes.reshape(len(values), values.shape[1] * held)[:, :count])
    )


def _check(op: str, argument: str, tensor: Tensor, dtype: torch.dtype, num_bits: int, dim: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {argument} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise ValueError(f"{op}: {argument} must have dtype = {dtype}, got {tensor.dtype}")
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {argument} must have 2 dimensions, got {tensor.dim()}")
    if not MIN_BITS <= num_bits <= MAX_BITS:
        raise ValueError(f"{op}: num_bits must be in [{MIN_BITS}, {MAX_BITS}], got {num_bits}")
    if dim not in (0, 1):
        raise ValueError(f"{op}: dim must be 0 or 1, got {dim}")
