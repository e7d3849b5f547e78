"""Looks for the fastest way to run an experiment's training step on a topology, by compiling candidates.

It changes one thing at a time and keeps what is better: first the mesh, then the rows of a chip, what is recomputed,
how the frozen kernels are stored, the attention kernel, and the rows again. So it need not find the best of all.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from emollama_jax.config import Config
from emollama_jax.errors import UserError
from emollama_jax.plan.compiler import Compiler, Job
from emollama_jax.plan.plan import Planned, align, planned_of, sizes_of
from emollama_jax.plan.topology import GIB, Topology

ROWS = (1, 2, 4, 8)  # of a chip of data x fsdp
FIELDS = ("remat", "kernel_dtype", "attention")


def search(
    config: Config, topology: Topology, compiler: Compiler, say: Callable[[str], None] = lambda line: None
) -> list[Planned]:
    """The candidates that were compiled, the best first: those that fit by tokens a second, then the others.

    Args:
        say: is told of each that was compiled, and of each that could not be.

    Raises:
        UserError: none could be compiled.
    """
    found: dict[Config, Planned] = {}
    errors: list[str] = []

    def try_all(candidates: list[Config]) -> Config:
        new = [candidate for candidate in dict.fromkeys(candidates) if candidate not in found]
        jobs = [Job(candidate, topology, "step", candidate.data.batch_rows) for candidate in new]
        for job, figures in zip(jobs, compiler.compile(jobs), strict=True):
            if "error" in figures:
                errors.append(figures["error"])
                say(errors[-1])
            else:
                found[job.config] = planned_of(job, figures)
                say("  ".join(cells_of(found[job.config])))
        if not found:
            raise UserError(f"no candidate could be compiled; the first: {errors[0]}")
        return ranked(found.values())[0].config

    best = try_all(list(meshes(config, topology)))
    best = try_all(list(rows(best, topology)))
    for field, choices in choices_of(topology).items():
        best = try_all([changed(best, llama={field: choice}) for choice in choices])
    try_all(list(rows(best, topology)))
    return ranked(found.values())


def ranked(planned: Any) -> list[Planned]:
    """The best first; of those that do not fit, the one that lacks least."""
    return sorted(planned, key=lambda one: (not one.fits, -one.estimate.rate if one.fits else one.peak))


def meshes(config: Config, topology: Topology) -> Iterator[Config]:
    """One candidate for each way to make the topology's devices from data x fsdp x tensor, at the same rows a chip;
    slices are copies of the model. The heads divide by tensor."""
    before = sizes_of(config, topology)
    rows_before = max(config.train.accumulate, config.data.batch_rows // (before["data"] * before["fsdp"]))
    heads = config.llama.num_kv_heads
    for tensor in (n for n in _divisors(topology.size // topology.slices) if heads % n == 0 and n <= 8):
        for data in _divisors(topology.size // tensor):
            if data % topology.slices == 0:
                sizes = {"data": data, "fsdp": topology.size // tensor // data, "tensor": tensor}
                yield changed(config, mesh=sizes, data={"batch_rows": rows_before * sizes["data"] * sizes["fsdp"]})


def rows(config: Config, topology: Topology) -> Iterator[Config]:
    sizes = sizes_of(config, topology)
    for number in ROWS:
        split = number * sizes["data"] * sizes["fsdp"] * config.train.accumulate
        yield changed(config, data={"batch_rows": split})


def choices_of(topology: Topology) -> dict[str, tuple[str, ...]]:
    """The values that are tried of fields of `config.llama`."""
    attention = ("auto", "xla") if topology.platform == "tpu" else ("auto",)
    return dict(zip(FIELDS, (("full", "dots", "none"), ("bfloat16", "int8", "nf4"), attention), strict=True))


def changed(config: Config, **groups: dict[str, Any]) -> Config:
    """The experiment with other values in fields of its groups."""
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **fields) for group, fields in groups.items()}
    )


def ranking_table(found: list[Planned]) -> list[str]:
    head = ["mesh data x fsdp x tensor", "rows", *FIELDS, "GiB", "tokens/s", "MFU"]
    return align([head, *map(cells_of, found)])


def cells_of(one: Planned) -> list[str]:
    mesh = " x ".join(map(str, sizes_of(one.config, one.topology).values()))
    speed = [f"{one.estimate.rate:,.0f}", f"{one.estimate.mfu:.0%}"] if one.fits else ["does not fit", ""]
    fields = [getattr(one.config.llama, field) for field in FIELDS]
    return [mesh, str(one.rows), *fields, f"{one.peak / GIB:.2f}", *speed]


def write_overlay(file: Path, base: str, one: Planned) -> None:
    """A config file: the experiment `base` with what a candidate changes, its figures in the docstring."""
    file.write_text(overlay(base, one), encoding="utf-8")


def overlay(base: str, one: Planned) -> str:
    """The text of that file."""
    config, seconds, topology = one.config, one.estimate, one.topology
    if not one.fits:
        raise UserError(f"no candidate fits {topology.name}; the one that lacks least needs {one.peak / GIB:.2f} GiB")
    sizes = ", ".join(f"{axis}={size}" for axis, size in sizes_of(config, topology).items())
    fields = ", ".join(f'{field}="{getattr(config.llama, field)}"' for field in FIELDS)
    return f'''"""{base} on {topology.name}, as `emollama plan --search` chose it.

    emollama plan --config {base} --topology {topology.name} --search

Expected: by compiler estimates, {one.peak / GIB:.2f} of {topology.chip.memory / GIB:.2f} GiB a chip, \
{1e3 * seconds.seconds:,.0f} ms a step, {seconds.rate:,.0f} tokens/s,
{seconds.mfu:.0%} MFU. Nothing has been measured.
"""

import dataclasses

from emollama_jax.config import Config, MeshConfig, load_config


def get_config() -> Config:
    base = load_config("{base}")
    return dataclasses.replace(
        base,
        mesh=MeshConfig({sizes}),
        data=dataclasses.replace(base.data, batch_rows={config.data.batch_rows}),
        llama=dataclasses.replace(base.llama, {fields}),
    )
'''


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
