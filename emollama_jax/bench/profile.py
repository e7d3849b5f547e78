"""Breakdown of a call by the operations of the device, from a trace of JAX's profiler.

The trace stays in its folder, for TensorBoard or Perfetto. The times here are of the operations themselves, without
those that they enclose, as a loop does its body's.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from emollama_jax.errors import first_line
from emollama_jax.io.text_table import align

# The first that fits an operation's names: those of XLA, and of the kernels of cuBLAS, cuDNN and CUTLASS.
KINDS = {
    "attention": r"attention|sdpa|fmha|flash|splash|softmax",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|matmul|dot|convolution",
    "collectives": r"nccl|all-reduce|all-gather|reduce-scatter|all-to-all|collective",
    "copies and layouts": r"memcpy|memset|copy|transpose|slice|concatenate|gather|scatter|pad|reshape",
    "sums and norms": r"reduce",
    "changes of dtype": r"convert",
}
OTHER = "element by element, and the rest"
LONGEST = 8  # operations of the table
WIDTH = 60  # letters of an operation's name in the table


class Operation(NamedTuple):
    """All runs of an operation; of those whose names differ in a number alone, together."""

    name: str
    kind: str
    times: int
    seconds: float


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a call went.

    Attributes:
        seconds: from the start of the first operation to the end of the last.
        busy: seconds of these in which any operation ran; the device waited in the others.
        operations: the longest first. Those that run side by side add up to more than `busy`.
        trace: the folder of the trace.
        obstacle: why there is no breakdown.
    """

    trace: str
    seconds: float = 0.0
    busy: float = 0.0
    operations: list[Operation] = field(default_factory=list)
    obstacle: str | None = None

    def kinds(self) -> dict[str, float]:
        """Seconds by kind, the longest first."""
        seconds = defaultdict(float)
        for operation in self.operations:
            seconds[operation.kind] += operation.seconds
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))

    def lines(self) -> list[str]:
        """A table of the kinds, and one of the longest operations."""
        if self.obstacle:
            return [f"no breakdown: {self.obstacle}"]
        total = sum(operation.seconds for operation in self.operations)
        part = lambda seconds: [f"{1e3 * seconds:,.2f}", f"{100 * seconds / total:.1f}"]
        head = ["ms", "%"]
        kinds = [["by kind", *head], *([kind, *part(seconds)] for kind, seconds in self.kinds().items())]
        longest = [
            [operation.name[:WIDTH], operation.kind, f"{operation.times:,}", *part(operation.seconds)]
            for operation in self.operations[:LONGEST]
        ]
        waited = 100 * (1 - self.busy / self.seconds)
        return [
            f"operations of one more call: {1e3 * self.seconds:,.1f} ms, of which the device waited {waited:.1f} %",
            *align(kinds),
            "",
            *align([["the longest", "kind", "times", *head], *longest]),
            f"the trace: {self.trace}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        fields = {name: getattr(self, name) for name in ("trace", "seconds", "busy", "obstacle")}
        return fields | {"operations": [operation._asdict() for operation in self.operations]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Breakdown":
        """What `to_dict` gave."""
        return cls(**values | {"operations": [Operation(**operation) for operation in values["operations"]]})


def profile(call: Callable[[], Any], folder: Path) -> Breakdown:
    """Calls once under the profiler, which writes its trace to the folder.

    An error is told in the breakdown: what was measured before is not lost for it.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # of the device alone
    try:
        with jax.profiler.trace(str(folder), profiler_options=options):
            call()
        return read_trace(folder)
    except Exception as error:
        return Breakdown(str(folder), obstacle=f"{type(error).__name__}: {first_line(error)}")


def read_trace(folder: Path) -> Breakdown:
    """Reads the newest trace in a folder."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        return Breakdown(str(folder), obstacle="the profiler wrote no trace")
    return break_down(ProfileData.from_file(str(files[-1])), str(folder))


def break_down(data: ProfileData, trace: str = "") -> Breakdown:
    """Sums up the operations of a trace: of the first accelerator, or else of the processor."""
    seconds, times, spans, kinds = defaultdict(float), defaultdict(int), [], {}
    for line in _lines(data):
        spans += [(start, end) for start, end, _, _ in line]
        for name, hlo, own in _own_times(line):
            name = re.sub(r"([._]\d+)+$", "", name)
            seconds[name] += own / 1e9
            times[name] += 1
            kinds.setdefault(name, kind_of(name, hlo))
    if not spans:
        return Breakdown(trace, obstacle="the trace holds no operations of the device")
    operations = [Operation(name, kinds[name], times[name], seconds[name]) for name in seconds]
    operations.sort(key=lambda operation: -operation.seconds)
    span = max(end for _, end in spans) - min(start for start, _ in spans)
    return Breakdown(trace, span / 1e9, _covered(spans) / 1e9, operations)


def kind_of(*names: str) -> str:
    """The kind of an operation of these names: its kernel's, and XLA's for it."""
    text = " ".join(names).lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, text)), OTHER)


Event = tuple[float, float, str, str]  # start and end in ns, its name, XLA's name for the operation


def _lines(data: ProfileData) -> Iterator[list[Event]]:
    """The operations of each stream or thread, in the order of their starts, what encloses before what it encloses."""
    planes = {plane.name: plane for plane in data.planes}
    accelerators = sorted(name for name in planes if re.match(r"/device:(GPU|TPU):\d+$", name))
    plane = planes.get(accelerators[0] if accelerators else "/host:CPU")
    for line in plane.lines if plane else ():
        if accelerators and not (line.name.startswith("Stream") or line.name == "XLA Ops"):
            continue  # the same time summed up otherwise
        events = []
        for event in line.events:
            hlo = dict(event.stats).get("hlo_op", "")
            if event.duration_ns and (accelerators or hlo) and not event.name.startswith("end: "):
                events.append((event.start_ns, event.start_ns + event.duration_ns, event.name, str(hlo)))
        yield sorted(events, key=lambda event: (event[0], -event[1]))


def _own_times(line: list[Event]) -> Iterator[tuple[str, str, float]]:
    """(name, XLA's name, ns without what it encloses) of each operation of a line."""
    own, open_events = [end - start for start, end, _, _ in line], []
    for i, (start, end, _, _) in enumerate(line):
        while open_events and line[open_events[-1]][1] <= start:
            open_events.pop()
        if open_events:
            own[open_events[-1]] -= min(end, line[open_events[-1]][1]) - start
        open_events.append(i)
    return ((name, hlo, time) for (_, _, name, hlo), time in zip(line, own, strict=True))


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
