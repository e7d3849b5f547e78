import json

import pytest

from emollama_jax.config import from_dict
from emollama_jax.errors import UserError
from emollama_jax.plan.compiler import Compiler
from emollama_jax.plan.plan import get_mesh_sizes
from emollama_jax.plan.search import (
    copies,
    ranked,
    ranking_table,
    save_ranking,
    search,
    splits,
    with_rows,
)
from emollama_jax.plan.topology import parse_topology
from tests.plan.figures import collective, experiment, figures, planned, too_big

V5E = parse_topology("v5e-16")


class FakeCompiler(Compiler):
    """Copies of the model do not fit, recomputation takes time for memory, and splitting layers costs messages."""

    def __init__(self):
        object.__setattr__(self, "asked", [])

    def compile(self, jobs):
        self.asked += jobs
        return map(self._one, jobs)

    def _one(self, job):
        mesh, llama = get_mesh_sizes(job.config, job.topology), job.config.llama
        parts = job.config.train.grad_accum_steps
        rows = job.rows / (mesh["data"] * mesh["fsdp"]) / parts
        weight = {"bfloat16": 13.0, "int8": 7.0, "nf4": 4.0}[llama.kernel_dtype] / mesh["fsdp"] / mesh["tensor"]
        gib = 1 + weight + rows * {"full": 0.4, "dots": 4, "none": 20}[llama.remat]
        if gib > 15.75:
            return too_big(gib)
        cycles = parts * rows * {"full": 8e8, "dots": 7e8, "none": 6e8}[llama.remat]
        cycles *= 1.2 if llama.attention == "xla" else 1
        gathers = collective(size=13e9 * (mesh["fsdp"] > 1), times=parts, hidden=True)
        messages = collective("all-reduce", size=20e9 * rows * parts, times=mesh["tensor"] - 1)
        return figures(gib, cycles=cycles, collectives=[gathers, messages])


@pytest.mark.smoke
def test_the_search_finds_what_is_fastest_and_fits():
    compiler, said = FakeCompiler(), []
    found = search(experiment(), V5E, compiler, said.append)
    best = found[0]
    assert best.fits
    assert get_mesh_sizes(best.config, V5E)["tensor"] == 1
    assert best.config.llama.attention == "auto"
    assert [one.estimate.rate for one in found if one.fits] == sorted(
        (one.estimate.rate for one in found if one.fits), reverse=True
    )
    assert [one.fits for one in found] == sorted((one.fits for one in found), reverse=True)
    assert len(said) == len(found) == len({job.config for job in compiler.asked}) == len(compiler.asked)
    tried = {
        (job.config.llama.remat, job.config.llama.kernel_dtype, job.config.llama.attention) for job in compiler.asked
    }
    assert {"full", "dots", "none"} == {remat for remat, _, _ in tried}
    assert {"bfloat16", "int8", "nf4"} == {dtype for _, dtype, _ in tried}
    assert len(ranking_table(found)) == len(found) + 1


def test_other_kernels_are_tried_without_products_of_integers():
    compiler = FakeCompiler()
    search(experiment(llama={"kernel_dtype": "int8", "int8_products": "all"}), V5E, compiler, lambda line: None)
    tried = {(job.config.llama.kernel_dtype, job.config.llama.int8_products) for job in compiler.asked}
    assert tried == {("int8", "all"), ("bfloat16", "none"), ("nf4", "none")}


def test_of_equal_speed_fewer_parts_exact_kernels_and_less_memory_are_better():
    one = lambda parts, kernels, gib: planned(
        experiment(train={"grad_accum_steps": parts}, llama={"kernel_dtype": kernels}), figures(gib)
    )
    order = [one(1, "bfloat16", 5.0), one(1, "float32", 6.0), one(1, "int8", 3.0), one(1, "nf4", 2.0)]
    order += [one(2, "bfloat16", 4.0)]
    assert ranked(order[::-1]) == order


def test_copies_and_splits_make_all_devices_of_the_axes():
    sizes = lambda candidates: [tuple(get_mesh_sizes(one, V5E).values()) for one in candidates]
    config = experiment()
    assert sizes(copies(config, V5E)) == [(1, 16, 1), (2, 8, 1), (4, 4, 1), (8, 2, 1), (16, 1, 1)]
    best = experiment(mesh={"data": 2, "fsdp": 8})
    assert sizes(splits(best, 2, config, V5E)) == [(1, 8, 2), (2, 4, 2)]
    assert sizes(splits(best, 4, config, V5E)) == [(2, 2, 4)]
    assert sizes(splits(experiment(mesh={"fsdp": 8, "tensor": 2}), 4, config, V5E)) == [(1, 4, 4)]
    assert sizes(splits(best, 4, experiment(llama={"num_kv_heads": 2}), V5E)) == []


def test_slices_hold_copies_of_the_model():
    two = parse_topology("2xv5e-16")
    config = experiment()
    best, *others = copies(config, two)
    assert best.mesh.data == 2
    assert all(one.mesh.data % 2 == 0 for one in (*others, *splits(best, 2, config, two)))


@pytest.mark.parametrize(
    ("rows", "number", "expected"),
    [(16, 1, (16, 1)), (64, 1, (64, 4)), (64, 2, (64, 2)), (16, 4, (64, 1)), (24, 1, (32, 2)), (1, 1, (16, 1))],
)
def test_a_batch_is_the_experiments_in_parts_or_a_larger_one(rows, number, expected):
    config = experiment(data={"batch_rows": rows}, mesh={"fsdp": 16}, train={"grad_accum_steps": 3})
    one = with_rows(config, number, config, V5E)
    assert (one.data.batch_rows, one.train.grad_accum_steps) == expected


def test_larger_batches_train_on_as_many_rows_at_higher_rates():
    config = experiment()
    before, train = config.train, with_rows(config, 4, config, V5E).train
    assert (train.steps, train.warmup_steps) == (375, 12)
    assert train.learning_rate == pytest.approx(2 * before.learning_rate)
    assert train.final_rate / train.learning_rate == pytest.approx(before.final_rate / before.learning_rate)
    assert with_rows(config, 1, config, V5E).train == before
    few = experiment(train={"steps": 2, "warmup_steps": 1})
    assert (with_rows(few, 8, few, V5E).train.steps, with_rows(few, 8, few, V5E).train.warmup_steps) == (1, 0)


def test_a_search_in_which_nothing_compiles_says_why():
    class Broken(Compiler):
        def compile(self, jobs):
            return ({"error": "step on v5e-16: no"} for _ in jobs)

    with pytest.raises(UserError, match="no candidate could be compiled; the first: step on v5e-16: no"):
        search(experiment(), V5E, Broken())


def test_the_ranking_is_written_as_json(tmp_path):
    found = [planned(experiment(), figures()), planned(experiment(llama={"remat": "none"}), too_big(20))]
    save_ranking(tmp_path / "ranking.json", "stage1_merr", found)
    ranking = json.loads((tmp_path / "ranking.json").read_text())
    assert ranking["what"] == "compiler estimates" and ranking["topology"] == "v5e-16"
    assert [one["fits"] for one in ranking["candidates"]] == [True, False]
    assert [from_dict(one["config"]) for one in ranking["candidates"]] == [one.config for one in found]
