"""A plan: the memory, time and communication of an experiment's programs on a topology, as a table and as JSON.

All figures are compiler estimates.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emollama_jax.config import Config, to_dict
from emollama_jax.io.atomic import write_json
from emollama_jax.io.text_table import align
from emollama_jax.plan.compiler import Compiler, Job, figures
from emollama_jax.plan.estimate import Estimate, estimate
from emollama_jax.plan.topology import GIB, Topology
from emollama_jax.sharding import mesh_sizes

ROWS = 8  # requests, images or sounds on a device, the default of prediction and extraction
SERVED = ("data", "fsdp")


@dataclass(frozen=True)
class ProgramPlan:
    """One program of a plan.

    Attributes:
        figures: the compiler's, as `worker.compile_program` returns them.
        estimate: None where the program does not fit.
        largest: rows of the largest batch that fits, extrapolated from two compiled ones; None if not computed.
    """

    program: str
    config: Config
    topology: Topology
    rows: int
    figures: Mapping[str, Any]
    estimate: Estimate | None
    largest: int | None = None

    @property
    def peak(self) -> float:
        """Bytes of a device that the program takes, or would take."""
        return float(self.figures.get("peak", self.figures.get("needs", 0)))

    @property
    def fits(self) -> bool:
        return "peak" in self.figures and self.peak <= self.topology.chip.memory

    @property
    def kinds(self) -> dict[str, float]:
        """Bytes of a device by their content. Padding is what layouts add to the arguments."""
        kinds = dict(self.figures["bytes"])
        arguments = self.figures.get("arguments", sum(kinds.values()))
        kinds["padding"] = max(0, arguments - sum(kinds.values()))
        kinds["temporaries"] = max(0, self.peak - arguments)
        return {kind: float(size) for kind, size in kinds.items()}

    def moved(self, *, crosses: bool | None = None) -> dict[str, float]:
        """Bytes that one device sends, by kind of collective: in all, or only between slices or only within them."""
        sums: dict[str, float] = defaultdict(float)
        for one in self.figures.get("collectives", ()):
            if crosses is None or one["crosses"] == crosses:
                sums[one["kind"]] += one["bytes"] * one["times"]
        return dict(sums)


@dataclass(frozen=True)
class Plan:
    """The programs of an experiment on a topology."""

    name: str
    config: Config
    topology: Topology
    programs: tuple[ProgramPlan, ...]

    @property
    def fits(self) -> bool:
        return all(planned.fits for planned in self.programs)

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis}={size}" for axis, size in get_mesh_sizes(self.config, self.topology).items())
        lines = [
            f"{self.name} on {self.topology.name}: {self.topology.size} x {self.topology.chip.kind}, mesh {mesh}",
            "Compiler estimates under the assumptions below; nothing has been measured.",
            *memory_table(self.programs),
            "",
            *time_table(self.programs),
            "",
            *collective_table(self.programs),
            "",
            *(f"- {line}" for line in [*self._remedies(), *assumptions(self.topology)]),
        ]
        return "\n".join(lines)

    def _remedies(self) -> list[str]:
        return [remedy(planned) for planned in self.programs if not planned.fits]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        chip = self.topology.chip
        assumed = {name: getattr(chip, name) for name in ("kind", "memory", "clock", "link", "network")}
        return {
            "what": "compiler estimates",
            "name": self.name,
            "topology": self.topology.name,
            "devices": self.topology.size,
            "assumed": assumed | {"flops": chip.flops, "bandwidth": chip.bandwidth},
            "config": to_dict(self.config),
            "programs": [summary(planned) for planned in self.programs],
        }

    def save(self, file: Path) -> None:
        write_json(file, self.to_dict())


def make_plan(
    name: str,
    config: Config,
    topology: Topology,
    compiler: Compiler,
    programs: Sequence[str] = ("step",),
    *,
    with_largest: bool = True,
) -> Plan:
    """Compiles programs, of `programs.PROGRAMS`, and makes a plan of their figures.

    Args:
        with_largest: also compile a step of twice the rows, for the largest batch.

    Raises:
        UserError: the experiment does not fit the topology, or cannot be compiled for it.
    """
    get_mesh_sizes(config, topology)
    jobs = [Job(config, topology, program, default_rows(program, config, topology)) for program in programs]
    more = [dataclasses.replace(job, rows=2 * job.rows) for job in jobs if with_largest and job.program == "step"]
    found = figures(compiler, [*jobs, *more])
    planned = [make_program_plan(job, one) for job, one in zip(jobs, found, strict=False)]
    if more:
        twice, at = make_program_plan(more[0], found[-1]), programs.index("step")
        planned[at] = dataclasses.replace(planned[at], largest=largest_rows(planned[at], twice))
    return Plan(name, config, topology, tuple(planned))


def default_rows(program: str, config: Config, topology: Topology) -> int:
    """Rows of the whole batch of a program: the experiment's for a step, ROWS a device for the others."""
    if program == "step":
        return config.data.batch_rows
    sizes = get_mesh_sizes(config, topology)
    split = topology.size if program not in ("prefill", "decode") else math.prod(sizes[axis] for axis in SERVED)
    return ROWS * split


def get_mesh_sizes(config: Config, topology: Topology) -> dict[str, int]:
    """The sizes of the experiment's mesh on the topology. Raises UserError where it does not fit."""
    return mesh_sizes(dataclasses.asdict(config.mesh), topology.size)


def make_program_plan(job: Job, found: Mapping[str, Any]) -> ProgramPlan:
    """The plan of one program, with an estimate if it compiled."""
    seconds = "peak" in found and estimate(job.program, job.config, job.topology, job.rows, found)
    return ProgramPlan(job.program, job.config, job.topology, job.rows, found, seconds or None)


def largest_rows(one: ProgramPlan, other: ProgramPlan) -> int:
    """Rows of the largest batch that fits, by the line through the memory of two batches of different rows."""
    slope = (other.peak - one.peak) / (other.rows - one.rows)
    sizes = get_mesh_sizes(one.config, one.topology)
    step = math.prod(sizes[axis] for axis in SERVED) * one.config.train.grad_accum_steps
    room = one.topology.chip.memory - one.peak
    if slope <= 0:
        return max(one.rows, other.rows) if one.fits else 0
    return max(0, math.floor((one.rows + room / slope) / step) * step)


def remedy(planned: ProgramPlan) -> str:
    """One line with the remedy for a program that does not fit."""
    chip, config = planned.topology.chip, planned.config
    line = (
        f"{planned.program} does not fit: it needs {planned.peak / GIB:.2f} GiB of {chip.memory / GIB:.2f} GiB a chip; "
    )
    if planned.largest:
        return f"{line}set --config.data.batch_rows={planned.largest}"
    ways = []
    if config.llama.kernel_dtype not in ("int8", "nf4"):
        ways.append("--config.llama.kernel_dtype=int8")
    if config.llama.remat != "full":
        ways.append("--config.llama.remat=full")
    if get_mesh_sizes(config, planned.topology)["data"] > planned.topology.slices:
        ways.append("a mesh with less data and more fsdp")
    return line + f"try {' or '.join([*ways, 'a larger topology'])}"


def memory_table(programs: Sequence[ProgramPlan]) -> list[str]:
    kinds = list(dict.fromkeys(kind for planned in programs for kind in planned.kinds))
    rows = [["GiB a chip", "rows", *kinds, "peak", "of", "fits", "largest"]]
    for planned in programs:
        cells = [f"{planned.kinds[kind] / GIB:.3f}" if kind in planned.kinds else "" for kind in kinds]
        memory = [f"{planned.peak / GIB:.2f}", f"{planned.topology.chip.memory / GIB:.2f}"]
        largest = "" if planned.largest is None else f"{planned.largest} rows"
        rows.append([planned.program, str(planned.rows), *cells, *memory, "yes" if planned.fits else "NO", largest])
    return align(rows)


def time_table(programs: Sequence[ProgramPlan]) -> list[str]:
    rows = [["ms", "arithmetic", "memory", "compute", "hidden", "exposed", "a run", "rate", "a chip", "MFU"]]
    for planned in programs:
        if seconds := planned.estimate:
            parts = (seconds.arithmetic, seconds.memory, seconds.compute, seconds.hidden, seconds.exposed)
            rows.append(
                [
                    planned.program,
                    *(f"{1e3 * part:,.1f}" for part in (*parts, seconds.seconds)),
                    f"{seconds.rate:,.0f} {seconds.unit}/s",
                    f"{seconds.rate / planned.topology.size:,.0f}",
                    "" if seconds.mfu is None else f"{seconds.mfu:.0%}",
                ]
            )
    return align(rows)


def collective_table(programs: Sequence[ProgramPlan]) -> list[str]:
    rows = [["GiB sent by a chip", "collective", "in its slice", "between slices"]]
    for planned in programs:
        within, between = planned.moved(crosses=False), planned.moved(crosses=True)
        for kind in dict.fromkeys((*within, *between)):
            cells = (f"{moved.get(kind, 0) / GIB:.3f}" for moved in (within, between))
            rows.append([planned.program, kind, *cells])
    return align(rows) if len(rows) > 1 else ["no collectives"]


def assumptions(topology: Topology) -> list[str]:
    chip = topology.chip
    clock = f", {chip.clock / 1e9:.2f} GHz" if chip.clock else ""
    counted = "the compiler's cycles at that clock, with attention kernels at the peak"
    plain = ["attention is XLA's here: cuDNN's, which training takes, is not compiled without a GPU"]
    return [
        *(plain if topology.platform == "cuda" else []),
        f"assumed of a chip: {chip.flops / 1e12:,.0f} TFLOP/s, memory {chip.bandwidth / 1e9:,.0f} GB/s{clock}, links "
        f"{chip.link / 1e9:,.0f} GB/s, to other slices {chip.network / 1e9:,.1f} GB/s",
        "arithmetic: all operations, recomputed ones too, at the peak; memory: the arguments read once; compute: "
        + (counted if chip.clock else "the larger of these, a floor, as the compiler counts no cycles for GPUs"),
        "a run: the longest of computation and the collectives hidden behind it, and the exposed ones after it; "
        "MFU counts the operations of the mathematics alone",
    ]


def summary(planned: ProgramPlan) -> dict[str, Any]:
    """A program in JSON's types."""
    seconds = planned.estimate
    return {
        "program": planned.program,
        "rows": planned.rows,
        "fits": planned.fits,
        "largest_rows": planned.largest,
        "bytes": planned.kinds,
        "peak_bytes": planned.peak,
        "bytes_sent_in_slice": planned.moved(crosses=False),
        "bytes_sent_between_slices": planned.moved(crosses=True),
        "estimate": seconds and dataclasses.asdict(seconds) | {"seconds": seconds.seconds},
        "compile_s": planned.figures.get("compile_s"),
        "host_gib": planned.figures["host_gib"],
        "cached": planned.figures["cached"],
    }
