# SPDX-License-Identifier: Apache-2.0
"""Run compiled PTX on a CPU, all threads of a block in lockstep: what the interpreter cannot show of inline assembly.

Covers the instructions of the projected step, with IEEE rounding; the approximate reciprocal and root come out one unit
in the last place off, either way by the value's bits, as the hardware may. Branches must be uniform.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

WIDTHS = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}


def _fma(a: Any, b: Any, c: Any) -> Any:
    """Fused multiply-add of float32: the product is exact in float64, the sum is rounded to odd and then once more."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    inexact = np.isfinite(error) & (error != 0) & (total.view(np.uint64) % 2 == 0)
    odd = np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total)
    return odd.astype(np.float32)


def _nearby(value: Any) -> Any:
    """float64 to float32, one unit off by the parity of its bits: an approximate instruction."""
    near = value.astype(np.float32)
    bits = near.view(np.uint32)
    up = np.where(bits % 3 == 0, np.inf, np.where(bits % 3 == 1, -np.inf, near)).astype(np.float32)
    return np.where(np.isfinite(near) & (near != 0), np.nextafter(near, up), near)


class Memory:
    """Buffers at made-up addresses; an access outside of them fails."""

    def __init__(self) -> None:
        self.bytes = np.zeros(0, np.uint8)
        self.spans: list[tuple[int, Any]] = []

    def add(self, array: Any) -> int:
        """Copy a buffer in; return its address."""
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        begin = -(-len(self.bytes) // 256) * 256 + 256
        self.bytes = np.concatenate([self.bytes, np.zeros(begin - len(self.bytes), np.uint8), raw])
        self.spans.append((begin, begin + len(raw)))
        return begin

    def check(self, address: Any, size: int) -> None:
        """Every address with its bytes lies in one buffer."""
        inside = np.zeros(address.shape, bool)
        for begin, end in self.spans:
            inside |= (address >= begin) & (address + size <= end)
        assert inside.all(), f"access outside of every buffer: {address[~inside][:4]}"

    def load(self, address: Any, size: int) -> Any:
        """Little-endian unsigned numbers of `size` bytes."""
        self.check(address, size)
        return self.bytes[address[:, None] + np.arange(size)].copy().view(WIDTHS[str(8 * size)])[:, 0]

    def store(self, address: Any, value: Any, size: int) -> None:
        """As `load`; two threads must not write one byte."""
        self.check(address, size)
        places = (address[:, None] + np.arange(size)).reshape(-1)
        assert len(np.unique(places)) == len(places), "two threads write one byte"
        self.bytes[places] = np.ascontiguousarray(value.astype(WIDTHS[str(8 * size)])).view(np.uint8)


def _float_operations() -> dict[str, Callable[..., Any]]:
    def clamp(value: Any) -> Any:
        return np.where(value > 0, np.minimum(value, 1), 0).astype(np.float32)  # NaN becomes 0

    def propagate(function: Callable[..., Any]) -> Callable[..., Any]:
        def operation(a: Any, b: Any) -> Any:
            return np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), function(a, b))

        return operation

    def add_down(a: Any, b: Any) -> Any:
        exact = a.astype(np.float64) + b.astype(np.float64)
        near = exact.astype(np.float32)
        return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near).astype(np.float32)

    return {
        "add.rn.f32": np.add, "sub.rn.f32": np.subtract, "mul.rn.f32": np.multiply, "abs.f32": np.abs,
        "neg.f32": np.negative, "sqrt.rn.f32": np.sqrt, "div.rn.f32": np.divide, "fma.rn.f32": _fma,
        "add.rm.f32": add_down, "min.f32": np.fmin, "max.f32": np.fmax,
        "min.NaN.f32": propagate(np.minimum), "max.NaN.f32": propagate(np.maximum),
        "mul.rn.sat.f32": lambda a, b: clamp(a * b), "add.sat.f32": lambda a, b: clamp(a + b),
        "sub.sat.f32": lambda a, b: clamp(a - b),
        "rcp.approx.ftz.f32": lambda a: _nearby(1 / a.astype(np.float64)),
        "rsqrt.approx.ftz.f32": lambda a: _nearby(1 / np.sqrt(a.astype(np.float64))),
    }  # fmt: skip


FLOAT = _float_operations()


def _prmt(a: Any, b: Any, selector: Any) -> Any:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(a)
    for place in range(4):
        nibble = (selector >> np.uint32(4 * place)) & np.uint32(15)
        byte = ((both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(
            np.uint32
        )
        byte = np.where(nibble & 8, np.where(byte & 128, np.uint32(255), np.uint32(0)), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * place)
    return result


def _lop3(a: Any, b: Any, c: Any, table: Any) -> Any:
    result = np.zeros_like(a)
    for row in range(8):
        if int(table[0]) >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _short(bits: Any) -> Any:
    """float32 to bfloat16, to nearest even; bits of both."""
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(nan, np.uint32(0x7FFF), rounded).astype(np.uint16)


def _narrow(value: Any, kind: str) -> Any:
    """float32 to the bits of bfloat16 or float16, to nearest even."""
    if kind.startswith("bf16"):
        return _short(value.view(np.uint32))
    with np.errstate(over="ignore"):
        return value.astype(np.float16).view(np.uint16)


def _wide(bits: Any, kind: str) -> Any:
    """The float32 of bfloat16's or float16's bits."""
    if kind.startswith("bf16"):
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def _dp4a(a: Any, b: Any, c: Any) -> Any:
    for shift in (np.uint32(0), np.uint32(8), np.uint32(16), np.uint32(24)):
        c = c + ((a >> shift) & np.uint32(255)) * ((b >> shift) & np.uint32(255))
    return c


def _bfe(value: Any, start: Any, length: Any) -> Any:
    begin, count = int(start[0]), int(length[0])
    bits = value.dtype.itemsize * 8
    return (value << value.dtype.type(bits - begin - count)) >> value.dtype.type(bits - count)


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "neu": np.not_equal,
}  # fmt: skip


def _parts(line: str) -> tuple[str, list[str]]:
    """An instruction's name and its operands, those in brackets whole."""
    name, rest = (line.split(None, 1) + [""])[:2]
    return name, re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)


class Block:
    """One thread block."""

    def __init__(self, ptx: str, memory: Memory, parameters: Iterable[int], grid: tuple[int, int]) -> None:
        self.threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
        self.memory, self.parameters, self.grid = memory, list(parameters), grid
        self.lines, self.labels, self.scopes = [], {}, 0
        body = ptx[ptx.index("{") : ptx.rindex("ret;")]
        scope = ""
        for statement in re.split(r"[;\n]", re.sub(r"//[^\n]*", "", body)):
            text = statement.strip()
            if text.startswith("{"):
                self.scopes += 1
                scope, text = f"%scope{self.scopes}_", text[1:].strip()
            if text.startswith("}"):
                scope, text = "", text[1:].strip()
            if re.fullmatch(r"\$\w+:", text):
                self.labels[text[:-1]] = len(self.lines)
            elif text and not text.startswith("."):
                # Registers of an assembly block are its own.
                self.lines.append(
                    re.sub(r"(?<![\w%.$])([a-z])(?![\w.])", scope + r"\1", text) if scope else text
                )
        # What some instruction writes; of any other register the compiler knows that its value does not matter.
        self.assigned: set[str] = set()
        for line in self.lines:
            name, operands = _parts(re.sub(r"^@!?%p\d+\s+", "", line))
            if operands and not name.startswith(("st.", "red.", "bra")):
                self.assigned.update(re.findall(r"%\w+", operands[0]))

    def run(self, x: int, y: int) -> None:
        """Execute the block (x, y)."""
        self.registers: dict[str, Any] = {}
        self.shared = Memory()
        smem = self.shared.add(np.zeros(1 << 14, np.uint8))
        self.special = {"%tid.x": np.arange(self.threads), "%ctaid.x": x, "%ctaid.y": y,
                        "%nctaid.x": self.grid[0], "%nctaid.y": self.grid[1], "global_smem": smem}  # fmt: skip
        at = 0
        with np.errstate(all="ignore"):
            while at < len(self.lines):
                jump = self._execute(self.lines[at])
                at = self.labels[jump] if jump else at + 1

    def value(self, name: str, dtype: Any) -> Any:
        """An operand's bits as `dtype`."""
        if name in self.special:
            return np.broadcast_to(np.asarray(self.special[name]), self.threads).astype(dtype)
        if name in self.registers:
            found = self.registers[name]
        elif name.startswith("%"):
            assert name not in self.assigned, f"{name} is read before it is written"
            found = np.full(self.threads, 0xA5A5A5A5A5A5A5A5, np.uint64)  # rubbish, so that a use of it shows
        elif name.startswith("0f"):
            found = np.full(self.threads, int(name[2:], 16), np.uint32)
        else:
            size = np.dtype(dtype).itemsize * 8
            found = np.full(self.threads, int(name.rstrip("U"), 0) % (1 << size), WIDTHS[str(size)])
        if found.dtype == bool:
            return found
        wide = found.astype(WIDTHS[str(np.dtype(dtype).itemsize * 8)])
        return wide.view(dtype)

    def put(self, name: str, value: Any, mask: Any) -> None:
        """Write a register where the guard holds."""
        if value.dtype != bool:
            value = np.ascontiguousarray(value).view(WIDTHS[str(value.dtype.itemsize * 8)])
        if not mask.all():
            # Rubbish where nothing was ever written, so that a use of it shows.
            rubbish = np.frombuffer(bytes([0xA5] * 8 * self.threads), value.dtype)[: self.threads]
            old = self.registers.get(name, rubbish)
            value = np.where(mask, value, old.astype(value.dtype))
        self.registers[name] = value

    def _execute(self, line: str) -> str | None:
        mask = np.ones(self.threads, bool)
        guard = re.match(r"@(!?)(%p\d+)\s+(.*)", line)
        if guard:
            mask, line = self.registers[guard[2]] ^ bool(guard[1]), guard[3]
        name, operands = _parts(line)
        if name.startswith("bra"):
            assert mask.all() or not mask.any(), "a branch is not uniform"
            return operands[0] if mask.all() else None
        if name.startswith(("ld.", "st.", "atom.", "red.")):
            self._access(name, operands, mask)
        elif name.startswith(("ldmatrix", "stmatrix")):
            self._matrix(name, operands, mask)
        elif name.startswith("mov") and any(o.startswith("{") for o in operands):
            self._move_parts(operands, mask)
        elif not name.startswith("bar"):
            self.put(operands[0], self._compute(name, operands[1:]), mask)
        return None

    def _move_parts(self, operands: list[str], mask: Any) -> None:
        """Two registers of 16 bits as one of 32, or the other way."""
        low, high = re.findall(r"%\w+", next(o for o in operands if o.startswith("{")))
        if operands[0].startswith("{"):
            whole = self.value(operands[1], np.uint32)
            for name, shift in ((low, 0), (high, 16)):
                self.put(name, (whole >> np.uint32(shift)).astype(np.uint16), mask)
        else:
            parts = [self.value(name, np.uint16).astype(np.uint32) for name in (low, high)]
            self.put(operands[0], parts[0] | parts[1] << np.uint32(16), mask)

    def _matrix(self, name: str, operands: list[str], mask: Any) -> None:
        """8 x 8 tiles of 16 bits: lanes 8 j to 8 j + 7 hold addresses of tile j's rows; lane l has bits of row l/4."""
        assert mask.all() and ".m8n8." in name and ".shared" in name and ".trans" not in name
        load = name.startswith("ld")
        place, registers = (operands[1], operands[0]) if load else (operands[0], operands[1])
        base, _, offset = place[1:-1].partition("+")
        rows = self.value(base.strip(), np.int64) + int(offset or "0", 0)
        lane = np.arange(self.threads) % 32
        first = np.arange(self.threads) - lane
        for tile, register in enumerate(re.findall(r"%\w+", registers)):
            address = rows[first + 8 * tile + lane // 4] + 4 * (lane % 4)
            if load:
                self.put(register, self.shared.load(address, 4), mask)
            else:
                self.shared.store(address, self.value(register, np.uint32), 4)

    def _access(self, name: str, operands: list[str], mask: Any) -> None:
        size = int(name.rsplit(".", 1)[1][1:]) // 8
        place = next(o for o in operands if o.startswith("["))[1:-1]
        base, _, offset = place.partition("+")
        if name.startswith("ld.param"):
            number = int(re.search(r"param_(\d+)", base)[1])
            bits = np.full(self.threads, self.parameters[number] % (1 << 64), np.uint64)
            if ".s32" in name:  # into a register of 64 bits
                self.put(operands[0], bits.astype(np.uint32).view(np.int32).astype(np.int64), mask)
            else:
                self.put(operands[0], bits.astype(WIDTHS[str(8 * size)]), mask)
            return
        memory = self.shared if ".shared" in name else self.memory
        address = self.value(base.strip(), np.int64)[mask] + int(offset or "0", 0)
        if name.startswith("atom"):
            assert "add" in name
            target, value = operands[0], self.value(operands[2], WIDTHS[str(8 * size)])[mask]
            for one, added in zip(address, value, strict=True):
                place_of_one = np.array([one])
                old = memory.load(place_of_one, size)
                memory.store(place_of_one, old + added, size)
            self.put(target, np.zeros(self.threads, WIDTHS[str(8 * size)]), mask)
            return
        load = name.startswith("ld")
        names = re.findall(r"%?\w+", operands[0 if load else 1])
        for lane, register in enumerate(names):
            if load:
                value = np.zeros(self.threads, WIDTHS[str(8 * size)])
                value[mask] = memory.load(address + lane * size, size)
                self.put(register, value, mask)
            else:
                memory.store(address + lane * size, self.value(register, WIDTHS[str(8 * size)])[mask], size)

    def _compute(self, name: str, operands: list[str]) -> Any:
        parts = name.split(".")
        if name in FLOAT:
            return FLOAT[name](*(self.value(o, np.float32) for o in operands)).astype(np.float32)
        if parts[0] == "cvt" and parts[1] == "rn" and parts[2].startswith(("bf16", "f16")):
            assert parts[3] == "f32"
            # The first of two is the upper half.
            halves = [_narrow(self.value(o, np.float32), parts[2]) for o in operands]
            return halves[0] if len(halves) == 1 else halves[0].astype(np.uint32) << np.uint32(16) | halves[1]
        if parts[0] == "cvt":
            return self._convert(parts, operands[0])
        if name.startswith("add.rn.") and "16" in parts[-1]:
            width = np.uint32 if parts[-1].endswith("x2") else np.uint16
            left, right = (_wide(self.value(o, width).view(np.uint16), parts[-1]) for o in operands)
            # A float32 sum rounded again is the sum rounded once: 24 bits are twice 11 and two more.
            return _narrow(left + right, parts[-1]).view(width)
        if name.endswith(".pred"):
            given = [self.value(o, np.uint32) != 0 for o in operands]
            return {"mov": lambda a: a, "not": np.invert, "and": np.logical_and, "or": np.logical_or,
                    "xor": np.logical_xor}[parts[0]](*given)  # fmt: skip
        if parts[-1] == "u16x2":  # two halves, each for itself
            left, right = (self.value(o, np.uint32).view(np.uint16) for o in operands)
            return {"min": np.minimum, "max": np.maximum, "add": np.add}[parts[0]](left, right).view(
                np.uint32
            )
        size = parts[-1][1:]
        dtype = {"s": {"16": np.int16, "32": np.int32, "64": np.int64}, "f": {"32": np.float32}}.get(
            parts[-1][0], WIDTHS
        )[size]
        if parts[0] in ("mul", "mad") and parts[1] == "wide":
            wide = np.int64 if parts[-1][0] == "s" else np.uint64
            result = self.value(operands[0], dtype).astype(wide) * self.value(operands[1], dtype).astype(wide)
            return result + self.value(operands[2], wide) if parts[0] == "mad" else result
        if parts[0] in ("shr", "shl"):
            value, amount = self.value(operands[0], dtype), int(self.value(operands[1], np.uint32)[0])
            return value >> dtype(amount) if parts[0] == "shr" else value << dtype(amount)
        if parts[0] == "selp":
            chosen = self.registers[operands[2]]
            return np.where(chosen, self.value(operands[0], dtype), self.value(operands[1], dtype))
        if parts[0] == "shfl":
            assert parts[2] == "bfly" and operands[2:] == ["31", "-1"]
            lanes = np.arange(self.threads) ^ int(operands[1], 0)
            return self.value(operands[0], np.uint32)[lanes]
        if parts[0] == "redux":
            operands = operands[:1]
        values = [self.value(o, dtype) for o in operands]
        if parts[0] == "setp":
            return COMPARE[parts[1]](values[0], values[1])
        if parts[0] == "redux":
            return np.repeat(values[0].reshape(-1, 32).sum(axis=1, dtype=dtype), 32)
        return {
            "mov": lambda a: a, "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and,
            "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "mad": lambda a, b, c: a * b + c,
            "prmt": _prmt, "lop3": _lop3, "dp4a": _dp4a, "bfe": _bfe, "min": np.minimum, "max": np.maximum,
            "neg": np.negative, "rem": np.fmod, "div": lambda a, b: (a - np.fmod(a, b)) // b,
        }[parts[0]](*values)  # fmt: skip

    def _convert(self, parts: list[str], operand: str) -> Any:
        target, source = parts[-2], parts[-1]
        types = {"f32": np.float32, "bf16": np.uint16, "f16": np.uint16, "b64": np.uint64}
        for bits in ("8", "16", "32", "64"):
            types |= {f"u{bits}": WIDTHS[bits], f"s{bits}": np.dtype(f"int{bits}").type}
        value = self.value(operand, types[source])
        if source in ("bf16", "f16"):
            return _wide(value, source)
        if parts[1] == "rmi":
            # Saturates, NaN becomes 0, and an 8-bit result fills the 32-bit register.
            limits = np.iinfo(types[target])
            whole = np.clip(np.floor(np.where(np.isnan(value), 0, value)), limits.min, limits.max)
            return whole.astype(np.int64).astype(np.uint32)
        return value.astype(types[target])


def launch(ptx: str, memory: Memory, parameters: Iterable[int], grid: tuple[int, int]) -> None:
    """Run every block, one after another."""
    block = Block(ptx, memory, parameters, grid)
    for y in range(grid[1]):
        for x in range(grid[0]):
            block.run(x, y)
