"""Shared by all measurements: random models, alternating repeats, the machine and its peaks, the table and the JSON."""

import dataclasses
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.dtypes
from flax import nnx

from emollama_jax.bench.profile import Breakdown, profile
from emollama_jax.config import Config
from emollama_jax.errors import UserError
from emollama_jax.io.atomic import write_json
from emollama_jax.io.text_table import align
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.models.llama import Llama
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.sharding import init_sharded
from emollama_jax.train.speed import device_peak_flops
from emollama_jax.weights.engine import first_device

OURS = "emollama_jax"
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "peft")
Figures = dict[str, float | int]
# Does a contender's work once: (the amounts of AMOUNTS and other figures, what it produced). `alternate` times it.
Measure = Callable[[], tuple[Figures, Any]]
AMOUNTS = ("clips", "tokens", "targets")
SETTLE_S = 0.3  # pause between two contenders, until the threads of the one before are idle


def machine() -> dict[str, Any]:
    """The processor, memory, device and package versions that the figures hold for."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": jax.devices()[0].device_kind,
        "platform": jax.devices()[0].platform,
        "versions": versions,
    }


def machine_lines(machine: Mapping[str, Any]) -> list[str]:
    """What `machine` gave, as the head of a table."""
    text = "machine   {cpu}, {cores} cores, {memory_gib} GiB".format(**machine)
    device = "" if machine["platform"] == "cpu" else f"; {machine['device']}"
    versions = [f"{name} {version}" for name, version in machine["versions"].items() if version]
    return [f"{text}{device}", f"versions  {', '.join(versions)}"]


def peak_memory() -> dict[str, float]:
    """Peak memory of this process in GiB: on the host, and on the first device if JAX reports it."""
    unit = 1 if sys.platform == "darwin" else 1024
    memory = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    on_device = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in on_device:
        memory["device_gib"] = on_device["peak_bytes_in_use"] / 2**30
    return memory


def stored_bytes(module: nnx.Module) -> int:
    """Memory of a module's parameters."""
    leaves = jax.tree.leaves(nnx.state(module))
    return sum(leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) for leaf in leaves) // 8


def check_one_device(config: Config) -> None:
    """Raises a UserError for a mesh of several devices."""
    for axis, size in dataclasses.asdict(config.mesh).items():
        if size != 1:
            raise UserError(f"config.mesh.{axis}={size}: bench measures one device; leave config.mesh at 1")


def random_llama(config: Config, lora: LoRAConfig = LoRAConfig(rank=0)) -> Llama:
    """The experiment's language model with random parameters, on the first device."""
    mesh = first_device()
    llama = config.llama.for_devices(mesh.devices.flat)
    return init_sharded(lambda: Llama(llama, lora, rngs=nnx.Rngs(config.seed)), mesh, ())


def random_emotion_llama(config: Config, *, with_encoder: bool = False) -> EmotionLlama:
    """The experiment's model with random parameters on the first device; with the encoder of the frame on request."""
    mesh = first_device()
    llama, eva_vit = (part.for_devices(mesh.devices.flat) for part in (config.llama, config.eva_vit))
    parts = (llama, config.lora, config.projectors, eva_vit)
    make = lambda: EmotionLlama.init(*parts, with_encoder=with_encoder, rngs=nnx.Rngs(config.seed))
    return init_sharded(make, mesh, ())


@dataclass
class Result:
    """One contender at one batch size of one kind of work: the figures of every repeat, the first call (compilation,
    warm-up) apart, and what its last call produced. The figure named `rate` says which repeat was best. `breakdown` is
    of one more call, where it was profiled."""

    who: str
    what: str
    batch: int
    rate: str
    first_call_s: float
    runs: list[Figures]
    output: Any
    breakdown: Breakdown | None = None

    @property
    def best(self) -> Figures:
        return max(self.runs, key=lambda run: run[self.rate])


def alternate(
    contenders: Mapping[str, Measure | None],
    *,
    batch: int,
    repeats: int,
    what: str = "",
    rate: str = "clips_per_s",
    derive: Callable[[Figures], Figures] = lambda run: {},
    trace: Path | None = None,
) -> list[Result]:
    """Calls each contender once to warm up, then all in turn, `repeats` times.

    A run's figures are the contender's own; `seconds`, where it does not time itself; every amount a second, as
    `clips_per_s`; and what is derived from these.

    Args:
        contenders: by name; None is left out.
        rate: the figure that says which run is the best.
        derive: further figures of a run, from its others.
        trace: a folder for the profiler's trace of one more call of ours.
    """

    def timed(measure: Measure) -> tuple[Figures, Any]:
        start = time.perf_counter()
        figures, output = measure()
        figures = {"seconds": time.perf_counter() - start, **figures}
        figures |= {f"{amount}_per_s": figures[amount] / figures["seconds"] for amount in AMOUNTS if amount in figures}
        return figures | derive(figures), output

    results = []
    for who, measure in contenders.items():
        if measure is not None:
            start = time.perf_counter()
            _, output = timed(measure)
            results.append(Result(who, what, batch, rate, time.perf_counter() - start, [], output))
    for _ in range(repeats):
        for result in results:
            time.sleep(SETTLE_S)
            figures, result.output = timed(contenders[result.who])
            result.runs.append(figures)
    for result in results:
        if trace is not None and result.who == OURS:
            result.breakdown = profile(contenders[OURS], trace)
    return results


def add_speed(
    results: Sequence[Result], flops: Callable[[Result], float], meaning: str, *, flops_4n: float | None = None
) -> tuple[dict[str, str], list[str]]:
    """Adds TFLOP/s and the share of the device's peak to every run; (columns, notes), empty for an unknown device.

    Args:
        flops: floating-point operations of a run of this result.
        meaning: which operations are counted.
        flops_4n: those of a run by the rule of thumb, 4 a weight and token; adds their share of the peak.
    """
    peak = device_peak_flops(jax.devices()[0].device_kind)
    if peak is None:
        return {}, []
    for result in results:
        for run in result.runs:
            run["tflops"] = flops(result) / run["seconds"] / 1e12
            run["peak_percent"] = 100 * run["tflops"] * 1e12 / peak.flops
            if flops_4n is not None:
                run["percent_4n"] = 100 * flops_4n / run["seconds"] / peak.flops
    columns = {"tflops": "TFLOP/s", "peak_percent": "% peak"}
    if flops_4n is not None:
        columns["percent_4n"] = "% at 4N"
        meaning += "; at 4N: 4 a weight and token"
    note = f"TFLOP/s: {meaning}; the peak is {peak.flops / 1e12:,.0f}"
    return columns, [note]


def with_dtype(config: Config, names: Sequence[str], dtype: str | None) -> Config:
    """The experiment with kernels and activations of the named encoders in `dtype`; None is float32 on CPUs, the
    experiment's own elsewhere."""
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else None)
    changes = {"kernel_dtype": dtype, "compute_dtype": dtype} if dtype else {}
    return dataclasses.replace(config, **{n: dataclasses.replace(getattr(config, n), **changes) for n in names})


@dataclass
class Report:
    """A finished measurement.

    Attributes:
        columns: the figures of the table, by name in `Result.runs`, with their headings.
    """

    title: str
    config: dict[str, Any]
    settings: dict[str, Any]
    columns: dict[str, str]
    results: list[Result]
    notes: list[str]

    def __post_init__(self):
        self.machine, self.memory = machine(), peak_memory()

    def __str__(self) -> str:
        settings = [f"{name.replace('_', ' ')} {value}" for name, value in self.settings.items()]
        memory = [f"{value:.2f} GiB on the {name[:-4]}" for name, value in self.memory.items()]
        return "\n".join(
            [
                self.title,
                *machine_lines(self.machine),
                f"settings  {', '.join(settings)}",
                "",
                *align(self._rows()),
                "",
                *(f"- {note}" for note in self.notes),
                f"- the most memory this process held: {', '.join(memory)}",
                *(line for result in self.results if result.breakdown for line in ("", *result.breakdown.lines())),
            ]
        )

    def _rows(self) -> list[list[str]]:
        rows = [["", "batch", *self.columns.values(), "first call s", "speed-up"]]
        peers = {(result.what, result.batch): result for result in self.results if result.who != OURS}
        for result in self.results:
            figures = [_number(result.best[name]) if name in result.best else "" for name in self.columns]
            peer = peers.get((result.what, result.batch))
            speed_up = ""
            if result.who == OURS and peer:
                speed_up = f"{result.best[result.rate] / peer.best[result.rate]:.2f}x"
            name, first_call = f"{result.what} {result.who}".strip(), f"{result.first_call_s:.1f}"
            rows.append([name, str(result.batch), *figures, first_call, speed_up])
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything, with every repeat, in JSON's types."""
        names = ("who", "what", "batch", "first_call_s", "runs", "best")
        results = [{name: getattr(result, name) for name in names} for result in self.results]
        for found, result in zip(results, self.results, strict=True):
            if result.breakdown:
                found["breakdown"] = result.breakdown.to_dict()
        fields = ("title", "machine", "memory", "config", "settings", "notes")
        return {name: getattr(self, name) for name in fields} | {"results": results}

    def save(self, file: Path) -> None:
        write_json(file, self.to_dict())


def _number(value: float | int) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
