"""One call for a whole machine: the order of its rows, its table, and what is kept when a row or the call fails."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from emollama_jax import cli
from emollama_jax.bench import report as bench_report
from emollama_jax.bench import suite
from emollama_jax.bench.peer import PEER
from emollama_jax.bench.profile import Breakdown, Operation
from emollama_jax.bench.report import OURS, Report, Result
from emollama_jax.bench.suite import Sizes, bench_all, make_rows, run_in_process
from emollama_jax.bench.suite_report import COLUMNS
from emollama_jax.bench.worker import measure
from emollama_jax.config import Config, load_config, to_dict
from emollama_jax.errors import UserError
from emollama_jax.plan.compiler import Compiler, Job, figures
from emollama_jax.plan.topology import parse_topology
from tests.plan.test_worker import small

TINY = load_config("tiny")
SMALL = Sizes(lengths=(400, 200), tokens=400, batch_sizes=(1, 2), new_tokens=6, frames=2, steps=1, clips=8)
ARGUMENTS = ["--lengths=400", "--tokens=400", "--batch=1", "--new-tokens=6", "--frames=2", "--steps=1", "--clips=8"]
CUDA = [name for name in ("cuda12", "cuda13") if importlib.util.find_spec(f"jax_{name}_plugin")]


def rows(config: Config = TINY, sizes: Sizes = SMALL) -> list[suite.Row]:
    return make_rows(config, sizes, repeats=2, with_peer=True, traces=None)


def answer(rate: float = 1000.0, peer: float | None = None, **figures: float) -> dict:
    """The worker's result of a row with these figures."""
    names = ("tokens_per_s", "clips_per_s", "ms_per_step", "ms_per_token", "ms_per_batch")
    of = lambda rate: [dict.fromkeys(names, rate / 2) | figures, dict.fromkeys(names, rate) | figures]
    result = lambda who, rate, **extra: Result(who, "", 1, "tokens_per_s", 1.0, of(rate), None, **extra)
    breakdown = Breakdown("there", 2.0, 1.5, [Operation("nvjet", "matrix products", 3, 1.5)])
    results = [result(OURS, rate, breakdown=breakdown)] + ([result(PEER, peer)] if peer else [])
    notes = [] if peer else ["no peer: torch not installed"]
    report = Report("", to_dict(TINY), {"attention": "cudnn"}, {}, results, notes)
    return {"report": json.loads(json.dumps(report.to_dict()))}


def cells(report: suite.SuiteReport, name: str) -> list[str]:
    return next(row.cells() for row in report.rows if row.name == name)


@pytest.mark.smoke
def test_the_rows_are_what_was_asked_for_and_the_most_important_come_first():
    config = dataclasses.replace(
        load_config("stage1_h200_1"), train=dataclasses.replace(TINY.train, grad_accum_steps=8)
    )
    found = {row.name: row for row in make_rows(config, Sizes(), repeats=3, with_peer=True, traces=Path("there"))}
    assert list(found)[:5] == ["step-4096", "decode-1", "step-2048", "step-4096-int8", "decode-128"]
    assert {"step-2048-int8", "step-4096-xla", "step-4096-eva", "eva-32", "step-2048-xla"} < found.keys()
    assert [name for name, row in found.items() if row.options["with_peer"]] == [
        *("step-4096", "decode-1", "decode-128", "eva-32")
    ]
    assert [name for name, row in found.items() if row.options.get("trace")] == ["step-4096", "decode-1"]
    for row in found.values():
        assert row.config.train.grad_accum_steps == 1 and row.config.mesh.fsdp == 1
        if row.bench == "train":
            data = row.config.data
            assert (
                data.batch_rows * data.sequence_length == 8192 and data.clips_per_row == data.sequence_length / 2048 * 6
            )
    llama = lambda name: found[name].config.llama
    assert {llama(name).kernel_dtype for name in found if "int8" in name} == {"int8"}
    assert (llama("step-4096").kernel_dtype, llama("step-4096").attention) == ("bfloat16", "auto")
    assert llama("step-2048-xla").attention == found["eva-32-xla"].config.eva_vit.attention == "xla"
    assert llama("step-4096-int8-products").int8_products == "all"
    assert found["step-4096-eva"].options["images"] == "frames"


def test_a_row_stands_beside_its_limit_its_goal_and_torch(tmp_path):
    shares = {"percent_4n": 48.0, "bandwidth_percent": 84.0, "peak_percent": 30.0}
    run = lambda row, seconds: answer(2000.0, 1000.0 if row.options["with_peer"] else None, **shares)
    report = bench_all(TINY, out=tmp_path / "new" / "out", sizes=SMALL, run=run)
    assert report.complete
    step = dict(zip(COLUMNS, cells(report, "step-400"), strict=True))
    assert step["measured"] == "2,000 tokens/s" and step["best of"] == "2"
    assert step["limit"] == "48.0 % of the peak at 4N"
    assert step["goal"] == ">= 60 %, 2,500: missed"
    assert step["torch"] == "1,000 (2.00x)" and step[""] == ""
    assert (step["kernels"], step["attention"]) == ("float32", "cudnn")
    decode = cells(report, "decode-1")
    assert "84.0 % of the bandwidth" in decode and ">= 80 %, 1,905: met" in decode
    assert not any(">=" in cell for name in ("decode-2", "eva-2", "step-400-eva") for cell in cells(report, name))
    text, page = str(report), (tmp_path / "new/out/all.md").read_text()
    for told in (text, page):
        assert report.machine["cpu"] in told and "matrix products" in told and "waited 25.0 %" in told
    assert page.count("| step-400 |") == 1
    data = json.loads((tmp_path / "new/out/all.json").read_text())
    assert [row["name"] for row in data["rows"]] == [row.name for row in report.rows]
    assert data["machine"]["versions"]["jax"] == jax.__version__
    assert len(data["rows"][0]["report"]["results"][0]["runs"]) == 2


def test_a_row_that_fails_says_why_and_the_rest_goes_on(tmp_path, capsys):
    def run(row, seconds):
        if row.name == "step-400":
            return {"error": "there is too little memory: RESOURCE_EXHAUSTED", "had_peer": False}
        if row.name == "decode-1" and row.options["with_peer"]:
            return {"error": "OutOfMemoryError: CUDA out of memory", "had_peer": True}
        return answer()

    lines = []
    report = bench_all(TINY, out=tmp_path, sizes=SMALL, run=run, log=lines.append)
    failed, alone = report.rows[:2]
    assert failed.status == "failed" and failed.remark.startswith("there is too little memory")
    assert alone.status == "measured" and alone.remark == "with torch: OutOfMemoryError: CUDA out of memory"
    assert {row.status for row in report.rows[2:]} == {"measured"} and not report.complete
    assert next(row for row in report.rows if row.name == "decode-2").remark == "no peer: torch not installed"
    assert report.rows[2].remark == ""  # it was to have none
    assert len(lines) == len(report.rows) and "too little memory" in lines[0]
    assert "too little memory" in str(report) and "--rows" not in str(report)


def test_when_the_time_is_over_the_rest_is_said_not_to_be_run(tmp_path, monkeypatch):
    clock, given = [0.0], []
    monkeypatch.setattr(suite, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def run(row, seconds):
        given.append(seconds)
        took = min(seconds, 40.0 if row.options["with_peer"] else 25.0)
        clock[0] += took
        return (
            answer() if took < seconds else {"error": "slow", "had_peer": row.options["with_peer"], "timed_out": True}
        )

    report = bench_all(TINY, out=tmp_path, sizes=SMALL, budget=90, run=run)
    # A third each at most: with the peer 30 s are not enough, without it 25 s are; then 30 of the 35 s left go to the
    # next with its peer, and without it there are but 5.
    assert given == [30.0, 30.0, 30.0, 5.0]
    assert [row.status for row in report.rows] == ["measured", *["not run"] * (len(report.rows) - 1)]
    assert report.rows[0].remark == "with torch: slow"
    assert {row.remark for row in report.rows[1:]} == {"the time was over"}
    assert f"--rows {' '.join(row.name for row in report.rows[1:])}" in str(report)


def test_an_interrupted_call_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    def run(row, seconds, compiled):
        if row.name != "step-400":
            raise KeyboardInterrupt
        return answer()

    monkeypatch.setattr(suite, "run_in_process", run)
    assert cli.main(["bench", "all", "--config=tiny", f"--out={tmp_path}", *ARGUMENTS]) == 130
    kept = json.loads((tmp_path / "all.json").read_text())
    assert [row["status"] for row in kept["rows"]][:2] == ["measured", "not run"]
    assert "| step-400 |" in (tmp_path / "all.md").read_text()
    assert "step-400: measured" in capsys.readouterr().err

    assert cli.main(["bench", "all", "--config=tiny", f"--out={tmp_path}", *ARGUMENTS]) == 2
    assert "there are results already" in capsys.readouterr().err


def test_only_the_named_rows_are_run_and_the_device_is_left_to_them(tmp_path, monkeypatch):
    ready = answer()
    for name in ("devices", "local_devices", "default_backend"):
        monkeypatch.setattr(jax, name, lambda *a: pytest.fail("the device belongs to the rows' processes"))
    report = bench_all(TINY, out=tmp_path, sizes=SMALL, rows=["eva-2", "step-200"], run=lambda row, seconds: ready)
    assert [row.name for row in report.rows] == ["step-200", "eva-2"]
    assert str(report)
    with pytest.raises(UserError, match=r"--rows: unknown: all; the rows are step-400, decode-1, "):
        bench_all(TINY, out=tmp_path / "other", sizes=SMALL, rows=["all"])


def test_a_process_that_dies_or_hangs_is_told(tmp_path, monkeypatch):
    program = tmp_path / "python"
    monkeypatch.setattr(suite.sys, "executable", str(program))
    program.write_text("#!/bin/sh\necho cuDNN is gone >&2\nkill -9 $$\n")
    program.chmod(0o755)
    row = rows()[0]
    died = {"error": "the process ended with code -9 (cuDNN is gone)", "had_peer": True}
    assert run_in_process(row, 60.0, str(tmp_path)) == died
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    assert run_in_process(row, 1.0, str(tmp_path)) == {"error": "not done in 1 s", "had_peer": True, "timed_out": True}


def test_the_worker_measures_or_says_in_one_line_why_not(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_report, "SETTLE_S", 0)
    found = {row.name: row for row in rows()}

    def request(name: str, **options) -> dict:
        row = found[name]
        return {"bench": row.bench, "config": to_dict(row.config), "options": row.options | options}

    result = measure(request("decode-2", with_peer=False, repeats=1, trace=str(tmp_path)))
    (decoded,) = json.loads(json.dumps(result))["report"]["results"]
    assert decoded["best"]["tokens"] == 12 and decoded["breakdown"]["operations"]
    assert list((tmp_path / "batch-2").rglob("*.xplane.pb"))
    cudnn = request("decode-1", with_peer=False)
    cudnn["config"]["llama"]["attention"] = "cudnn"
    failed = measure(cudnn)
    assert not failed["had_peer"] and "\n" not in failed["error"] and "cudnn" in failed["error"].lower()


@pytest.mark.slow
def test_a_whole_call_at_tiny_size(tmp_path, capsys):
    pytest.importorskip("peft")
    names = ["eva-2", "step-400"]
    argv = ["--config=tiny", "--config.llama.attention=cudnn", f"--out={tmp_path}", "--repeats=1", *ARGUMENTS]
    assert cli.main(["bench", "all", *argv, "--rows", *names]) == 1
    told = capsys.readouterr()
    status = {row["name"]: row for row in json.loads((tmp_path / "all.json").read_text())["rows"]}
    assert [(name, row["status"]) for name, row in status.items()] == [("step-400", "failed"), ("eva-2", "measured")]
    assert status["step-400"]["remark"].lower().count("cudnn") == 1  # once, though it was tried twice
    assert [result["who"] for result in status["eva-2"]["report"]["results"]] == [OURS, PEER]
    assert "eva-2: measured" in told.err and "eva-2" in told.out


def programs() -> list[tuple[str, Config, str, int]]:
    """The rows' programs of a model that is small but for its heads, as `emollama plan` compiles them: with XLA's
    attention, as cuDNN's cannot be compiled without a GPU."""
    found, sizes = [], dataclasses.replace(SMALL, lengths=(512,), tokens=512, batch_sizes=(1, 128))
    for row in rows(small(llama={"attention": "auto"}), sizes):
        images = "frame" if row.options.get("images") == "frames" else "image_tokens"
        data = dataclasses.replace(row.config.data, train=(f"data/clips/{images}/1.0.0:train",))
        config = dataclasses.replace(row.config, data=data)
        kinds = {"train": ["step"], "decode": ["prefill", "decode"], "encode": ["eva_vit"]}[row.bench]
        size = {"train": data.batch_rows, "encode": sizes.frames}.get(row.bench, *row.options.get("batch_sizes", [0]))
        found += [(row.name, config, kind, size) for kind in kinds if not row.name.endswith("xla")]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not CUDA, reason="the compiler for GPUs is not installed: pip install -e '.[cuda]'")
@pytest.mark.parametrize("case", programs(), ids=lambda case: f"{case[0]}-{case[2]}")
def test_its_programs_compile_for_a_gpu(case):
    _, config, program, size = case
    (found,) = figures(Compiler(), [Job(config, parse_topology("h200-1"), program, size)])
    assert found["peak"] > found["arguments"] > 0
