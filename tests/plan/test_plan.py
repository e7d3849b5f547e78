import dataclasses
import json

import pytest

from emollama_jax.errors import UserError
from emollama_jax.plan.compiler import Compiler
from emollama_jax.plan.plan import Plan, largest_rows, make_plan, remedy
from emollama_jax.plan.topology import GIB, parse_topology
from tests.plan.figures import collective, experiment, figures, planned, too_big

CHIP = parse_topology("v5e-16").chip


class FakeCompiler(Compiler):
    """Memory of 2 GiB and 0.5 GiB a row of a device; more than the chip's is refused, as the compiler does."""

    def __init__(self):
        object.__setattr__(self, "asked", [])

    def compile(self, jobs):
        self.asked += jobs
        needs = [2 + 0.5 * job.rows / job.topology.size for job in jobs]
        return [
            figures(gib) if gib * GIB <= job.topology.chip.memory else too_big(gib)
            for gib, job in zip(needs, jobs, strict=True)
        ]


def test_the_kinds_of_memory_add_up_to_its_peak():
    one = planned(experiment(), figures())
    assert one.kinds == {"frozen": GIB, "trainable": GIB / 4, "padding": GIB / 4, "temporaries": 2.5 * GIB}
    assert sum(one.kinds.values()) == one.peak


@pytest.mark.parametrize(("rows", "largest"), [(16, 432), (432, 432), (448, 432), (2048, 432)])
def test_the_largest_batch_lies_on_the_line_through_two(rows, largest):
    """(15.75 - 2) / 0.5 is 27.5 rows a chip: 27 on 16 chips."""
    config, compiler = experiment(data={"batch_rows": rows}), FakeCompiler()
    plan = make_plan("x", config, parse_topology("v5e-16"), compiler)
    assert [job.rows for job in compiler.asked] == [rows, 2 * rows]
    assert plan.programs[0].largest == largest
    assert plan.fits == (rows <= largest)


def test_the_largest_batch_can_be_worked_through_in_its_parts():
    config = experiment(train={"grad_accum_steps": 4})
    other = dataclasses.replace(planned(config, figures(4.5)), rows=32)
    assert largest_rows(planned(config, figures(4.0)), other) % (4 * 16) == 0


def test_no_batch_fits_where_the_parameters_do_not():
    config = experiment()
    other = dataclasses.replace(planned(config, too_big(21.0)), rows=32)
    assert largest_rows(planned(config, too_big(20.0)), other) == 0


def test_what_does_not_fit_is_told_with_the_remedy():
    one = planned(experiment(llama={"remat": "none"}, mesh={"data": 16, "fsdp": 1}), too_big(18.72))
    assert remedy(one) == (
        "step does not fit: it needs 18.72 GiB of 15.75 GiB a chip; try --config.llama.kernel_dtype=int8 or "
        "--config.llama.remat=full or a mesh with less data and more fsdp or a larger topology"
    )
    assert remedy(dataclasses.replace(one, largest=12)).endswith("; set --config.data.batch_rows=12")


def test_a_plan_says_that_it_is_an_estimate_and_what_it_assumes(tmp_path):
    topology = parse_topology("2xv5e-16")
    crossing = collective("all-reduce", 2 * GIB, crosses=True, times=1)
    config = experiment(mesh={"data": 2})
    one = planned(config, figures(collectives=[collective(size=GIB), crossing]), "2xv5e-16")
    plan = Plan("stage1_merr", config, topology, (one,))
    text = str(plan)
    assert "stage1_merr on 2xv5e-16: 32 x TPU v5e, mesh data=2 x fsdp=16 x tensor=1" in text
    assert "Compiler estimates" in text and "nothing has been measured" in text
    assert "197 TFLOP/s" in text and "819 GB/s" in text and "1.50 GHz" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["step", "all-gather", "3.000", "0.000"] in rows
    assert ["step", "all-reduce", "0.000", "2.000"] in rows
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["what"] == "compiler estimates"
    assert data["programs"][0]["bytes_sent_between_slices"] == {"all-reduce": 2 * GIB}
    assert data["programs"][0]["estimate"]["seconds"] == one.estimate.seconds


def test_seconds_are_the_longest_of_what_overlaps_and_all_that_does_not():
    config = experiment()
    alone = planned(config, figures(collectives=[])).estimate
    assert alone.exposed == alone.hidden == 0
    assert alone.seconds == alone.compute > 1.5e9 / CHIP.clock  # the attention kernel beside the counted cycles
    exposed = planned(config, figures(collectives=[collective(size=CHIP.link, times=2)])).estimate
    assert exposed.seconds == pytest.approx(alone.seconds + 2)
    hidden = planned(config, figures(collectives=[collective(size=CHIP.link, times=5, hidden=True)])).estimate
    assert hidden.seconds == 5
    between = planned(config, figures(collectives=[collective(size=CHIP.network, times=1, crosses=True)])).estimate
    assert between.seconds == pytest.approx(alone.seconds + 1)


@pytest.mark.smoke
def test_the_operations_of_a_step_are_the_mathematics_of_it():
    """6.6 billion frozen weights, of those that tokens are multiplied with, at 4 operations each and 2 more where the
    forward pass is run again."""
    tokens = 16 * 2048
    on = lambda **llama: (
        planned(
            experiment(llama=llama, data={"train": ("data/merr/image_tokens/1.0.0:coarse",)}), figures(cycles=0.0)
        ).estimate
    )
    run = on(remat="none").arithmetic * CHIP.flops * 16 / tokens
    assert run == pytest.approx(4 * 6.607e9 + 6 * 33.55e6 + 6 * 32 * 4096 * 2048, rel=1e-3)
    again = on(remat="full").arithmetic * CHIP.flops * 16 / tokens
    assert again == pytest.approx(run + 2 * (6.607e9 + 33.55e6) + 2 * 32 * 4096 * 2048, rel=1e-3)
    assert on().mfu == pytest.approx(
        on().rate / 16 * (4 * 6.607e9 + 6 * 33.55e6 + 6 * 32 * 4096 * 341) / 197e12, rel=1e-2
    )


@pytest.mark.parametrize("program", ["prefill", "decode", "eva_vit", "mae", "videomae", "hubert"])
def test_other_programs_are_estimated_too(program):
    estimate = planned(experiment(), figures(cycles=0.0, collectives=[]), program=program).estimate
    assert estimate.seconds == max(estimate.arithmetic, estimate.memory) > 0
    assert estimate.rate * estimate.seconds == pytest.approx(16)
    assert estimate.mfu is None


def test_a_mesh_that_does_not_fit_is_told():
    with pytest.raises(UserError, match=r"config.mesh .*fsdp=3.* does not fit 16 devices; .*multiply.* may be -1"):
        make_plan("x", experiment(mesh={"fsdp": 3}), parse_topology("v5e-16"), FakeCompiler())
