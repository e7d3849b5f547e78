import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from emollama_jax.config import load_config
from emollama_jax.plan import compiler as module
from emollama_jax.plan.compiler import Compiler, Job
from emollama_jax.plan.topology import parse_topology
from emollama_jax.plan.worker import memory_needed

JOB = Job(load_config("tiny"), parse_topology("v5e-4"), "step", 4)


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Lets a few lines of Python stand for the worker; they have `request` and `result`, and leave a mark when run."""

    def define(code: str) -> Path:
        marks = tmp_path / "marks"
        script = tmp_path / "worker.py"
        script.write_text(
            "import json, os, pathlib, sys, time\n"
            "request = json.loads(pathlib.Path(sys.argv[-2]).read_text()); result = pathlib.Path(sys.argv[-1])\n"
            f"open({str(marks)!r}, 'a').write('x')\n{code}\n"
        )
        start = lambda command, **kwargs: subprocess.Popen([sys.executable, str(script), *command[-2:]], **kwargs)
        monkeypatch.setattr(module, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": start}))
        return marks

    return define


@pytest.mark.smoke
def test_a_result_is_kept_until_what_it_depends_on_changes(child, tmp_path):
    marks = child("result.write_text(json.dumps({'rows': request['rows'], 'platform': os.environ['JAX_PLATFORMS']}))")
    compiler = Compiler(cache=tmp_path / "cache")
    other = dataclasses.replace(JOB, rows=8)
    assert [found["rows"] for found in compiler.compile([JOB, other])] == [4, 8]
    assert list(compiler.compile([JOB])) == [{"rows": 4, "platform": "cpu", "cached": True}]
    assert marks.read_text() == "xx"
    changed = dataclasses.replace(JOB, config=dataclasses.replace(JOB.config, seed=1))
    assert not next(compiler.compile([changed]))["cached"]
    assert not next(Compiler().compile([JOB]))["cached"]


def test_a_worker_that_dies_is_one_line_and_harms_no_other(child, tmp_path):
    child(
        "print('boom\\n\\n'); sys.stdout.flush()\nif request['rows'] == 8: os.kill(os.getpid(), 9)\n"
        "result.write_text('{}')"
    )
    dead, alive = Compiler(cache=tmp_path / "c", processes=2).compile([dataclasses.replace(JOB, rows=8), JOB])
    assert dead["error"].startswith("step on v5e-4: the compiler died with code -9 (boom); ")
    assert "--processes 1" in dead["error"]
    assert alive == {"cached": False}
    assert len(list((tmp_path / "c").iterdir())) == 1  # what failed is tried again


def test_time_that_is_over_ends_what_runs_and_begins_nothing(child):
    marks = child("time.sleep(60)")
    first, second = Compiler().within(0.5).compile([JOB, JOB])
    assert first["error"] == "step on v5e-4: not compiled in time; give a longer --time-limit"
    assert second["error"] == "step on v5e-4: not compiled, the time was over; give a longer --time-limit"
    assert marks.read_text() == "x"


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 18.72G of 15.75G hbm. Exceeded hbm capacity by 2.97G.",
            18.72 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 900.5M of 100M hbm.", 900.5 * 2**20),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (2.03T) "
            "exceeds available HBM (15.75G).",
            2.03 * 2**40 + 1000,
        ),
        ("INVALID_ARGUMENT: Used 18.72G of 15.75G hbm", None),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack", None),
    ],
)
def test_what_the_compiler_says_that_it_needs(message, needed):
    assert memory_needed(message, 1000) == needed


def test_keys_are_of_the_request_alone_within_one_installation():
    assert module._key({"a": 1}) == module._key(json.loads('{"a": 1}')) != module._key({"a": 2})
