"""The quickstart's own commands, on a language model and encoders that are tiny."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from emollama_jax import cli
from emollama_jax.cli import quickstart
from emollama_jax.errors import UserError
from tests.train.runs import LLAMA

STAGE = """
import dataclasses
from emollama_jax.config import DataConfig, MeshConfig, WeightsConfig, load_config
from emollama_jax.models.projectors import ProjectorsConfig
from emollama_jax.text.prompts import PromptConfig

def get_config():
    tiny = load_config("tiny")
    data = DataConfig(
        train=("data/clips/image_tokens/1.0.0:train",),
        sequence_length=512,
        clips_per_row=2,
        batch_rows=8,
        packing_rows=8,
    )
    settings = dict(workdir="{workdir}", compile_cache="compiled")
    weights = WeightsConfig(base="weights/smollm2", trained="{trained}")
    train = dataclasses.replace(tiny.train, steps=2, warmup_steps=1, log_interval=1, **settings)
    prompt = PromptConfig(tasks=("emotion", "{task}"), max_answer_tokens=40)
    projectors = ProjectorsConfig(feature_size=32)
    mesh = MeshConfig(data=-1)
    groups = dict(mesh=mesh, data=data, prompt=prompt, train=train, weights=weights, projectors=projectors)
    return dataclasses.replace(tiny, **groups)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the language model is there already, and the commands run in this process."""
    pytest.importorskip("av")
    pytest.importorskip("matplotlib")
    folder = tmp_path / "here"
    assert cli.main(["convert", str(LLAMA), str(folder / quickstart.BASE), "--dtype", "float32"]) == 0
    (folder / "smollm2.gguf").touch()
    (folder / "configs").mkdir()
    for name, task, trained, workdir in (
        ("quickstart_stage1", "reason", "", "runs/stage1"),
        ("quickstart_stage2", "reason_v2", "runs/stage1", "runs/stage2"),
    ):
        text = STAGE.format(task=task, trained=trained, workdir=workdir)
        (folder / "configs" / f"{name}.py").write_text(text)

    def run(command, cwd):
        before = os.getcwd()
        os.chdir(cwd)
        try:
            return cli.main(command[3:])
        finally:
            os.chdir(before)

    monkeypatch.setattr(quickstart, "CLIPS", {"train": 9, "test": 9})
    monkeypatch.setattr(quickstart, "run_command", run)
    return folder


@pytest.mark.slow
def test_every_step_leaves_what_the_next_one_needs(folder, capsys):
    assert cli.main(["quickstart", "--out", str(folder), "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    cells = json.loads((folder / "results/sweep.json").read_text())
    assert [cell["modalities"] for cell in cells] == list(quickstart.MODALITIES)
    for cell in cells:
        assert f"| {quickstart.MODALITIES[cell['modalities']]} | {cell['scores']['weighted_f1']:.3f} |" in shown
    (answer,) = map(json.loads, (folder / "answer.jsonl").read_text().splitlines())
    assert answer["status"] == "success" and answer["answer"] in shown
    clip_info = map(json.loads, (folder / quickstart.RECORDS / "clips.jsonl").read_text().splitlines())
    (seen,) = (info["frame"] for info in clip_info if info["name"] == answer["name"])
    assert answer["clip"]["frame"] == seen  # as the run's clips were looked at, by the peak
    assert json.loads((folder / "answer.jsonl.run.json").read_text())["frame"] == "peak"
    (asked,) = map(json.loads, (folder / "question.jsonl").read_text().splitlines())
    transcription = (folder / "synthetic/transcription.csv").read_text()
    assert f"{asked['name']},{asked['subtitle']}" in transcription.replace('"', "")
    assert answer["subtitle"] == asked["subtitle"]
    for place in ("loss.png", "answer.png", "results/peak-AVT/confusion.png", "adapter/adapter_config.json"):
        assert (folder / place).is_file() and str(folder / place).removesuffix("/adapter_config.json") in shown
    assert json.loads((folder / "synthetic/synthetic.json").read_text())["people"] == quickstart.PEOPLE
    assert commands_of(shown) == ["extract", "train", "train", "evaluate", "predict", "export"]
    assert f"[{quickstart.STEPS}/{quickstart.STEPS}]" in shown
    steps = shown[shown.index("| step | seconds | CPU seconds |") :].splitlines()[2 : 3 + quickstart.STEPS]
    times = [[int(cell) for cell in line.split("|")[2:4]] for line in steps]
    assert len(times) == quickstart.STEPS + 1 and all(seconds <= times[-1][0] for seconds, _ in times)

    (folder / "results/sweep.md").unlink()  # as if it had been stopped in the writing of results
    assert cli.main(["quickstart", "--out", str(folder), "--seed", "3"]) == 0
    assert commands_of(capsys.readouterr().out) == ["train", "train", "evaluate", "predict"]
    assert len((folder / "answer.jsonl").read_text().splitlines()) == 1

    assert cli.main(["quickstart", "--out", str(folder), "--seed", "4"]) == 2
    assert "holds a run with --seed 3; go on with that, or choose another --out" in capsys.readouterr().err


def commands_of(shown: str) -> list[str]:
    return [line.split()[2] for line in shown.splitlines() if line.startswith("$ ")]


def test_label_loss():
    lines = [{"emotion": "sad", "probabilities": {"sad": p, "happy": 1 - p}} for p in (1.0, 1 / 3)]
    assert quickstart.label_loss(lines) == pytest.approx(quickstart.BEST_ALONE / 2)
    assert quickstart.label_loss([{"emotion": "sad", "probabilities": {"sad": 0.0, "happy": 1.0}}]) > 10


FAILURES = [(75, "ended with exit code 75; start"), (-9, "was ended by signal 9; start")]


@pytest.mark.parametrize(("code", "message"), FAILURES)
def test_a_command_that_fails_ends_it_with_its_exit_code(tmp_path, monkeypatch, code, message):
    monkeypatch.setattr(quickstart, "run_command", lambda command, folder: code)
    with pytest.raises(UserError, match=f"^emollama train {message}") as info:
        quickstart.Quickstart(tmp_path, 0)._do("train", None, "train --config tiny")
    assert info.value.exit_code == (75 if code > 0 else 137)


WAITS = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path("ready").write_text(os.environ["JAX_PLATFORMS"])
time.sleep(60)
"""


def test_asked_to_end_it_ends_the_command_in_good_order(tmp_path):
    def ask():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    assert quickstart.run_command([sys.executable, "-c", WAITS], tmp_path) == 75
    assert (tmp_path / "ready").read_text() == "cpu"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_it_needs_is_said_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["quickstart", "--out", str(tmp_path / "new")]) == 2
    assert "no av and no matplotlib here; pip install 'emollama_jax[quickstart]'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
