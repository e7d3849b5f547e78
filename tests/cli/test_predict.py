"""`emollama predict`: every clip is answered or named, whatever becomes of the run, which goes on only as itself."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx

from emollama_jax import cli
from emollama_jax.config import load_config, to_dict
from emollama_jax.data.records import Records
from emollama_jax.features.encoders import Encoders
from emollama_jax.infer.engine import Engine
from emollama_jax.infer.inputs import VideoClips
from emollama_jax.infer.loading import choose_frame_rule
from emollama_jax.infer.output import open_output
from emollama_jax.io.checksums import bytes_read, file_digest
from emollama_jax.io.orbax_arrays import save_arrays
from emollama_jax.media.clip import ClipConfig, ClipRequest, ReadSpec, read_clip
from emollama_jax.models.emotion_llama import is_trainable
from emollama_jax.runs.checkpoint_files import CHECKPOINTS, META, PARAMS, TRAINABLE, read_meta
from emollama_jax.runs.run import Run
from emollama_jax.synthetic.dataset import make_dataset
from emollama_jax.text.labels import MERR
from emollama_jax.weights.emotion_llama import load_emotion_llama
from emollama_jax.weights.engine import param_values
from emollama_jax.weights.eva_vit import load_eva_vit
from tests.data.prepared import write_data
from tests.train.runs import ROOT, config_of, make_inputs, write_meta

TINY = ["--config=tiny", "--config.data.sequence_length=256", "--config.generate.max_new_tokens=6"]
EVA_VIT = ROOT / "tests/data/reference_tiny/eva_vit_tiny.pth"
MEDIA = [
    *TINY,
    "--config.projectors.feature_size=48",
    "--config.clip.max_faces=1",
    "--config.mae.num_layers=1",
    "--config.videomae.num_layers=1",
    "--config.hubert.num_layers=1",
    "--config.eva_vit.num_layers=1",
    "--random-encoders",
    "--workers=0",
]
NO_FEATURES = ["--mae=", "--videomae=", "--hubert="]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base checkpoint, and the splits train (60 clips) and held (6) of stored image tokens."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(inputs):
    """A run's folder as training leaves it, whose data has MAE features of the encoder `one`."""
    folder = inputs / "run"
    config = config_of(inputs, folder, prompt__labels="happy,sad,angry")
    model, _ = load_emotion_llama(inputs / "base", config)
    values = {f"{TRAINABLE}{path}": value for path, value in param_values(nnx.state(model, is_trainable)).items()}
    checkpoint = folder / CHECKPOINTS / "4"
    save_arrays(checkpoint / PARAMS, values)
    said = {"config": to_dict(config), "carried": [], "adapter_name": "", "encoders": {"mae": "one"}}
    write_meta(checkpoint, **said)
    return folder


def saying(run: Path, folder: Path, **changes: object) -> Path:
    """The run, saying something else of what it was trained on."""
    shutil.copytree(run, folder)
    write_meta(folder / CHECKPOINTS / "4", **read_meta(run / CHECKPOINTS / "4") | changes)
    return folder


def predict(*argv: object) -> int:
    return cli.main(["predict", *map(str, argv)])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "timings_s"} for line in lines(path)]


@pytest.mark.smoke
def test_records_are_answered_by_the_likeliest_label(inputs, tmp_path, capsys):
    out = tmp_path / "new/answers.jsonl"
    argv = [f"{inputs}/clips:held", "--out", out, "--base", inputs / "base", *TINY, "--batch-size", 4]
    assert predict(*argv) == 0
    assert f"6 clips: 6 answered, 0 failed: {out}" in capsys.readouterr().err
    records = Records(inputs / "clips", "held")
    engine = Engine.load(config=load_config("tiny"), base=inputs / "base", inputs="image_tokens")
    found = engine.answer(records[i] for i in range(6))
    for i, (line, one) in enumerate(zip(lines(out), found, strict=True)):
        assert (line["name"], line["record"], line["status"]) == (one.name, i, "success")
        assert line["answer"] == one.label == next(iter(line["probabilities"]))
        assert line["probabilities"] == pytest.approx(one.probabilities, abs=2e-5)
        assert line["subtitle"] == records[i]["subtitle"]
        assert set(line["timings_s"]) == {"encode", "label"}

    before = out.read_bytes()
    assert predict(*argv) == 2
    assert "give --resume to go on, or another name" in capsys.readouterr().err
    assert predict(*argv, "--resume") == 0
    assert out.read_bytes() == before
    assert "6 clips: 6 answered, 6 of them before, 0 failed" in capsys.readouterr().err


def test_a_runs_own_experiment_is_asked_about_the_features_it_knows(run, inputs, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    assert predict(f"{inputs}/clips:held", "--out", out, "--trained", run) == 0  # its base and labels
    assert {label for line in lines(out) for label in line["probabilities"]} == {"happy", "sad", "angry"}
    weights = json.loads((tmp_path / "answers.jsonl.run.json").read_text())["weights"]

    argv = ["--out", out, "--resume", "--config.lora.rank=8"]
    assert predict(f"{inputs}/clips:held", *argv, "--base", inputs / "base", *TINY) == 2
    error = capsys.readouterr().err
    assert f"weights.trained was '{weights['trained']}' for the answers in {out}" in error
    assert "set it back, or name another output" in error

    data = write_data(tmp_path / "data", {"test": 2}, image="image_tokens", encoders={"mae": "other"})
    argv = [f"{data}:test", "--out", tmp_path / "other.jsonl", "--trained", run]
    assert predict(*argv) == 2
    error = capsys.readouterr().err
    assert f"{run} was trained on mae features of one, and here they are of other" in error
    assert "--any-encoders" in error
    assert predict(*argv, "--any-encoders") == 0


def test_another_base_or_other_labels_than_the_run_was_trained_on_are_refused(run, inputs, tmp_path, capsys):
    trained = saying(run, tmp_path / "run", base="sha256:another")
    argv = [f"{inputs}/clips:held", "--trained", trained]
    assert predict(*argv) == 2
    error = capsys.readouterr().err
    assert f"{trained} was trained on the language model" in error and "--any-base" in error
    out = str(tmp_path / "hf")
    assert cli.main(["export", str(trained), out, "--to=hf", f"--base={inputs / 'base'}"]) == 2
    assert "--any-base" in capsys.readouterr().err
    peft = tmp_path / "peft"
    assert cli.main(["export", str(trained), str(peft), "--to=peft"]) == 0
    capsys.readouterr()
    exported = [f"{inputs}/clips:held", "--trained", peft, *TINY, "--config.lora.rank=8", "--base", inputs / "base"]
    assert predict(*exported) == 2
    assert f"{peft} was trained on the language model" in capsys.readouterr().err
    argv.append("--any-base")
    assert predict(*argv, "--config.prompt.labels=happy,calm") == 2
    error = capsys.readouterr().err
    assert "was trained on the labels happy, sad, angry, not happy, calm" in error and "--any-labels" in error
    assert cli.main(["evaluate", "labels", "--data", *map(str, argv), "--out", str(tmp_path / "out")]) == 2
    assert "--any-labels" in capsys.readouterr().err
    assert predict(*argv, "--config.prompt.labels=happy,calm", "--any-labels") == 0
    assert {*json.loads(capsys.readouterr().out.splitlines()[0])["probabilities"]} == {"happy", "calm"}


def test_the_encoder_of_frames_is_that_of_the_run(run, inputs, tmp_path, capsys):
    known = hashlib.sha256(b"the encoder").hexdigest()
    trained = saying(run, tmp_path / "run", encoders={"mae": "one", "eva_vit": f"file:{known}"})
    video, file = tmp_path / "clip.mp4", tmp_path / "eva_vit_g.pth"
    video.touch()
    argv = [video, "--out", tmp_path / "a.jsonl", "--trained", trained, "--eva-vit", file, *NO_FEATURES]
    for content, code, message in (
        (b"another", 2, f"{trained} was trained on eva_vit features of file:{known}, and here they are of file:"),
        (b"the encoder", 2, f"{trained} was trained on mae features of one, and here they are of no encoder"),
    ):
        file.write_bytes(content)
        assert predict(*argv) == code
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_encoder_of_frames_is_that_of_the_image_tokens_learnt(run, tmp_path, capsys):
    """By its parameters, as extraction keeps them; `evaluate` asks the same."""
    pytest.importorskip("torch")
    config = load_config("tiny")
    kept = Encoders(eva_vit=load_eva_vit(EVA_VIT, config.eva_vit)[0]).fingerprints(config)
    same, other = (
        saying(run, tmp_path / "same", encoders=kept),
        saying(run, tmp_path / "other", encoders={"eva_vit": "x"}),
    )
    data = f"{write_data(tmp_path / 'data', {'test': 2})}:test"
    argv = ["--out", tmp_path / "a.jsonl", "--eva-vit", EVA_VIT, "--trained"]
    refused = f"{other} was trained on eva_vit features of x, and here they are of {kept['eva_vit']}; give that encoder"
    for command in (["predict", data], ["evaluate", "labels", "--data", data]):
        assert cli.main([*map(str, [*command, *argv, other])]) == 2
        error = capsys.readouterr().err
        assert refused in error and "--any-encoders" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "a.jsonl").exists()
    assert predict(data, *argv, same) == 0
    assert predict(data, *argv, other, "--any-encoders", "--resume") == 0  # the same answers


@pytest.mark.parametrize(
    ("learnt", "asked", "taken", "said"),
    [
        (["peak"], None, "peak", "frame rule: peak ({run} was trained on frames by peak); --frame takes another"),
        (["peak"], "peak", "peak", ""),
        (["peak"], "5", "5", "warning: --frame 5, and {run} was trained on frames by peak"),
        (["first", "peak"], None, "first", "frame rule: first ({run} was trained on frames by first, peak); --frame"),
        (["first", "peak"], "peak", "peak", ""),
        (None, None, "first", "frame rule: first (the default); --frame takes another"),
        (None, "peak", "peak", ""),
    ],
)
def test_the_frame_rule(tmp_path, learnt, asked, taken, said):
    run = write_meta(tmp_path / "run", **({"frame_rules": learnt} if learnt else {}))  # an older run does not say
    told = []
    assert choose_frame_rule(Run.open(run), asked, told.append) == taken
    assert "".join(told).startswith(said.format(run=run)) and len(told) == bool(said)
    assert choose_frame_rule(None, asked, told.append) == (asked or "first")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--config.prompt.labels=happy,sad"], "config.prompt.labels was"),
        (["--modalities", "AV"], "modalities was 'AVT'"),
        (["--task", "reason"], "requests was []"),
        (["--orders", "2"], "orders was 1"),
    ],
)
def test_another_prompt_does_not_go_on(inputs, answered, changes, named, capsys):
    before = answered.read_bytes()
    argv = [f"{inputs}/clips:held", "--out", answered, "--base", inputs / "base", *TINY, "--resume", *changes]
    assert predict(*argv) == 2
    assert named in capsys.readouterr().err
    assert answered.read_bytes() == before


@pytest.fixture(scope="module")
def answered(inputs):
    out = inputs / "answered.jsonl"
    assert predict(f"{inputs}/clips:held", "--out", out, "--base", inputs / "base", *TINY) == 0
    return out


def test_a_second_process_and_damage_are_refused(inputs, answered, tmp_path, capsys):
    argv = [f"{inputs}/clips:held", "--base", inputs / "base", *TINY, "--resume", "--out"]
    with open_output(answered, resume=True):
        assert predict(*argv, answered) == 4
    assert f"another process writes this output: {answered}" in capsys.readouterr().err

    damaged = tmp_path / "damaged.jsonl"
    good = answered.read_text().splitlines(keepends=True)
    damaged.write_text("".join([good[0], good[1][:40] + "\n", *good[2:]]))
    shutil.copy(f"{answered}.run.json", f"{damaged}.run.json")
    assert predict(*argv, damaged) == 4
    assert f"line 2 is damaged: {damaged}" in capsys.readouterr().err
    orphan = tmp_path / "orphan.jsonl"
    shutil.copy(answered, orphan)
    assert predict(*argv, orphan) == 4
    assert "nobody knows whose answers there are" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_random_it_ends_with_the_answers_of_an_unbroken_run(inputs, tmp_path):
    argv = [f"{inputs}/clips:train", "--base", inputs / "base", *TINY, "--batch-size", 10, "--out"]
    argv = ["--question", "[reason] Why?", "--question", "Sure?", *argv]
    assert predict(*argv, tmp_path / "whole.jsonl") == 0
    for line in lines(tmp_path / "whole.jsonl"):
        assert len(line["answers"]) == 2 and line["answer"] == line["answers"][1]
    out, killed = tmp_path / "answers.jsonl", 0
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for seed in range(2):
        command = [sys.executable, "-m", "tests.infer.dying", str(seed), *map(str, argv), str(out), "--resume"]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode in (0, -9), done.stderr
        killed += done.returncode == -9
    assert killed == 2
    assert predict(*argv, out, "--resume") == 0
    assert timeless(out) == timeless(tmp_path / "whole.jsonl")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Twenty videos, and ten that are none."""
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("videos")
    made = make_dataset(folder / "made", clips={"train": 2}, workers=1)
    clips = [made.video(spec) for spec in made.clips]
    (folder / "clips").mkdir()
    for i in range(30):
        path = folder / f"clips/{i:02d}.mp4"
        if i % 3 == 1:
            path.write_bytes(clips[0].read_bytes()[: 900 * i] if i % 2 else b"no video" * i)
        else:
            shutil.copy(clips[i % 2], path)
    return folder / "clips"


@pytest.mark.slow
def test_ten_bad_clips_among_thirty(inputs, videos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "answers.jsonl"
    argv = [videos, "--out", out, "--base", inputs / "base", *MEDIA, "--batch-size", 10]
    assert predict(*argv) == 1
    assert "30 clips: 20 answered, 10 failed (read 10)" in capsys.readouterr().err
    found = lines(out)
    assert [line["name"] for line in found] == [f"{i:02d}.mp4" for i in range(30)]
    for i, line in enumerate(found):
        assert line["video"] == str(videos / f"{i:02d}.mp4")
        if i % 3 == 1:
            assert (line["status"], line["stage"]) == ("error", "read") and line["video"] in line["error"]
        else:
            assert line["status"] == "success" and line["clip"]["frame"] == 0
            assert line["clip"]["faces_found"] <= line["clip"]["faces_looked_for"] == 1
            assert set(line["timings_s"]) >= {"decode", "face", "sound", "encode", "label"}
    same = [line["probabilities"] for i, line in enumerate(found) if i % 3 != 1 and i % 2 == 0]
    assert all(one == pytest.approx(same[0], abs=2e-6) for one in same)  # copies of a clip, in several batches

    shutil.copytree(videos, mended := tmp_path / "clips")
    shutil.copy(mended / "00.mp4", mended / "04.mp4")  # was bad
    shutil.copy(mended / "00.mp4", mended / "03.mp4")  # is another clip now
    read = []
    encode = VideoClips.encode
    monkeypatch.setattr(
        VideoClips, "encode", lambda self, items, reads: read.extend(items) or encode(self, items, reads)
    )
    assert predict(mended, *argv[1:], "--resume") == 1
    assert {item.name for item in read} == {f"{i:02d}.mp4" for i in range(10) if i not in (1, 7)}  # their batch
    again = lines(out)
    assert [line["name"] for line in again] == [f"{i:02d}.mp4" for i in range(30)]
    assert again[4]["status"] == "success" and again[3]["fingerprint"] == again[0]["fingerprint"]
    assert [again[i] for i in (0, 2, 5, 29)] == [found[i] for i in (0, 2, 5, 29)]


def test_a_video_is_looked_at_as_the_runs_clips_were(run, inputs, videos, tmp_path, capsys):
    pytest.importorskip("torch")
    for file in filter(Path.is_file, (inputs / "base").iterdir()):
        file_digest(file)  # as any test before this one may have done
    trained = shutil.copytree(saying(run, tmp_path / "said", encoders={}, frame_rules=["peak"]), tmp_path / "run")
    video, out, hashed = Path(shutil.copy(videos / "00.mp4", tmp_path)), tmp_path / "answers.jsonl", bytes_read()
    argv = [video, "--trained", trained, "--eva-vit", EVA_VIT, *NO_FEATURES, "--workers=0", "--config.clip.max_faces=6"]
    assert predict(*argv, "--out", out) == 0
    checkpoint = trained / CHECKPOINTS / "4"
    files = [path for part in (PARAMS, META) for path in (checkpoint / part).rglob("*") if path.is_file()]
    assert bytes_read() - hashed == sum(path.stat().st_size for path in [*files, video])  # each once
    told = capsys.readouterr()
    assert told.err.count("frame rule") == 1 and told.out == ""
    (line,) = lines(out)
    spec = ReadSpec(56, None, None, False)
    request = ClipRequest("clip", video)
    seen = read_clip(request, ClipConfig(max_faces=6), spec, frame_rule="peak").clip_info["frame"]
    assert line["clip"]["frame"] == seen > 0
    assert json.loads((tmp_path / "answers.jsonl.run.json").read_text())["frame"] == "peak"
    assert predict(*argv) == 0  # without --out the line is printed
    printed = json.loads(capsys.readouterr().out)
    assert printed | {"timings_s": 0} == line | {"timings_s": 0}
    assert predict(*argv, "--resume") == 2
    assert "--resume: goes with --out" in capsys.readouterr().err


def test_a_manifest(inputs, videos, tmp_path, capsys):
    manifest = tmp_path / "clips.csv"
    rows = [
        "name,video,subtitle,question",
        'one,00.mp4,"Oh, no.",',
        "two,00.mp4,,[reason] What now?",
        "one,02.mp4,,",
        "00,,,",
        "gone,,,",
        "five,03.mp4,,",
        "six,05.mp4,,",
        'half,"00.mp4',
    ]
    manifest.write_text("\n".join(rows))
    out = tmp_path / "answers.jsonl"
    argv = [manifest, "--videos", videos, "--out", out, "--base", inputs / "base", *MEDIA]
    assert predict(*argv) == 1
    found = {line["name"]: line for line in lines(out)}
    assert list(found) == ["one", "two", "clips.csv:4", "00", "gone", "five", "six", "clips.csv:9"]
    assert [found[name]["status"] for name in ("one", "two", "00", "five", "six")] == ["success"] * 5
    assert found["one"]["subtitle"] == "Oh, no." and found["two"]["subtitle"] == ""
    assert found["one"]["answer"] in MERR
    assert "generate" in found["two"]["timings_s"]
    assert "probabilities" in found["00"] and "probabilities" not in found["two"]  # only where no question was asked
    for name, message in (("clips.csv:4", "listed before"), ("gone", "no video 'gone'"), ("clips.csv:9", "")):
        assert (found[name]["status"], found[name]["stage"]) == ("error", "manifest")
        assert message in found[name]["error"] and found[name]["error"]
    assert "8 clips: 5 answered, 3 failed (manifest 3)" in capsys.readouterr().err


def test_a_subtitle_that_is_too_long_is_an_error_of_its_clip(inputs, tmp_path):
    (record,) = [Records(inputs / "clips", "held")[0]]
    records = [record | {"name": "short"}, record | {"name": "long", "subtitle": "so " * 300}]
    data = write_data(tmp_path / "data", {"test": 2}, image="image_tokens", records=records)
    out = tmp_path / "answers.jsonl"
    assert predict(f"{data}:test", "--out", out, "--base", inputs / "base", *TINY) == 1
    short, long = lines(out)
    assert short["status"] == "success"
    assert (long["name"], long["stage"]) == ("long", "prompt") and "shorten the subtitle" in long["error"]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["{clips}", "--base", "{base}", "--trained", "nowhere.pth"], 3, "nowhere.pth"),
        (["{clips}", "--base", "nowhere"], 3, "nowhere"),
        (["nowhere", "--base", "{base}"], 2, "no such file or folder: nowhere"),
        (["{clips}", "--base", "{base}", "--frame", "last"], 2, "--frame last: give first, middle, peak or a frame"),
        (["{clips}", "--base", "{base}", "--task", "reason", "--question", "Why?"], 2, "goes in place of --task"),
        (["{clips}", "--base", "{base}", "--modalities", "AX"], 2, "modalities 'AX'"),
        (["{video}"], 3, "weights.eva_vit: no such file: weights/eva_vit_g.pth"),
        (["{clips}", "--base", "{base}", "--subtitles-from", "speech"], 2, "--recogniser"),
        (["{clips}s", "--base", "{base}"], 2, "no split 'helds'"),
        (["{video}", "--eva-vit", "{video}"], 3, "weights/vit-mae-large"),
        (
            ["{video}", "--base", "{base}"],
            3,
            "weights.eva_vit: no such file: weights/eva_vit_g.pth; clips come as frames",
        ),
        (
            ["{video}", "--base", "{base}", "--random-encoders", "--config.projectors.feature_size=30"],
            2,
            "config.mae: hidden_size=30 must be a multiple of num_heads=4",
        ),
    ],
)
def test_what_cannot_be_is_one_line(inputs, tmp_path, argv, code, message, capsys):
    known = {"clips": f"{inputs}/clips:held", "base": inputs / "base", "video": tmp_path / "clip.mp4"}
    known["video"].touch()
    filled = [text.format(**known) for text in argv]
    config = TINY if "--base" in argv else ["--config=smollm2_135m"]
    assert predict(*filled, "--out", tmp_path / "a.jsonl", *config) == code
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
