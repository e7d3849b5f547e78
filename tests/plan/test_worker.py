"""The compiler for TPUs, which needs none, on the programs themselves."""

import dataclasses
import importlib.util
from typing import Any

import pytest

from emollama_jax.config import Config, load_config
from emollama_jax.plan.compiler import Compiler, Job, figures
from emollama_jax.plan.plan import ProgramPlan, make_program_plan
from emollama_jax.plan.search import changed
from emollama_jax.plan.topology import GIB, parse_topology

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="the compiler for TPUs is not installed: pip install -e '.[plan]'"
)

IMAGE_TOKENS = {"train": ("data/merr/image_tokens/1.0.0:coarse",)}


def compiled(config: Config, topology: str, program: str = "step", rows: int | None = None) -> ProgramPlan:
    job = Job(config, parse_topology(topology), program, rows or config.data.batch_rows)
    return make_program_plan(job, figures(Compiler(), [job])[0])


def small(**groups: dict[str, Any]) -> Config:
    """A model whose parameters are far larger than all else, and whose axes divide."""
    llama = {
        "vocab_size": 2048,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 8,
        "head_dim": 128,
        "attention": "xla",
        "loss_chunk": 128,
    }
    config = changed(
        load_config("tiny"),
        llama=dict.fromkeys(("kernel_dtype", "param_dtype", "compute_dtype"), "bfloat16") | llama,
        lora={"rank": 16, "dropout": 0.0},
        data=IMAGE_TOKENS | {"sequence_length": 128, "clips_per_row": 1, "batch_rows": 4},
    )
    return changed(config, **groups)


@pytest.fixture(scope="module")
def shared() -> ProgramPlan:
    return compiled(small(mesh={"fsdp": 4}), "v5e-4")


@pytest.mark.slow
def test_the_7b_step_on_16_chips():
    config = changed(load_config("stage1_merr"), data=IMAGE_TOKENS)
    step = compiled(config, "v5e-16")
    assert step.fits
    parameters = 6_738_415_616 * 2
    assert step.kinds["frozen"] == pytest.approx(parameters / 16, rel=0.02)
    assert step.kinds["optimiser"] == pytest.approx(2 * step.kinds["trainable"], rel=0.01)
    assert sum(step.kinds.values()) == step.peak
    assert 1.5 * GIB < step.peak < 3 * GIB
    # Parameters are gathered forward, again where the backward pass runs the block anew, and for the gradients, whole
    # and not in rings of small products; the gradients of what is trained are summed once.
    moved = step.moved()
    assert 2 * parameters * 15 / 16 < moved["all-gather"] < 5 * parameters
    assert moved.get("collective-permute", 0) < 0.01 * moved["all-gather"]
    hidden = sum(one["bytes"] * one["times"] for one in step.figures["collectives"] if one["hidden"])
    assert hidden > moved["all-gather"] / 2
    assert moved.get("all-reduce", 0) + moved.get("reduce-scatter", 0) < 3 * 4 * 74_993_664
    assert step.estimate.compute > step.estimate.arithmetic / 2
    assert 0.1 < step.estimate.mfu < 0.7


@pytest.mark.slow
def test_memory_falls_with_the_devices_that_share_the_parameters(shared):
    whole = compiled(small(mesh={"data": 4}), "v5e-4")
    arguments = [one.figures["arguments"] for one in (whole, shared)]
    assert arguments[1] == pytest.approx(arguments[0] / 4, rel=0.1)
    assert shared.peak < whole.peak
    gathered = [one.moved().get("all-gather", 0) + one.moved().get("collective-permute", 0) for one in (whole, shared)]
    assert gathered[1] > gathered[0]


@pytest.mark.slow
def test_between_slices_go_gradients_alone(shared):
    """Each slice has a copy of the model and half of the rows. What crosses is the sum of the gradients, a quarter from
    each of the slice's four chips and in the bfloat16 that they are computed in, and a few numbers."""
    two = compiled(small(mesh={"data": 2, "fsdp": 4}, data={"batch_rows": 8}), "2xv5e-4")
    assert two.moved(crosses=True).keys() == {"all-reduce"}
    assert sum(two.moved(crosses=True).values()) == pytest.approx(two.kinds["trainable"] / 2, rel=0.1)
    assert two.moved(crosses=False).get("all-gather", 0) > 2 * two.kinds["frozen"]
    assert not shared.moved(crosses=True)


def test_what_does_not_fit_says_what_it_needs():
    config = small(data={"batch_rows": 65536}, llama={"remat": "none"})
    step = compiled(config, "v5e-1")
    assert not step.fits
    assert step.estimate is None
    assert step.peak > step.topology.chip.memory


@pytest.mark.slow
@pytest.mark.parametrize("program", ["prefill", "decode", "mae"])
def test_programs_of_prediction_and_extraction(program):
    config = dataclasses.replace(small(), generate=dataclasses.replace(small().generate, max_new_tokens=16))
    one = compiled(config, "v5e-1", program, rows=2)
    assert one.fits
    assert not one.moved()
    assert one.figures["cycles"] > 0
