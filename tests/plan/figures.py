"""Made-up figures of a compiler, for what is reckoned from them."""

from typing import Any

from emollama_jax.config import Config, load_config
from emollama_jax.plan.compiler import Job
from emollama_jax.plan.plan import ProgramPlan, make_program_plan
from emollama_jax.plan.search import changed
from emollama_jax.plan.topology import GIB, parse_topology


def experiment(**groups: dict[str, Any]) -> Config:
    return changed(load_config("stage1_merr"), **groups)


def collective(kind: str = "all-gather", size: float = 1e6, **changes) -> dict[str, Any]:
    one = {"kind": kind, "bytes": size, "times": 3, "hidden": False, "crosses": False, "what": "f32[8]"}
    return {**one, **changes}


def figures(peak_gib: float = 4.0, **changes) -> dict[str, Any]:
    usual = {
        "bytes": {"frozen": GIB, "trainable": GIB // 4},
        "arguments": 1.5 * GIB,
        "peak": peak_gib * GIB,
        "collectives": [collective()],
        "cycles": 1.5e9,
        "compile_s": 1.0,
        "host_gib": 1.0,
        "cached": False,
    }
    return {**usual, **changes}


def too_big(needs_gib: float) -> dict[str, Any]:
    return {"bytes": {"frozen": GIB}, "needs": needs_gib * GIB, "host_gib": 1.0, "cached": False}


def planned(config: Config, found: dict[str, Any], topology: str = "v5e-16", program: str = "step") -> ProgramPlan:
    return make_program_plan(Job(config, parse_topology(topology), program, config.data.batch_rows), found)
