import pytest

from emollama_jax.config import load_config
from emollama_jax.errors import UserError
from emollama_jax.plan.compiler import Compiler
from emollama_jax.plan.plan import sizes_of
from emollama_jax.plan.search import meshes, ranking_table, search, write_overlay
from emollama_jax.plan.topology import parse_topology
from tests.plan.figures import collective, experiment, figures, planned, too_big

pytestmark = pytest.mark.smoke

V5E = parse_topology("v5e-16")


class FakeCompiler(Compiler):
    """Copies of the model do not fit, recomputation takes time for memory, and splitting layers costs messages."""

    def __init__(self):
        object.__setattr__(self, "asked", [])

    def compile(self, jobs):
        self.asked += jobs
        return [self._one(job) for job in jobs]

    def _one(self, job):
        mesh, llama = sizes_of(job.config, job.topology), job.config.llama
        rows = job.rows / (mesh["data"] * mesh["fsdp"])
        weight = {"bfloat16": 13.0, "int8": 7.0, "nf4": 4.0}[llama.kernel_dtype] / mesh["fsdp"] / mesh["tensor"]
        gib = 1 + weight + rows * {"full": 0.4, "dots": 4, "none": 20}[llama.remat]
        if gib > 15.75:
            return too_big(gib)
        cycles = rows * {"full": 8e8, "dots": 7e8, "none": 6e8}[llama.remat] * (1.2 if llama.attention == "xla" else 1)
        gathers = collective(size=13e9 * (mesh["fsdp"] > 1), times=1, hidden=True)
        messages = collective("all-reduce", size=20e9 * rows, times=mesh["tensor"] - 1)
        return figures(gib, cycles=cycles, collectives=[gathers, messages])


def test_the_search_finds_what_is_fastest_and_fits():
    compiler, said = FakeCompiler(), []
    found = search(experiment(), V5E, compiler, said.append)
    best = found[0]
    assert best.fits
    assert sizes_of(best.config, V5E)["tensor"] == 1
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


def test_meshes_are_all_that_there_are_at_the_same_rows_a_chip():
    sizes = [tuple(sizes_of(config, V5E).values()) for config in meshes(experiment(), V5E)]
    assert len(sizes) == len(set(sizes)) == 5 + 4 + 3 + 2
    assert all(data * fsdp * tensor == 16 and tensor <= 8 for data, fsdp, tensor in sizes)
    for accumulate in (1, 4):
        before = experiment(data={"batch_rows": 16 * accumulate}, train={"accumulate": accumulate})
        for config, (data, fsdp, _) in zip(meshes(before, V5E), sizes, strict=True):
            assert config.data.batch_rows == data * fsdp * accumulate


def test_slices_hold_copies_of_the_model():
    two = parse_topology("2xv5e-16")
    found = [config.mesh for config in meshes(experiment(mesh={"data": 2}), two)]
    assert found
    assert all(mesh.data % 2 == 0 for mesh in found)


def test_a_search_in_which_nothing_compiles_says_why():
    class Broken(Compiler):
        def compile(self, jobs):
            return [{"error": "step on v5e-16: no"} for _ in jobs]

    with pytest.raises(UserError, match="no candidate could be compiled; the first: step on v5e-16: no"):
        search(experiment(), V5E, Broken())


def test_the_best_is_written_as_an_experiment(tmp_path):
    config = experiment(
        mesh={"data": 2, "fsdp": 8}, data={"batch_rows": 64}, llama={"kernel_dtype": "int8", "remat": "dots"}
    )
    one = planned(config, figures())
    write_overlay(tmp_path / "best.py", "stage1_merr", one)
    assert load_config(str(tmp_path / "best.py")) == config
    text = (tmp_path / "best.py").read_text()
    assert "4.00 of 15.75 GiB a chip" in text and "Nothing has been measured" in text
    assert max(map(len, text.splitlines())) <= 120


def test_nothing_is_written_where_nothing_fits(tmp_path):
    with pytest.raises(UserError, match="no candidate fits v5e-16; the one that lacks least needs 20.00 GiB"):
        write_overlay(tmp_path / "best.py", "stage1_merr", planned(experiment(), too_big(20)))
    assert not (tmp_path / "best.py").exists()
