"""Looks for the fastest way to run an experiment's training step on a topology, by compiling candidates.

It changes one thing at a time and keeps what is better: first how many copies of the model there are, then over how
many devices each layer is split, then what is recomputed together with the rows that a chip works on at once, how the
frozen kernels are stored, and the attention kernel. So it need not find the best of all. Candidates train on the
experiment's own batch, in parts where a chip takes less at once, or on a larger one.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from emollama_jax.config import Config, to_dict
from emollama_jax.errors import UserError
from emollama_jax.io.atomic import write_json
from emollama_jax.io.text_table import align
from emollama_jax.models.layers import QUANTISED
from emollama_jax.plan.compiler import Compiler, Job
from emollama_jax.plan.plan import SERVED, ProgramPlan, get_mesh_sizes, make_program_plan, summary
from emollama_jax.plan.topology import GIB, Topology

ROWS = (1, 2, 4, 8)  # that a chip of data x fsdp works on at once
TENSOR = (2, 4, 8)
CHOICES = {"remat": ("full", "dots", "none"), "kernel_dtype": ("bfloat16", "int8", "nf4"), "attention": ("auto", "xla")}


def search(
    config: Config, topology: Topology, compiler: Compiler, log: Callable[[str], None] = lambda line: None
) -> list[ProgramPlan]:
    """Compiles candidates and returns them, the best first: those that fit by tokens a second, then the others.

    Args:
        log: receives a line for each candidate, compiled or not.

    Raises:
        UserError: none could be compiled.
    """
    found: dict[Config, ProgramPlan] = {}
    errors: list[str] = []

    def best_with(candidates: Iterable[Config]) -> Config:
        new = [candidate for candidate in dict.fromkeys(candidates) if candidate not in found]
        jobs = [Job(candidate, topology, "step", candidate.data.batch_rows) for candidate in new]
        for job, figures in zip(jobs, compiler.compile(jobs), strict=True):
            if "error" in figures:
                errors.append(figures["error"])
                log(errors[-1])
            else:
                found[job.config] = make_program_plan(job, figures)
                log("  ".join(ranking_row(found[job.config])))
        if not found:
            raise UserError(f"no candidate could be compiled; the first: {errors[0]}")
        return ranked(found.values())[0].config

    def best_of_rows(best: Config) -> Config:
        """Ever more rows, for each way of recomputation, as long as they fit and one of them is better."""
        ways = list(_choices(best, "remat"))
        for number in ROWS:
            tried = [with_rows(way, number, config, topology) for way in ways]
            best = best_with(tried)
            ways = [way for way in tried if way in found and found[way].fits]
            if best not in ways:
                break
        return best

    best = best_with(copies(config, topology))
    for tensor in TENSOR:
        split = list(splits(best, tensor, config, topology))
        best = best_with(split)
        if best not in split:
            break
    best = best_of_rows(best)
    kernels = best.llama.kernel_dtype
    best = best_with(_choices(best, "kernel_dtype"))
    if best.llama.kernel_dtype != kernels:
        best = best_of_rows(best)
    if topology.platform == "tpu":
        best_with(_choices(best, "attention"))
    return ranked(found.values())


def ranked(planned: Iterable[ProgramPlan]) -> list[ProgramPlan]:
    """The best first: those that fit by tokens a second, the others by what they lack. Where seconds are equal, as the
    estimates for GPUs often are: fewer parts, the more exact kernels, less memory."""
    return sorted(planned, key=lambda one: (not one.fits, *(_order(one) if one.fits else (one.peak,))))


def _order(one: ProgramPlan) -> tuple[float | int, ...]:
    kernels = one.config.llama.kernel_dtype
    coarseness = 1 + QUANTISED.index(kernels) if kernels in QUANTISED else 0
    return -one.estimate.rate, one.config.train.grad_accum_steps, coarseness, one.peak


def copies(config: Config, topology: Topology) -> Iterator[Config]:
    """One candidate for each way to make the topology's devices from data x fsdp; slices are copies of the model."""
    for data in range(topology.slices, topology.size + 1, topology.slices):
        if topology.size % data == 0:
            mesh = {"data": data, "fsdp": topology.size // data, "tensor": 1}
            yield with_rows(changed(config, mesh=mesh), 1, config, topology)


def splits(best: Config, tensor: int, config: Config, topology: Topology) -> Iterator[Config]:
    """Candidates whose layers are split over so many devices, taken from either axis of the best so far."""
    before = get_mesh_sizes(best, topology)
    more = tensor // before["tensor"]
    for axis in SERVED:
        mesh = before | {axis: before[axis] // more, "tensor": tensor}
        divides = before[axis] % more == 0 and mesh["data"] % topology.slices == 0
        if divides and config.llama.num_kv_heads % tensor == 0:
            yield with_rows(changed(best, mesh=mesh), 1, config, topology)


def with_rows(one: Config, number: int, config: Config, topology: Topology) -> Config:
    """The candidate with so many rows at once on a chip: in parts of the batch of `config`, the experiment, where that
    is larger, else of its own. It trains on as many rows in all: in larger batches there are fewer steps, and the rates
    are the experiment's times the root, as Adam wants (Malladi et al. 2022, arXiv:2205.10287)."""
    sizes = get_mesh_sizes(one, topology)
    at_once = number * math.prod(sizes[axis] for axis in SERVED)
    parts = math.ceil(config.data.batch_rows / at_once)
    times, before, train = parts * at_once / config.data.batch_rows, config.train, {"grad_accum_steps": parts}
    if times > 1:
        train["steps"] = max(1, round(before.steps / times))
        train["warmup_steps"] = min(round(before.warmup_steps / times), train["steps"] - 1)
        for name in ("warmup_from", "learning_rate", "final_rate"):
            train[name] = float(f"{getattr(before, name) * math.sqrt(times):.3g}")
    return changed(one, data={"batch_rows": parts * at_once}, train=train)


def _choices(one: Config, field: str) -> Iterator[Config]:
    """The candidate with each value of a field of `config.llama` that is tried."""
    for choice in CHOICES[field]:
        floats = {"int8_products": "none"} if field == "kernel_dtype" and choice != "int8" else {}
        yield changed(one, llama={field: choice, **floats})


def changed(config: Config, **groups: dict[str, Any]) -> Config:
    """The experiment with other values in fields of its groups."""
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **fields) for group, fields in groups.items()}
    )


def ranking_table(found: list[ProgramPlan]) -> list[str]:
    head = ["mesh data x fsdp x tensor", "rows", "parts", *CHOICES, "GiB", "tokens/s", "MFU"]
    return align([head, *map(ranking_row, found)])


def ranking_row(one: ProgramPlan) -> list[str]:
    mesh = " x ".join(map(str, get_mesh_sizes(one.config, one.topology).values()))
    speed = [f"{one.estimate.rate:,.0f}", f"{one.estimate.mfu:.0%}"] if one.fits else ["does not fit", ""]
    fields = [getattr(one.config.llama, field) for field in CHOICES]
    return [mesh, str(one.rows), str(one.config.train.grad_accum_steps), *fields, f"{one.peak / GIB:.2f}", *speed]


def save_ranking(file: Path, name: str, found: list[ProgramPlan]) -> None:
    """The candidates as JSON, in the order of the table."""
    candidates = [summary(one) | {"config": to_dict(one.config)} for one in found]
    text = {"what": "compiler estimates", "name": name, "topology": found[0].topology.name, "candidates": candidates}
    write_json(file, text)
