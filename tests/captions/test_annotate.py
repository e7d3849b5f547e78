"""`emollama annotate` on synthetic clips: what it says is true, what is done stays done, and MERR's readers take it."""

import base64
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import wave

import numpy as np
import pytest
from PIL import Image

from emollama_jax import cli
from emollama_jax.captions import annotate as annotate_module
from emollama_jax.captions.annotation import AnnotateConfig, SourceClip
from emollama_jax.captions.describers import PROMPTS
from emollama_jax.captions.expression import PHRASES, describe_units
from emollama_jax.captions.mer_factory import GivenParts
from emollama_jax.captions.parts import Parts, coarse_caption
from emollama_jax.captions.stage_store import StageStore, stage_key
from emollama_jax.data.annotation_files import find_annotation_files
from emollama_jax.data.annotations import read_annotations
from emollama_jax.media.action_units import read_action_units
from emollama_jax.media.face_detection import can_detect
from emollama_jax.media.face_mesh import BLENDSHAPES
from emollama_jax.synthetic.action_units import write_action_units
from emollama_jax.synthetic.clip import clip_sentence, peak_aus
from emollama_jax.synthetic.dataset import SEEN, make_dataset
from tests.eval.judge_server import Reply, said, serve
from tests.media.test_faces import write_video
from tests.train.runs import ROOT

pytest.importorskip("av", reason="PyAV writes and reads the videos")
CLIPS = 9
BY_FACE = {"smile": "happy", "drawn": "sad", "wide": "surprise"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    data = make_dataset(root / "data", clips={"train": CLIPS}, seed=4, people=2, workers=1)
    write_action_units(data.clips, root / "units")
    return data, root / "units"


@pytest.fixture(scope="module")
def done(made, tmp_path_factory):
    """The annotations of one run, which no test changes."""
    data, units = made
    out = tmp_path_factory.mktemp("done") / "merr"
    assert annotate(data, out, "--units", units) == 0
    return out


def annotate(data, out, *arguments):
    subtitles = ("--subtitles", data.root / "transcription.csv")
    argv = ["annotate", data.root / "video", "--out", out, "--workers", 1, *subtitles, *arguments]
    return cli.main([*map(str, argv)])


def results(out):
    """All files but those of the stages, which hold nothing else."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != "lock"}


def records(out):
    return {one["name"]: one for one in map(json.loads, (out / "annotations.jsonl").read_text().splitlines())}


# What is said


def test_what_is_said_is_what_the_clips_were_made_of(made, done):
    data, _ = made
    found = records(done)
    for spec in data.clips:
        one, label = found[spec.name], BY_FACE.get(spec.factors.face)
        assert one["status"] == "annotated" and one["frames"] == spec.num_frames
        assert abs(one["peak_index"] - spec.peak_index) <= 1 and one["peak_by"] == one["label_by"] == "openface2"
        assert label is None or one["label"] == label
        assert all(phrase in PHRASES[unit] for unit, phrase in zip(one["units"], one["expression"], strict=True))
        assert all(text in one["caption_coarse"] for text in (*one["expression"], one["voice"], one["subtitle"]))
        aus = peak_aus(spec)
        assert {unit for unit, value in aus.items() if value >= SEEN} <= {*one["units"]} <= {u for u in aus if aus[u]}
        assert one["subtitle"] == clip_sentence(spec)
        assert one["picture"].startswith("One face in a ") or not can_detect()
        voice = spec.factors.voice
        assert ("high" in one["voice"]) == (voice == "lively") or voice in ("unclear",)
        assert "breathy" in one["voice"] or voice != "hushed"
        assert (done / f"frames/{spec.name}.png").exists()


def test_merrs_readers_take_the_files(made, done, tmp_path):
    data, _ = made
    files = find_annotation_files("merr", done, videos=data.root / "video")
    found = read_annotations(files, strict=True)
    assert [clip.name for clip in found.clips] == [spec.name for spec in data.clips]
    for clip, one in zip(found.clips, records(done).values(), strict=True):
        assert (clip.emotion, clip.peak_index, clip.subtitle) == (one["label"], one["peak_index"], one["subtitle"])
        assert (clip.caption_coarse, clip.frame_count, clip.valence) == (one["caption_coarse"], one["frames"], None)
        assert clip.video is not None and clip.split == "coarse"
    # As the original's loader reads them.
    assert all(len(line.strip().split(" ")) == 4 for line in (done / "MERR_coarse_grained.txt").open())
    with (done / "transcription_en_all.csv").open() as file:
        assert {row["name"] for row in csv.DictReader(file)} == set(records(done))
    argv = ["prepare", "merr", done, "--videos", data.root / "video", "--out", tmp_path, "--frame", "peak"]
    assert cli.main([*map(str, argv)]) == 0


def test_a_list_of_labels_goes_before_units_and_what_has_neither_is_dropped_and_counted(made, tmp_path, capsys):
    data, units = made
    some = tmp_path / "units"
    some.mkdir()
    first, second, third, _, fifth = (spec.name for spec in data.clips[:5])
    shutil.copy(units / f"{first}.csv", some)
    (some / f"{second}.csv").write_text("frame,success,AU01_r,AU09_r,AU15_r\n1,1,0,2,2\n2,1,0,2,2\n")
    (some / f"{third}.csv").write_text("frame,success,AU01_r\n1,1,much\n")
    (some / f"{fifth}.csv").write_text("frame,success,AU06_r\n1,1,0\n2,1,1\n3,1,0\n")  # which matches no rule
    labels = tmp_path / "labels.csv"
    labels.write_text(f"name,emotion\n{first}.mp4,doubt\n{data.clips[3].name},fear\n{fifth},happy\n")
    assert annotate(data, tmp_path / "out", "--units", some, "--label-file", labels) == 1
    found = records(tmp_path / "out")
    assert (found[first]["label"], found[first]["label_by"], found[first]["peak_by"]) == (
        "doubt",
        "label file",
        "openface2",
    )
    fourth = found[data.clips[3].name]
    assert (fourth["label"], fourth["peak_by"]) == ("fear", "motion") and not fourth["expression"]
    assert abs(fourth["peak_index"] - data.clips[3].peak_index) <= 1
    assert (found[fifth]["label"], found[fifth]["peak_by"], found[fifth]["peak_index"]) == ("happy", "openface2", 1)
    assert found[fifth]["units"] == {"AU06": 1.0} and found[fifth]["matches"] == {} and found[fifth]["expression"]
    assert found[second]["reason"] == "its units say disgust, which is none of the labels"
    assert found[third]["status"] == "failed" and "line 2: not a row of numbers" in found[third]["reason"]
    printed = capsys.readouterr().out
    assert f"dropped {CLIPS - 4}: no action units and no label {CLIPS - 5}" in printed and "failed 1" in printed
    assert re.search(r"seconds on \d+ processors, [\d.]+ clips a second: units \d+ %, peak \d+ %, read \d+ %", printed)
    page = (tmp_path / "out/report.html").read_text()
    assert "no action units and no label" in page and f"frames/{first}.png" in page
    assert all(f"{spec.name}" in page for spec in data.clips)  # those that are left out, too


def test_acted_stills_are_labelled_as_acted_or_listed_as_not(face_landmarker, real_stills, tmp_path, capsys):
    """By blendshapes, which show neither anger nor disgust and are not taken to."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for label, path in real_stills.items():
        pixels = np.asarray(Image.open(path).convert("RGB").resize((256, 256)))
        write_video(videos / f"{label}.mp4", [pixels] * 3)
    argv = ["annotate", videos, "--mesh", face_landmarker, "--workers", 1, "--out", tmp_path / "out"]
    assert cli.main([*map(str, argv)]) == 0
    found, printed = records(tmp_path / "out"), capsys.readouterr().out
    for label in ("happy", "surprise"):
        one = found[label]
        assert (one["label"], one["label_by"], one["peak_by"]) == (label, "blendshapes", "motion")
        assert one["expression"] and all(unit in BLENDSHAPES for unit in one["units"])
    for label in ("angry", "disgust"):
        assert found[label]["reason"] == "no rule matches its blendshapes at the peak"
    assert "units of some clips can never give: angry, contempt, disgust, doubt, fear, sad, worried" in printed
    page = (tmp_path / "out/report.html").read_text()
    assert "angry, disgust" in page and "Labels by them alone are to be looked at" in page
    assert read_action_units(tmp_path / "out/blendshapes/happy.csv").source == "blendshapes"


def test_another_person_of_a_table_can_be_asked_for(made, tmp_path):
    data, _ = made
    (tmp_path / "units").mkdir()
    rows = [f"{i},{face},1,{units}" for i in range(1, 9) for face, units in ((3, "2,2,0,0"), (5, "0,0,2,2"))]
    rows.append("9,3,1,2,2,0,0")  # the first person is there for longer
    head = "frame,face_id,success,AU06_r,AU12_r,AU01_r,AU04_r"
    (tmp_path / f"units/{data.clips[0].name}.csv").write_text("\n".join([head, *rows]) + "\n")
    labels = []
    for person in (1, 2):
        out = tmp_path / f"out{person}"
        assert annotate(data, out, "--units", tmp_path / "units", "--person", person) == 0
        labels.append(records(out)[data.clips[0].name]["label"])
    assert labels == ["happy", "sad"]


def test_phrases_depend_on_seed_and_clip_alone():
    assert describe_units(["AU01", "AU12"], "a", 1)[1] == describe_units(["AU12"], "a", 1)[0]
    assert len({tuple(describe_units(PHRASES, name, seed)) for name in "ab" for seed in range(5)}) == 10
    assert describe_units(["AU45"], "a") == []


def test_a_caption_leaves_out_what_is_not_known():
    assert coarse_caption(Parts(label="sad", subtitle="No.")) == 'The person is saying: "No."'


def test_what_mer_factory_has_said_is_taken_and_what_it_lacks_is_made(made, tmp_path, capsys):
    data, _ = made
    first, second, third = data.clips[:3]
    for folder, name, label, said_of in (
        ("a", first.name, "surprised", {"visual_objective": "A man.", "audio_analysis": "A flat tone."}),
        ("a", second.name, "unknown", {}),
        ("a", third.name, "disgust", {}),
        ("b", first.name, "sad", {}),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        about = {
            "overall_peak_frame_info": {"frame_number": 8, "top_aus_intensities": {"AU12_r": 2.0}},
            "coarse_descriptions_at_peak": said_of,
            "final_summary": "Thus." if said_of else None,
            "ground_truth_label": label,
        }
        (tmp_path / folder / f"{name}_merr_data.json").write_text(json.dumps(about))
    (tmp_path / "units").mkdir()
    rows = [
        f"{i},1,{3 * (i == 4)},{1 + (i == 8)},0" for i in range(1, 12)
    ]  # the mouth is drawn, and once the brows go up
    (tmp_path / f"units/{first.name}.csv").write_text("frame,success,AU01_r,AU12_r,AU45_r\n" + "\n".join(rows) + "\n")
    assert annotate(data, tmp_path / "out", "--mer-factory", tmp_path, "--units", tmp_path / "units") == 0
    one, found = records(tmp_path / "out")[first.name], capsys.readouterr()
    assert (one["label"], one["peak_index"]) == ("surprise", 7)
    assert one["label_by"] == one["peak_by"] == "MER-Factory" and one["units"] == {"AU12": 2.0}  # those of this peak
    assert (one["picture"], one["voice"], one["caption_fine"]) == ("A man.", "A flat tone.", "Thus.")
    assert one["describers"] == {k: "MER-Factory" for k in ("picture", "voice", "fine")} | {
        "expression": "phrases",
        "coarse": "template",
    }
    assert "a clip of this name is in" in found.err and "'disgust' is none of" in found.err
    assert f"dropped {CLIPS - 1}: no action units and no label {CLIPS - 1}" in found.out
    assert "captions: coarse 1, fine 1" in found.out


def test_whoever_calls_it_is_told_how_far_each_stage_is(made, tmp_path):
    data, told = made[0], []
    clips = [
        SourceClip(name=spec.name, video=data.video(spec), label="sad", given=GivenParts(peak_index=2))
        for spec in data.clips[:2]
    ]
    result = annotate_module.annotate(clips, tmp_path, AnnotateConfig(), progress=lambda *stage: told.append(stage))
    assert told == [("read", 1, 2), ("read", 2, 2), ("picture", 1, 2), ("picture", 2, 2)]
    assert {*result.seconds} >= {"units", "peak", "read", "picture", "words", "fine"}


# What is kept


def test_killed_after_any_stage_and_started_again_the_files_are_the_same(made, done, tmp_path, monkeypatch):
    data, units = made
    expected, out, put = results(done), tmp_path / "merr", annotate_module.ClipStages.put

    class Killed(BaseException):
        pass

    def killed_after(count):
        left = [count]

        def put_and_die(self, stage, key, value):
            put(self, stage, key, value)
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        return put_and_die

    for count in (3, CLIPS, CLIPS, CLIPS, CLIPS):  # within each of the stages
        monkeypatch.setattr(annotate_module.ClipStages, "put", killed_after(count))
        with pytest.raises(Killed):
            annotate(data, out, "--units", units)
    monkeypatch.setattr(annotate_module.ClipStages, "put", put)
    assert annotate(data, out, "--units", units) == 0
    assert results(out) == expected


KILLED = """
import os, signal, sys
from emollama_jax import cli
from emollama_jax.captions import annotate, stage_store
from emollama_jax.cli import annotate as verb
argv, put = sys.argv[2:], stage_store.ClipStages.put

def run(stage, before):
    def put_or_die(self, name, key, value):
        if name != stage:
            return put(self, name, key, value)
        if not before:
            put(self, name, key, value)
        os.kill(os.getpid(), signal.SIGKILL)
    stage_store.ClipStages.put = put_or_die
    if stage == "page":
        verb.write_page = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    code = cli.main(argv)
    sys.stdout.flush()
    os._exit(code)

for i, stage in enumerate(sys.argv[1].split(",")):
    child = os.fork()
    if not child:
        run(stage, i % 2)
    print(stage, os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_killed_by_the_system_at_every_stage_and_started_again_the_files_are_the_same(
    made, tmp_path, endpoint, face_landmarker
):
    """SIGKILL, before or after a result of the stage is kept; and while the files are written."""
    data, _ = made
    videos, stages = tmp_path / "videos", "units,peak,read,picture,tone,expression,coarse,fine,page"
    videos.mkdir()
    for spec in data.clips[:3]:
        shutil.copy(data.video(spec), videos)
    argv = ["annotate", videos, "--mesh", face_landmarker, "--config.clip.max_faces=4", "--describe", "fine"]
    argv += ["--label-file", data.root / "relative_train_NCEV.txt", "--workers", 1, "--out"]
    endpoint.reply = lambda question, n: said(f"Because of {len(question)} letters.")
    assert cli.main([*map(str, [*argv, tmp_path / "whole"])]) == 0
    endpoint.requests.clear()
    command = [sys.executable, "-c", KILLED, stages, *map(str, [*argv, tmp_path / "killed"])]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    ended = [line for line in ran.stdout.splitlines() if line.split()[0] in stages.split(",")]
    assert ended == [f"{stage} {signal.SIGKILL:d}" for stage in stages.split(",")], ran.stderr
    before = len(asked(endpoint))
    assert cli.main([*map(str, [*argv, tmp_path / "killed"])]) == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert before >= 3 and asked(endpoint) == []  # what was kept when the files were written is not asked again


def test_a_second_run_does_nothing_anew_and_a_changed_seed_only_what_depends_on_it(made, done, tmp_path, monkeypatch):
    data, units = made
    out = tmp_path / "merr"
    shutil.copytree(done, out)
    put, stages = annotate_module.ClipStages.put, []
    monkeypatch.setattr(
        annotate_module.ClipStages, "put", lambda s, stage, k, v: (stages.append(stage), put(s, stage, k, v))
    )
    assert annotate(data, out, "--units", units) == 0
    assert stages == [] and results(out) == results(done)
    assert annotate(data, out, "--units", units, "--seed", 1) == 0
    assert {*stages} == {"expression", "coarse"}
    stages.clear()
    table = units / f"{data.clips[0].name}.csv"  # another file that says the same changes nothing behind the peak
    before = table.read_text()
    table.write_text(before + "\n")
    try:
        assert annotate(data, out, "--units", units, "--seed", 1) == 0
    finally:
        table.write_text(before)
    assert stages == ["peak"]


def test_a_damaged_file_of_stages_is_made_anew(tmp_path):
    store = StageStore(tmp_path)
    store.open("a").put("one", stage_key(1, ["x"]), {"v": 1})
    assert store.open("a").get("one", stage_key(1, ["x"])) == {"v": 1}
    assert store.open("a").get("one", stage_key(2, ["x"])) is None
    (tmp_path / "a.json").write_text('{"one": {"key"')
    assert store.open("a").get("one", stage_key(1, ["x"])) is None


# A model behind an endpoint


@pytest.fixture
def endpoint(monkeypatch):
    """A server that is asked; `reply` may be replaced."""
    with serve(lambda question, n: said(f"Because of {len(question)} clues.")) as server:
        monkeypatch.setenv("EMOLLAMA_DESCRIBER_ADDRESS", server.address)
        monkeypatch.setenv("EMOLLAMA_DESCRIBER_MODEL", "m")
        yield server


def asked(server):
    """(text, number of parts) of each request since the last call."""
    contents = [request["messages"][0]["content"] for request, _ in server.requests]
    server.requests.clear()
    return [(content[0]["text"], len(content)) for content in contents]


def test_an_endpoint_describes_pictures_and_infers_and_is_asked_nothing_twice(made, done, tmp_path, endpoint):
    data, units = made
    out = tmp_path / "merr"
    shutil.copytree(done, out)
    assert annotate(data, out, "--units", units, "--describe", "picture,fine") == 0
    requests = asked(endpoint)
    pictures = [text for text, parts in requests if parts == 2]
    fine = [text for text, parts in requests if parts == 1]
    assert pictures == [PROMPTS["picture"]] * CLIPS and len(fine) == CLIPS
    assert all("Tone of voice: " in text and "feels " in text for text in fine)
    found = read_annotations(find_annotation_files("merr", out, videos=data.root / "video"), strict=True).clips
    assert [clip.split for clip in found] == ["coarse"] * CLIPS + ["fine"] * CLIPS
    assert all(clip.caption_fine.startswith("Because of") for clip in found)
    assert records(out)[data.clips[0].name]["describers"]["fine"] == "m"
    assert annotate(data, out, "--units", units, "--describe", "picture,fine") == 0
    assert asked(endpoint) == []
    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"fine": "Why {label}? {clues}"}')
    assert annotate(data, out, "--units", units, "--describe", "picture,fine", "--prompts", prompts) == 0
    texts = [text for text, _ in asked(endpoint)]
    assert len(texts) == CLIPS and all(text.startswith("Why ") for text in texts)


def test_errors_of_an_endpoint_cost_no_finished_work_and_nothing_is_asked_twice(made, done, tmp_path, endpoint, capsys):
    """Too many requests, a fault of the server and a line that is cut are tried again at once, an empty answer by the
    next run, a refusal never; whoever has answered is not asked again."""
    data, units = made
    out = tmp_path / "merr"
    shutil.copytree(done, out)
    soon = {"retry-after-ms": "1"}
    cut = Reply(200, b'{"choices": [', {"Content-Length": "500", **soon})
    faults = [Reply(429, b"", soon), Reply(500, b"", soon), cut, said(""), said(None, refusal="I will not")]
    first: dict[str, Reply] = {}

    def reply(question, n):
        if n == 0 and len(first) < len(faults):
            first[question] = faults[len(first)]
            return first[question]
        return said("An inference.")

    endpoint.reply = reply
    assert annotate(data, out, "--units", units, "--describe", "fine") == 1
    assert "2 texts were not given" in capsys.readouterr().out
    again = {question: endpoint.asked[question] - 1 for question in endpoint.asked}
    assert len(again) == CLIPS
    assert [again[question] for question in first] == [1, 1, 1, 0, 0] and sum(again.values()) == 3
    unanswered = [one["unanswered"]["fine"].partition(":")[0] for one in records(out).values() if one["unanswered"]]
    assert sorted(unanswered) == ["failed", "refused"]
    assert len((out / "MERR_fine_grained.txt").read_text().splitlines()) == CLIPS - 2
    endpoint.requests.clear()
    assert annotate(data, out, "--units", units, "--describe", "fine") == 1  # one stays refused
    assert [text for text, _ in asked(endpoint)] == [question for question in first if first[question] is faults[3]]
    assert len((out / "MERR_fine_grained.txt").read_text().splitlines()) == CLIPS - 1
    assert annotate(data, out, "--units", units, "--describe", "fine") == 1 and asked(endpoint) == []


def test_a_voice_is_sent_as_sound_and_its_description_goes_before_measures(made, done, tmp_path, endpoint):
    data, units = made
    out = tmp_path / "merr"
    shutil.copytree(done, out)
    endpoint.reply = lambda question, n: said("A warm voice.")
    assert annotate(data, out, "--units", units, "--describe", "voice") == 0
    parts = [request["messages"][0]["content"][1] for request, _ in endpoint.requests]
    assert len(parts) == CLIPS and {part["input_audio"]["format"] for part in parts} == {"wav"}
    with wave.open(io.BytesIO(base64.b64decode(parts[0]["input_audio"]["data"]))) as sound:
        assert (sound.getframerate(), sound.getnchannels()) == (16000, 1) and sound.getnframes() > 16000
    assert all(one["voice"] == "A warm voice." in one["caption_coarse"] for one in records(out).values())
    assert {one["describers"]["voice"] for one in records(out).values()} == {"m"}


# What users get wrong


def test_names_that_no_list_can_hold_are_told(tmp_path, capsys):
    (tmp_path / "my clip.mp4").touch()
    assert cli.main(["annotate", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "my clip.mp4: MERR's lists can hold no name with blanks; rename it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--units", "NONE"], "is about none of the videos"),
        (["--describe", "poem"], "no text 'poem'"),
        (["--describe", "fine"], "set EMOLLAMA_DESCRIBER_ADDRESS"),
        (["--label-file", "labels.csv"], "'grumpy' is none of happy"),
        (["--prompts", "labels.csv"], "cannot be read as JSON"),
        (["--person", "0"], "is not a whole number from 1 on"),
    ],
)
def test_mistakes_are_one_line(made, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EMOLLAMA_DESCRIBER_ADDRESS", raising=False)
    (tmp_path / "NONE").mkdir()
    (tmp_path / "labels.csv").write_text("name,emotion\ntrain_000000,grumpy\n")
    assert annotate(made[0], tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
