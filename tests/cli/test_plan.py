import json

import pytest

from emollama_jax import cli
from emollama_jax.plan import compiler
from tests.plan.figures import figures, too_big

TINY = ["plan", "--config=tiny", "--config.mesh.fsdp=-1", "--topology=v5e-4", "--config.data.batch_rows=4"]


@pytest.fixture
def asked(monkeypatch):
    """The jobs that were compiled; the compiler finds the figures that the test puts into `found`."""
    jobs, found = [], [figures()]

    def compile(self, new):
        jobs.extend((job, self.cache) for job in new)
        return [found[min(i, len(found) - 1)] for i in range(len(new))]

    monkeypatch.setattr(compiler.Compiler, "compile", compile)
    return jobs, found


@pytest.mark.smoke
def test_a_plan_is_printed_and_written(asked, capsys, tmp_path):
    jobs, _ = asked
    argv = [*TINY, "--programs", "step", "decode", "--json", str(tmp_path / "plan.json"), "--no-cache"]
    assert cli.main(argv) == 0
    assert [(job.program, job.rows, cache) for job, cache in jobs] == [
        ("step", 4, None),
        ("decode", 32, None),
        ("step", 8, None),
    ]
    out = capsys.readouterr().out
    assert out.startswith("tiny on v5e-4: 4 x TPU v5e, mesh data=1 x fsdp=4 x tensor=1\nCompiler estimates")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert [program["program"] for program in written["programs"]] == ["step", "decode"]


def test_what_does_not_fit_exits_with_1(asked, capsys):
    asked[1][:] = [too_big(40), too_big(41)]
    assert cli.main(TINY) == 1
    assert "- step does not fit: it needs 40.00 GiB of 15.75 GiB a chip; try " in capsys.readouterr().out


def test_a_search_ranks_and_writes_the_best(asked, capsys, tmp_path):
    assert cli.main([*TINY, "--search", "--overlay", str(tmp_path / "best.py"), "--time-limit", "1"]) == 0
    captured = capsys.readouterr()
    assert "compiler estimates, the best first" in captured.out
    assert len(captured.err.splitlines()) == len(asked[0])
    assert "--config tiny --topology v5e-4 --search" in (tmp_path / "best.py").read_text()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (["--topology=v5e-5"], "--topology v5e-5: v5e comes in 1, 4, 8, 16, 32, 64, 128, 256"),
        (["--config.mesh.fsdp=3"], "config.mesh data=1 x fsdp=3 x tensor=1 does not fit 4 devices"),
    ],
)
def test_what_is_wrong_is_one_line(asked, capsys, changes, error):
    assert cli.main([*TINY, *changes]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"emollama plan: error: {error}")
    assert len(captured.err.splitlines()) == 1
    assert not asked[0]


def test_a_failed_compile_is_one_line(asked, capsys):
    asked[1][:] = [{"error": "step on v5e-4: the compiler died"}]
    assert cli.main(TINY) == 2
    assert capsys.readouterr().err == "emollama plan: error: step on v5e-4: the compiler died\n"
