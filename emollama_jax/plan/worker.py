"""Compiles one program in a process of its own, which returns its memory and whose crash harms no other.

    python -m emollama_jax.plan.worker REQUEST.json RESULT.json

The request holds the experiment, the topology, the program and its rows; the result the compiler's figures, or one line
of `error`.
"""

import dataclasses
import json
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax

from emollama_jax.config import Config, from_dict
from emollama_jax.errors import UserError, first_line
from emollama_jax.plan.hlo import read_work
from emollama_jax.plan.programs import make_program
from emollama_jax.plan.topology import GIB, Topology, parse_topology
from emollama_jax.sharding import make_mesh
from emollama_jax.weights.encoders import ENCODERS

# Autotuning runs kernels on the GPU; without one the library's are used.
WITHOUT_GPU = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile_program(config: Config, topology: Topology, name: str, rows: int) -> dict[str, Any]:
    """Returns the compiler's figures, each of one device: `bytes` of the arguments by kind, `peak` memory,
    `collectives` and `cycles`; if the memory does not suffice only `bytes` and `needs`, the memory it would take.

    Raises:
        UserError: the experiment does not fit the topology, or a part of it cannot be compiled for it.
    """
    mesh = make_mesh(dataclasses.asdict(config.mesh), topology.devices())
    if topology.platform == "cuda":
        check_bfloat16(config, topology, name)
        config = without_cudnn(config)
    program = make_program(name, config, mesh, rows=rows)
    start = time.monotonic()
    try:
        options = WITHOUT_GPU if topology.platform == "cuda" else None
        compiled = program.lower().compile(compiler_options=options)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        needs = memory_needed(str(error), sum(program.bytes.values()))
        if needs is None:
            raise UserError(
                f"{name} on {topology.name}: the compiler refuses it ({first_line(error)}); "
                "try --config.llama.attention=xla"
            ) from error
        return {"bytes": program.bytes, "needs": needs}
    memory, work = compiled.memory_analysis(), read_work(compiled.as_text(), _slices(topology, mesh))
    return {
        "bytes": program.bytes,
        "arguments": memory.argument_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "collectives": [dataclasses.asdict(one) for one in work.collectives],
        "cycles": work.cycles,
        "compile_s": time.monotonic() - start,
    }


def check_bfloat16(config: Config, topology: Topology, name: str) -> None:
    """Raises a UserError where the program computes in bfloat16 and the GPU cannot."""
    if topology.chip.target["cuda_compute_capability"] >= (8, 0):
        return
    groups = [name] if name in ENCODERS else ["llama", "eva_vit"] if name == "step" else ["llama"]
    for group in groups:
        if getattr(config, group).compute_dtype == "bfloat16":
            raise UserError(
                f"config.{group}.compute_dtype=bfloat16: {topology.chip.kind} does not multiply in it; "
                f"set --config.{group}.compute_dtype=float16"
            )


def without_cudnn(config: Config) -> Config:
    """The experiment with XLA's attention in place of cuDNN's, which cannot be compiled without a GPU."""
    groups = {name: getattr(config, name) for name in ("llama", *ENCODERS)}
    plain = {
        name: dataclasses.replace(group, attention="xla")
        for name, group in groups.items()
        if group.attention in ("auto", "cudnn")
    }
    return dataclasses.replace(config, **plain)


def memory_needed(message: str, arguments: int) -> float | None:
    """Bytes of a device that the compiler's out-of-memory error names; None for another error.

    Args:
        arguments: bytes of the program's arguments, which some of these errors leave out.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    whole = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    beside = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds", message)
    if found := whole or beside:
        return float(found[1]) * UNITS[found[2]] + (0 if whole else arguments)
    return None


def _slices(topology: Topology, mesh: jax.sharding.Mesh) -> list[int]:
    """The slice or node of every device, in the order of the mesh."""
    if topology.platform == "cuda":
        return [number * topology.slices // mesh.size for number in range(mesh.size)]
    return [getattr(device, "slice_index", 0) or 0 for device in mesh.devices.flat]


def main(request: Path, result: Path) -> None:
    wanted = json.loads(request.read_text())
    try:
        config, topology = from_dict(wanted["config"]), parse_topology(wanted["topology"])
        found = compile_program(config, topology, wanted["program"], wanted["rows"])
    except UserError as error:
        found = {"error": str(error)}
    found["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
