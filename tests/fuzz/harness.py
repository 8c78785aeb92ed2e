# SPDX-License-Identifier: Apache-2.0
"""Mutated model files of every format: each must be read or refused with one clear error, quickly and in little memory.

python tests/fuzz/harness.py --count 10000 --out benchmarks/results/fuzz.json
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Run as a script, or loaded by its path: either way its neighbour is found here.
sys.path.insert(0, str(Path(__file__).resolve().parent))
from bases import base_files

from discquant.errors import UserError
from discquant.formats import registry
from discquant.formats.coded import Format
from discquant.formats.load import other_tensors

SECONDS = 5.0  # of CPU per file, whatever else the machine does; a whole one reads in milliseconds
MEMORY = 1 << 30  # bytes beyond what the process holds when the run begins
Files = dict[str, bytes]


def snapshot(path: Path) -> Files:
    """Every file's bytes, by relative name; a single file is named itself."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {
        str(f.relative_to(path)): f.read_bytes()
        for f in sorted(path.rglob("*"))
        if f.is_file() and not f.name.startswith(("discquant_", "README", "tokenizer"))
    }


JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 7, 2**31, 2**63, 2**64, 1e308, float("nan"), "", "x", "int32", "F16", "BOGUS",
    [], [0], [-1, 5], [2**40, 2**40], [[1]], {}, {"a": 1}, [None], "\u0000", [1] * 70,
)  # fmt: skip


def _paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [prefix] if prefix else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _paths(inner, (*prefix, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found += _paths(inner, (*prefix, index))
    return found


def mutate_json(text: bytes, rng: random.Random) -> bytes:
    """Damage a JSON document: an entry replaced, removed, renamed or doubled, or the text itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return flip(text, rng)
    kind = rng.randrange(8)
    if kind == 0:
        return text[: rng.randrange(len(text) + 1)]
    if kind == 1:
        return flip(text, rng)
    if kind == 2:
        depth = rng.choice((50, 2000, 100_000))
        return b"[" * depth + b"]" * depth
    if kind == 3:
        return json.dumps(rng.choice(JUNK)).encode()
    for _ in range(rng.randint(1, 3)):
        paths = _paths(value)
        if not paths:
            break
        *way, last = rng.choice(paths)
        holder = value
        for step in way:
            holder = holder[step]
        if kind == 4 and isinstance(holder, dict):
            del holder[last]
        elif kind == 5 and isinstance(holder, dict):
            holder[rng.choice(("", "x", "a" * 300, f"{last}.x"))] = holder.pop(last)
        elif isinstance(holder[last], int) and rng.random() < 0.5:
            holder[last] = holder[last] + rng.choice((-1, 1, 8, -8, 2**32, -(2**32), 2**62))
        else:
            # A copy: what is put in may itself be changed by the next round.
            holder[last] = copy.deepcopy(rng.choice(JUNK))
    return json.dumps(value).encode()


def flip(data: bytes, rng: random.Random) -> bytes:
    """Overwrite a few bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 16)):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Damage a header entry (dtype, shape, offsets, names), the header's length, or values (NaN scales)."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(6)
    if kind == 0:
        claimed = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, len(data), rng.randrange(2**20)))
        return struct.pack("<Q", claimed) + header + body
    if kind in (1, 2):
        table = json.loads(header)
        name = rng.choice([key for key in table if key != "__metadata__"])
        entry = table[name]
        what = rng.choice(("dtype", "shape", "data_offsets", "reshape"))
        if what == "dtype":
            entry["dtype"] = rng.choice(
                ("F16", "BF16", "F32", "F64", "I8", "U8", "I32", "I64", "BOOL", "F8_E4M3", "?")
            )
        elif what == "reshape":
            # As many bytes as before, in another shape: only a reader that checks shapes notices.
            size = 1
            for extent in entry["shape"]:
                size *= extent
            entry["shape"] = rng.choice(([size], [1, size], [size, 1], entry["shape"][::-1], [1, 1, size]))
        else:
            row = list(entry[what])
            if row:
                row[rng.randrange(len(row))] = rng.choice((-1, 0, 1, 2**31, 2**62, 2**64, 7, "3", None))
            entry[what] = row
        if rng.random() < 0.3:
            entry["data_offsets"] = [0, rng.choice((0, 1, len(body), len(body) * 2))]
        raw = json.dumps(table).encode()
    elif kind == 3:
        raw = mutate_json(header, rng)
    else:
        table = json.loads(header)
        names = [key for key in table if key != "__metadata__"]
        small = [key for key in names if "scale" in key or "bias" in key or "zero" in key] or names
        begin, end = table[rng.choice(small if rng.random() < 0.8 else names)]["data_offsets"]
        changed = bytearray(body)
        pattern = rng.choice((b"\xff", b"\xff\x7f", b"\x80\x7f", b"\x00", b"\x00\x7c", b"\x01\x00\x00\x80"))
        for place in range(begin, end):
            if rng.random() < 0.5 or kind == 5:
                changed[place] = pattern[(place - begin) % len(pattern)]
        return data[: 8 + length] + bytes(changed)
    return struct.pack("<Q", len(raw)) + raw + body


def mutate_binary(data: bytes, rng: random.Random) -> bytes:
    """Damage a file of counts and blocks: numbers near the front, NaN halves anywhere."""
    changed = bytearray(data)
    kind = rng.randrange(3)
    if kind == 0:
        return flip(data[: min(len(data), 4096)], rng) + data[4096:]
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(max(1, (min(len(data), 4096) if kind == 1 else len(data)) - 8))
        value = rng.choice((0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1, 0x7E007C00FFFF7FC0))
        width = rng.choice((4, 8))
        changed[place : place + width] = struct.pack("<Q", value)[:width]
    return bytes(changed)


def mutate(files: Files, rng: random.Random) -> Files:
    """One damaged copy: usually one file changed, sometimes one lost, cut or grown."""
    weights = [name for name in files if not name.endswith(".json")]
    name = rng.choice(weights if weights and rng.random() < 0.65 else list(files))
    data, damaged = files[name], dict(files)
    general = rng.random()
    if general < 0.12:
        damaged[name] = data[: rng.randrange(len(data) + 1)]
    elif general < 0.16:
        damaged[name] = data + rng.randbytes(rng.randint(1, 64))
    elif general < 0.19:
        del damaged[name]
    elif general < 0.30:
        damaged[name] = flip(data, rng)
    elif name.endswith(".json"):
        damaged[name] = mutate_json(data, rng)
    elif name.endswith(".safetensors"):
        damaged[name] = mutate_safetensors(data, rng)
    else:
        damaged[name] = mutate_binary(data, rng)
    return damaged


@dataclass
class Result:
    """What happened to the files of one format."""

    cases: int = 0
    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "cases": self.cases,
            "read": self.read,
            "refused": dict(sorted(self.refused.items())),
            "slowest_seconds": round(self.slowest_seconds, 3),
            "failures": self.failures,
        }


class TookTooLongError(BaseException):
    """The time limit of one file; no reader may catch it."""


@contextmanager
def limits() -> Iterator[None]:
    """Cap the address space a little above what is in use, and turn the alarm into an exception."""

    def late(number: int, frame: object) -> None:
        raise TookTooLongError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGPROF, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, handler)


def consume(chosen: Format, path: Path) -> None:
    """What every user of a file does first: find the format, describe it, decode every layer, read the rest."""
    registry.find(path)
    chosen.describe(path)
    for layer in chosen.read(path):
        layer.dequantize(torch.float32)
    for _ in other_tensors(chosen, path):
        pass


def check(chosen: Format, path: Path, result: Result, case: int) -> None:
    """Read one file under the limits and note what happened."""
    begin = time.process_time()
    result.cases += 1
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        consume(chosen, path)
        result.read += 1
    except (UserError, NotImplementedError) as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        result.refused[type(error).__name__] += 1
        message = str(error)
        if not message or len(message) > 2000:
            result.failures.append({"case": case, "error": f"message of {len(message)} characters"})
    except (Exception, TookTooLongError) as error:  # every other class is a finding
        signal.setitimer(signal.ITIMER_PROF, 0)
        place = traceback.extract_tb(error.__traceback__)[-1]
        result.failures.append(
            {
                "case": case,
                "error": f"{type(error).__name__}: {error}"[:200],
                "place": f"{Path(place.filename).name}:{place.lineno}",
            }
        )
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    result.slowest_seconds = max(result.slowest_seconds, time.process_time() - begin)


def fuzz(name: str, count: int, folder: Path, *, first: int = 0) -> Result:
    """Damage valid files of a format `count` times; case numbers are the seeds and choose the file."""
    chosen = registry.by_name(name)
    bases = [(base, snapshot(base)) for base in base_files(chosen, folder)]
    for base, _ in bases:
        consume(chosen, base)
    result = Result()
    place = folder / "case"
    with limits():
        for case in range(first, first + count):
            base, files = bases[case % len(bases)]
            damaged = mutate(files, random.Random(f"{name}:{case}"))
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            for file, data in damaged.items():
                (place / file).parent.mkdir(parents=True, exist_ok=True)
                (place / file).write_bytes(data)
            check(chosen, place / base.name if base.is_file() else place, result, case)
    return result


def merged(row: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    """The counts of two runs over different cases together."""
    if row is None:
        return more
    refused = Counter(row["refused"]) + Counter(more["refused"])
    return {
        "cases": row["cases"] + more["cases"],
        "read": row["read"] + more["read"],
        "refused": dict(sorted(refused.items())),
        "slowest_seconds": max(row["slowest_seconds"], more["slowest_seconds"]),
        "failures": row["failures"] + more["failures"],
        "cpu_seconds": round(row["cpu_seconds"] + more["cpu_seconds"], 1),
    }


def main() -> None:
    """Fuzz the named formats up to the count, some cases of each in turn, and write the counts after every turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--turn", type=int, default=500)
    parser.add_argument("--formats", default=",".join(registry.names()))
    parser.add_argument(
        "--out", type=Path, help="continued where it exists; a finding stays in it until it is removed"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if options.out is not None and options.out.exists():
        found = json.loads(options.out.read_text())
    for end in range(options.turn, options.count + options.turn, options.turn):
        for name in options.formats.split(","):
            done = found[name]["cases"] if name in found else 0
            count = min(end, options.count) - done
            if count <= 0:
                continue
            with tempfile.TemporaryDirectory() as folder:
                begin = time.process_time()
                result = fuzz(name, count, Path(folder), first=done)
            spent = round(time.process_time() - begin, 1)
            found[name] = merged(found.get(name), {**result.to_dict(), "cpu_seconds": spent})
            shown = {key: value for key, value in found[name].items() if key != "failures"}
            print(name, json.dumps({**shown, "failures": len(found[name]["failures"])}), flush=True)
            for failure in result.failures[:20]:
                print("  ", failure, flush=True)
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(1 if any(row["failures"] for row in found.values()) else 0)


if __name__ == "__main__":
    main()
