"""Reads the text of a compiled program: its collectives with the bytes they move, and the compiler's cycles.

The text holds the body of a loop once. Here it counts as often as it runs, by the loop's condition; where the condition
does not say (decoding ends when all answers have ended) it counts once.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"[ )]({'|'.join(KINDS)})(-start)?\(")
# Between slices of TPUs a program sends through its host what the collective's part within the slice has left.
_BETWEEN = re.compile(r" send\(.*_xla_megascale_transfer_type=\"(\w+)\"")
# What runs beside computation is, for TPUs, several fusions: one starts it, others carry it on, the last ends it.
_ASYNC = re.compile(r"\s*(ROOT )?%async-|.* async-start\(")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s64": 64, "u64": 64, "f64": 64}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective of a program.

    Attributes:
        bytes: sent by one device each time it runs, as a ring would.
        times: how often it runs.
        hidden: whether the compiler lets it run beside computation.
        crosses: whether devices of different slices take part.
        what: the array that it moves, as in f32[4096,64].
    """

    kind: str
    bytes: float
    times: int
    hidden: bool
    crosses: bool
    what: str


@dataclass(frozen=True, slots=True)
class Work:
    """All collectives of a program, and the cycles that the compiler counts for its computation (0 for GPUs)."""

    collectives: tuple[Collective, ...]
    cycles: float


def read_work(text: str, slice_of: Sequence[int]) -> Work:
    """The work of an optimised program.

    Args:
        slice_of: the slice of each device, in the order of the program's mesh.
    """
    computations, entry = _computations(text)
    found: dict[tuple, Collective] = {}
    cycles = 0.0

    def walk(name: str, times: int, fused: bool, hidden: bool) -> None:
        nonlocal cycles
        for line in computations.get(name, ()):
            body = re.split(r", metadata=|, backend_config=", line)[0]
            if match := _COLLECTIVE.search(body):
                channel = re.search(r"channel_id=(\d+)", line)
                # The start, steps and end of one collective share its channel.
                key = (match[1], channel[1] if channel else body, times)
                if key not in found:
                    found[key] = _collective(body, match, times, hidden or bool(match[2]), slice_of)
            if between := _BETWEEN.search(line):
                found[(body, times)] = _between_slices(body, between[1], times, len(set(slice_of)))
            if not fused and (count := re.search(r'"estimated_cycles":"(\d+)"', line)):
                cycles += int(count[1]) * times
            if " while(" in body:
                condition, inside = (re.search(rf"{part}=%?([\w.\-]+)", body)[1] for part in ("condition", "body"))
                known = re.search(r"known_trip_count\D*(\d+)", line)
                trips = int(known[1]) if known else _trips(computations, condition, inside)
                walk(inside, times * trips, fused, hidden)
            else:
                for called in _called(body):
                    walk(called, times, True, hidden or bool(_ASYNC.match(body)) or "async" in called)

    walk(entry, 1, False, False)
    return Work(tuple(found.values()), cycles)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the one that is run."""
    computations: dict[str, list[str]] = {}
    current = entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = match[2]
            computations[current] = []
            entry = current if match[1] else entry
        elif line == "}":
            current = ""
        elif current and line.startswith("  "):
            computations[current].append(line)
        elif current and computations[current]:  # attributes of a kernel, over several lines
            computations[current][-1] += f" {line}"
    return computations, entry


def _called(body: str) -> Iterator[str]:
    for names in re.findall(r"(?:calls|called_computations|branch_computations)=\{?([^,}]+(?:, %[^,}]+)*)", body):
        yield from re.findall(r"%([\w.\-]+)", names)


def _collective(body: str, match: re.Match, times: int, hidden: bool, slice_of: Sequence[int]) -> Collective:
    kind, is_start = match[1], bool(match[2])
    arrays = re.findall(r"([a-z]\w*)\[([\d,]*)\]", body[: match.start()].partition("=")[2])
    arrays = [(dtype, dims) for dtype, dims in arrays if not (is_start and dims == "")]  # without its semaphores
    if is_start and kind in ("all-gather", "collective-permute"):  # operands, then results
        arrays = arrays[len(arrays) // 2 :]
    size = sum(_bytes(*array) for array in arrays)
    groups = _groups(body, len(slice_of))
    members = max(map(len, groups))
    sent = {
        "all-gather": (members - 1) / members,
        "all-reduce": 2 * (members - 1) / members,
        "reduce-scatter": members - 1,
        "collective-permute": 1,
    }.get(kind, (members - 1) / members)
    crosses = any(len({slice_of[device] for device in group}) > 1 for group in groups)
    return Collective(kind, float(size * sent), times, hidden, crosses, " ".join(f"{t}[{d}]" for t, d in arrays))


def _between_slices(body: str, transfer: str, times: int, slices: int) -> Collective:
    (dtype, dims), *_ = re.findall(r"([a-z]\w*)\[([\d,]*)\]", body.partition("=")[2])
    kind = transfer.lower().replace("_", "-")
    sent = 2 * (slices - 1) / slices if kind == "all-reduce" else slices - 1
    return Collective(kind, float(_bytes(dtype, dims) * sent), times, True, True, f"{dtype}[{dims}]")


def _bytes(dtype: str, dims: str) -> float:
    bits = 8 if dtype.startswith("f8") else _BITS.get(dtype, 32)
    return math.prod(int(size) for size in dims.split(",") if size) * bits / 8


def _groups(body: str, devices: int) -> list[list[int]]:
    """The devices that take part together, in any of the notations of HLO."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", body):
        return _lists(pairs[1])
    if lists := re.search(r"replica_groups=\{(\{.*?\})\}", body):
        return _lists(lists[1])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", body):
        return _iota(iota[2]).reshape(_ints(iota[1])).tolist()
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", body):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(axes.values()))
        return _mesh_groups(ids, axes, re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[3]))
    return [list(range(devices))]


def _mesh_groups(ids: np.ndarray, axes: dict[str, int], over: list[tuple[str, str, str]]) -> list[list[int]]:
    """Groups over axes of a mesh, or over a part of an axis: ('a', '2', '4') is 4 of a's steps, after the first 2."""
    shape, chosen = [], []
    for name, size in axes.items():
        part = next((entry for entry in over if entry[0] == name), None)
        before, width = (int(part[1]), int(part[2])) if part and part[1] else (1, size if part else 1)
        chosen += [len(shape) + 1] if part else []
        shape += [before, width, size // before // width]
    rest = [axis for axis in range(len(shape)) if axis not in chosen]
    grouped = ids.reshape(shape).transpose(*rest, *chosen)
    return grouped.reshape(-1, math.prod(shape[axis] for axis in chosen)).tolist()


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0): the numbers from 0 in that shape, transposed."""
    dims, _, order = text.partition("T")
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return ids.transpose(_ints(order)).ravel() if order else ids.ravel()


def _ints(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _lists(text: str) -> list[list[int]]:
    return [_ints(group) for group in re.findall(r"\{([\d,]*)\}", text)]


def _trips(computations: dict[str, list[str]], condition: str, body: str) -> int:
    """How often a loop runs that counts from 0 to a constant, in steps of a constant."""
    tests, steps = _definitions(computations[condition]), _definitions(computations[body])
    end = re.search(r"compare\(%?([\w.\-]+), %?([\w.\-]+)\)", tests.get("ROOT", ""))
    if not end:
        return 1
    limit = _constant(tests.get(end[2], ""))
    index = re.search(r"index=(\d+)", re.sub(r"/\*.*?\*/", "", tests.get(end[1], "")))
    if limit is None or not index:
        return 1
    carried = re.search(r"tuple\((.*?)\)(?:,|$)", steps.get("ROOT", ""))
    names = re.findall(r"%([\w.\-]+)", carried[1]) if carried else []
    name, step = names[int(index[1])] if int(index[1]) < len(names) else "", 0
    # The loop may be unrolled: its counter is then the end of a chain of additions.
    while add := re.search(r" add\(%?([\w.\-]+), %?([\w.\-]+)\)", steps.get(name, "")):
        constants = [_constant(steps.get(operand, "")) for operand in add.groups()]
        step += sum(number or 0 for number in constants)
        name = next((operand for operand, number in zip(add.groups(), constants, strict=True) if number is None), "")
    return max(1, -(-limit // (step or 1)))


def _definitions(lines: list[str]) -> dict[str, str]:
    """The lines of a computation by the name that each defines; its result also as ROOT."""
    named = {}
    for line in lines:
        if match := re.match(r"\s*(ROOT )?%?([\w.\-]+) =", line):
            named[match[2]] = line
            if match[1]:
                named["ROOT"] = line
    return named


def _constant(line: str) -> int | None:
    match = re.search(r"constant\((\d+)\)", line)
    return int(match[1]) if match else None
