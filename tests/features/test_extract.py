"""From videos to records: each clip's own, whatever is beside it, however often it is stopped, and nothing lost."""

import dataclasses
import resource
import shutil

import numpy as np
import pytest

from emollama_jax.cli import main
from emollama_jax.config import load_config
from emollama_jax.data import parts
from emollama_jax.data.annotations import Annotations, Clip
from emollama_jax.data.parts import read_records
from emollama_jax.data.prepare import prepare
from emollama_jax.data.recipe import Recipe
from emollama_jax.data.records import Records, decode_frame, read_clip_info
from emollama_jax.errors import UserError
from emollama_jax.features.encoders import Encoders, local_mesh, random_encoders
from emollama_jax.features.extract import extraction_part_maker, extraction_recipe
from emollama_jax.media.clip import ClipRequest, read_clip
from emollama_jax.synthetic.dataset import make_dataset
from emollama_jax.text.labels import MERR
from emollama_jax.weights.encoders import random_encoder
from tests.media.hostile import Sound, pictures, spoil, tone, write, write_hostile_files

pytest.importorskip("av")

TINY = load_config("tiny")
SMALL = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_layers": 1}
CONFIG = dataclasses.replace(
    TINY,
    mae=dataclasses.replace(TINY.mae, **SMALL),
    videomae=dataclasses.replace(TINY.videomae, **SMALL),
    hubert=dataclasses.replace(TINY.hubert, num_layers=1),
    projectors=dataclasses.replace(TINY.projectors, feature_size=32),
    clip=dataclasses.replace(TINY.clip, max_faces=5),
)


@pytest.fixture(scope="module")
def encoders():
    return random_encoders(CONFIG)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("synthetic") / "data", clips={"train": 7, "val": 2}, workers=1)


@pytest.fixture(scope="module")
def clips(dataset):
    return tuple(
        Clip(name=spec.name, split=spec.split, emotion=spec.label, subtitle="Well.", video=dataset.video(spec))
        for spec in dataset.clips
    )


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "CLIPS_PER_PART", 3)


def extracted(clips, out, encoders, *, frame_rule="peak", subtitle_sources=(), **options):
    recipe = extraction_recipe(CONFIG, encoders, labels=MERR, frame_rule=frame_rule, subtitle_sources=subtitle_sources)
    options = {"workers": 0} | options
    return prepare(
        "clips",
        Annotations(tuple(clips), ()),
        out,
        recipe,
        extraction_part_maker(CONFIG, encoders, **options),
    )


def records_of(prepared) -> dict[str, dict]:
    by_split = [Records(prepared.path, split) for split in prepared.counts]
    return {record["name"]: record for records in by_split for record in map(records.__getitem__, range(len(records)))}


def features_of(prepared) -> dict[str, np.ndarray]:
    return {name: record["features"] for name, record in records_of(prepared).items()}


@pytest.fixture(scope="module")
def reference(clips, encoders, tmp_path_factory):
    return extracted(clips, tmp_path_factory.mktemp("reference"), encoders, batch_size=1)


def test_a_record_holds_the_encoders_features_and_the_peak(reference, dataset, encoders):
    records = records_of(reference)
    assert set(records) == {spec.name for spec in dataset.clips}
    for spec in dataset.clips:
        record = records[spec.name]
        request = ClipRequest(spec.name, dataset.video(spec))
        media = read_clip(request, CONFIG.clip, encoders.read_spec(56), frame_rule="peak")
        features, has = encoders.features([media], 32)
        np.testing.assert_allclose(record["features"], features[0], atol=1e-5)
        assert record["has_feature"].all() and has.all()
        assert abs(record["features"]).max(axis=1).min() > 0.1
        np.testing.assert_array_equal(decode_frame(record["frame"]), media.frame)
        assert (MERR[record["emotion"]], record["subtitle"]) == (spec.label, "Well.")
    metadata = Records(reference.path, "train").metadata
    assert set(metadata["recipe"]["encoders"]) == {"mae", "videomae", "hubert"}
    clip_info = read_clip_info(reference.path)
    assert [info["name"] for info in clip_info] == [spec.name for spec in dataset.clips]
    assert all(info["faces_looked_for"] == 5 and info["frames"] > 20 for info in clip_info)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "batch_size", "mesh"),
    [(0, 32, False), (2, 7, False), (0, 5, True)],
    ids=["batches", "workers", "devices"],
)
def test_batches_workers_and_devices_change_nothing(clips, reference, tmp_path, workers, batch_size, mesh):
    encoders = random_encoders(CONFIG, mesh=local_mesh() if mesh else None)
    found = features_of(extracted(clips, tmp_path, encoders, workers=workers, batch_size=batch_size))
    for name, expected in features_of(reference).items():
        np.testing.assert_allclose(found[name], expected, atol=1e-5)


def test_neighbours_change_nothing(clips, reference, encoders, tmp_path):
    alone = features_of(extracted(clips[4:5], tmp_path, encoders))
    np.testing.assert_allclose(alone[clips[4].name], features_of(reference)[clips[4].name], atol=1e-5)


def test_pictures_and_sound_make_their_own_features_alone(clips, encoders):
    """A clip with the sound of another has the pictures' features of the one and the voice's of the other."""
    spec = encoders.read_spec(56)
    one, other = (read_clip(ClipRequest(clip.name, clip.video), CONFIG.clip, spec) for clip in clips[:2])
    mixed = dataclasses.replace(one, waveform=other.waveform)
    features, _ = encoders.features([one, other, mixed], 32)
    np.testing.assert_allclose(features[2, :2], features[0, :2], atol=1e-5)
    np.testing.assert_allclose(features[2, 2], features[1, 2], atol=1e-5)
    assert abs(features[0] - features[1]).max(axis=1).min() > 1e-2


def test_a_stopped_extraction_goes_on(clips, reference, encoders, tmp_path):
    """Stopped in the second part; the first is not made again."""
    done = []

    def stop(count, aside):
        done.append(count)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extracted(clips, tmp_path, encoders, on_part=stop)
    (part, *_) = sorted(tmp_path.glob(".*.partial/train/*.array_record"))
    made = part.stat().st_mtime_ns
    goes_on = []
    prepared = extracted(
        clips, tmp_path, encoders, on_part=lambda count, aside: goes_on.append((count, part.stat().st_mtime_ns))
    )
    assert goes_on == [(1, made), (2, made)]
    for name, expected in features_of(reference).items():
        np.testing.assert_allclose(features_of(prepared)[name], expected, atol=1e-5)
    assert not list(tmp_path.glob(".*.partial"))


def test_processes_share_the_parts(clips, encoders, tmp_path):
    recipe = extraction_recipe(CONFIG, encoders, labels=MERR, frame_rule="first")
    whole = extraction_part_maker(CONFIG, encoders, workers=0)(clips, recipe, tmp_path / "whole")
    shares = [extraction_part_maker(CONFIG, encoders, workers=0, shard_index=i, num_shards=2) for i in range(2)]
    first = shares[0](clips, recipe, tmp_path / "shared")
    assert [path.exists() for path in first] == [True, False, True]
    assert shares[1](clips, recipe, tmp_path / "shared") == first
    for one, other in zip(whole, first, strict=True):
        for a, b in zip(read_records(one), read_records(other), strict=True):
            a, b = (recipe.features().deserialize_example_np(x) for x in (a, b))
            np.testing.assert_allclose(a["features"], b["features"], atol=1e-5)


def test_the_data_set_appears_once_for_all_processes(clips, encoders, tmp_path):
    """The second process makes its parts, waits, and finds what the first has written."""
    recipe = extraction_recipe(CONFIG, encoders, labels=MERR, frame_rule="first")
    share = lambda i: extraction_part_maker(CONFIG, encoders, workers=0, shard_index=i, num_shards=2)
    annotations, waits = Annotations(clips, ()), []

    def first_writes(reason):
        waits.append(reason)
        if len(waits) == 2:
            prepare("clips", annotations, tmp_path, recipe, share(0))

    prepared = prepare("clips", annotations, tmp_path, recipe, share(1), process=1, wait_for_all=first_writes)
    assert (prepared.was_there, prepared.counts) == (True, {"train": 7, "val": 2})


def test_features_that_no_encoder_computes_come_from_files(clips, encoders, tmp_path):
    """And those that are computed are written in the reference's folders, where `prepare` finds them."""
    wide = dataclasses.replace(CONFIG.projectors, feature_size=1024)
    voice = {"hidden_size": 1024, "num_heads": 4, "intermediate_size": 8, "position_groups": 128}
    config = dataclasses.replace(CONFIG, projectors=wide, hubert=dataclasses.replace(CONFIG.hubert, **voice))
    encoders = dataclasses.replace(random_encoders(config), mae=None, videomae=None)
    np.save(tmp_path / "face.npy", np.full(1024, 2.5))
    with_face = [dataclasses.replace(clip, features=(tmp_path / "face.npy", None, None)) for clip in clips[:2]]
    recipe = extraction_recipe(config, encoders, labels=MERR, frame_rule="first")
    make_parts = extraction_part_maker(config, encoders, workers=0, npy=tmp_path / "npy")
    prepared = prepare("clips", Annotations(tuple(with_face), ()), tmp_path / "out", recipe, make_parts)
    for name, record in records_of(prepared).items():
        assert record["has_feature"].tolist() == [True, False, True]
        assert (record["features"][0] == 2.5).all() and (record["features"][1] == 0).all()
        np.testing.assert_array_equal(np.load(tmp_path / f"npy/HL-UTT/{name}.npy"), record["features"][2])
    assert [path.name for path in (tmp_path / "npy").iterdir()] == ["HL-UTT"]


def test_encoders_of_another_width_than_the_models_are_refused():
    encoders = Encoders(mae=random_encoder("mae", CONFIG.mae, 0))
    encoders.check_sizes(CONFIG)
    with pytest.raises(UserError, match=r"weights.mae: its features have 32 numbers, the model takes 1024 \(config\."):
        encoders.check_sizes(TINY)


def test_image_tokens_and_subtitles(clips, tmp_path):
    encoders = random_encoders(CONFIG, eva_vit=True)
    video = clips[0].video
    beside = tmp_path / "clip.mp4"
    beside.write_bytes(video.read_bytes())
    beside.with_suffix(".srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nWho <i>said</i> that?\n")
    quiet = dataclasses.replace(clips[1], subtitle="")
    clips = (dataclasses.replace(clips[0], video=beside, subtitle=""), clips[1], dataclasses.replace(quiet, name="c"))
    records = records_of(extracted(clips, tmp_path / "out", encoders, subtitle_sources=("file", "track")))
    assert [record["subtitle"] for record in records.values()] == ["Who said that?", "Well.", ""]
    assert all(record["image_tokens"].shape == (17, 48) for record in records.values())
    heard = lambda waveform: f"{len(waveform)} samples"
    (record,) = records_of(
        extracted([quiet], tmp_path / "heard", encoders, subtitle_sources=("file", "speech"), transcribe=heard)
    ).values()
    assert record["subtitle"].endswith(" samples")


def test_bad_clips_are_named_and_put_aside(clips, encoders, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    wrong = [
        dataclasses.replace(clips[0], name="text", video=tmp_path / "text.mp4"),
        dataclasses.replace(clips[0], name="none", video=None),
    ]
    prepared = extracted([wrong[0], clips[0], wrong[1], clips[1]], tmp_path / "out", encoders)
    assert prepared.counts == {"train": 2}
    assert [(problem.name, problem.kind) for problem in prepared.problems] == [
        ("text", "not_prepared"),
        ("none", "not_prepared"),
    ]
    assert "text.mp4" in prepared.problems[0].message and "has no video" in prepared.problems[1].message


def test_a_clip_whose_pictures_cannot_be_decoded_is_told_and_has_its_voice(clips, encoders, tmp_path):
    path = tmp_path / "broken.mkv"
    write(path, pictures(10), codec="ffv1", pixels="yuv444p", sound=Sound(tone(1.0), codec="flac"))
    spoil(path, "video")
    whole = [dataclasses.replace(clips[0], split="test"), Clip(name="broken", split="test", video=path)]
    prepared = extracted(whole, tmp_path / "out", encoders, frame_rule="first")
    records = records_of(prepared)
    assert [record["has_feature"].tolist() for record in records.values()] == [[True] * 3, [False, False, True]]
    assert not records["broken"]["features"][:2].any() and not decode_frame(records["broken"]["frame"]).any()
    notes = {info["name"]: info.get("notes") for info in read_clip_info(prepared.path)}
    assert notes[clips[0].name] is None and notes["broken"][0].startswith("its pictures cannot be decoded")


def test_a_long_clip_is_put_aside(tmp_path, encoders):
    long = write_hostile_files(tmp_path, "two hours")["two hours"].path
    with pytest.raises(UserError, match=r"more than clip.max_seconds=120; cut it into clips"):
        read_clip(ClipRequest("long", long), CONFIG.clip, encoders.read_spec(56))


@pytest.mark.slow
def test_every_hostile_file_is_a_record_or_one_problem(tmp_path, encoders):
    """And memory stays bounded, whatever the files say of themselves."""
    files = write_hostile_files(tmp_path / "files")
    clips = tuple(Clip(name=name, split="test", video=file.path) for name, file in files.items())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prepared = extracted(clips, tmp_path / "out", encoders, frame_rule="middle")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{len(files)} files: {prepared.counts['test']} records, memory grew by {grown:.0f} MiB")
    records, problems = records_of(prepared), {problem.name: problem.message for problem in prepared.problems}
    assert set(records) | set(problems) == set(files) and not set(records) & set(problems)
    too_long = {name for name, message in problems.items() if "max_seconds" in message}
    for name, file in files.items():
        assert (name in records) == (file.expected == "frames" and name not in too_long), problems.get(name)
    for name, record in records.items():
        assert np.isfinite(record["features"]).all(), name
        heard = files[name].sound is not None and name != "silence"
        assert record["has_feature"].tolist() == [True, True, heard], name
    assert all("\n" not in message for message in problems.values())
    assert grown < 600


@pytest.mark.slow
def test_real_clips(real_clips, encoders, tmp_path):
    """Talking faces with and without sound."""
    clips = [Clip(name=name, split="test", video=path) for name, path in real_clips.items()]
    prepared = extracted(clips, tmp_path / "out", encoders)
    records = records_of(prepared)
    for info in read_clip_info(prepared.path):
        print(info)
        assert info["faces_found"] == info["faces_looked_for"] == 5, info
    assert set(records) == set(real_clips)
    features = np.stack([record["features"] for record in records.values()])
    assert np.isfinite(features).all()
    again = features_of(extracted(clips[::-1], tmp_path / "again", encoders, batch_size=3))
    for name, record in records.items():
        np.testing.assert_allclose(again[name], record["features"], atol=1e-5)


def test_real_stills(real_stills, encoders, tmp_path):
    clips = [Clip(name=name, split="test", video=path) for name, path in real_stills.items()]
    prepared = extracted(clips, tmp_path / "out", encoders)
    clip_info = read_clip_info(prepared.path)
    assert [(info["frames"], info["faces_found"]) for info in clip_info] == [(1, 1)] * len(real_stills)
    assert all(record["has_feature"].tolist() == [True, True, False] for record in records_of(prepared).values())


def test_fingerprints_name_what_features_depend_on(encoders):
    found = encoders.fingerprints(CONFIG)
    other = random_encoders(dataclasses.replace(CONFIG, seed=1)).fingerprints(CONFIG)
    more_faces = dataclasses.replace(CONFIG, clip=dataclasses.replace(CONFIG.clip, max_faces=6))
    assert all(found[name] != other[name] for name in ("mae", "videomae", "hubert"))
    assert {name for name, text in encoders.fingerprints(more_faces).items() if text != found[name]} == {"mae"}


def test_the_command(dataset, tmp_path, capsys):
    """A folder of videos, and a list of them that names one too many; then the two are compared."""
    names = [spec.name for spec in dataset.clips[:3]]
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in names:
        shutil.copy(dataset.root / f"video/{name}.mp4", videos)
    small = [f"--config.{group}.{name}={value}" for group in ("mae", "videomae") for name, value in SMALL.items()]
    common = ["extract", "--config=tiny", *small, "--config.projectors.feature_size=48", "clips", "--random-encoders"]
    common += ["--config.clip.max_faces=3", f"--videos={videos}", "--workers=1"]
    assert main([*common, f"--out={tmp_path}/a"]) == 0
    rows = "".join(f"{name},happy\n" for name in (*names, "missing"))
    (tmp_path / "list.csv").write_text(f"name,emotion\n{rows}")
    assert main([*common, f"--out={tmp_path}/b", f"--list=train={tmp_path}/list.csv"]) == 1
    output = capsys.readouterr().out
    assert "no face in 0 of 3 clips, no sound in 0, no subtitle in 3; see" in output and "1 clips put aside" in output
    assert main(["compare", f"{tmp_path}/a/clips/frame/1.0.0", f"{tmp_path}/b/clips/frame/1.0.0"]) == 0
    assert "The sets are the same." in capsys.readouterr().out
    features = Records(f"{tmp_path}/a/clips/frame/1.0.0", "clips")[0]["features"]
    assert features.shape == (3, 48) and np.isfinite(features).all() and features.any(axis=1).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--videos=x"], "no such file or folder: weights/vit-mae-large"),
        (["--random-encoders", "--mae=x", "--videos=x"], "--random-encoders: goes in place of --mae, --videomae"),
        (["--random-encoders"], "clips: give one or more --list SPLIT=FILE, or a folder of --videos"),
        (["--random-encoders", "--subtitles-from=air"], "--subtitles-from: no source 'air'; choose among file, track"),
        (
            ["--random-encoders", "--subtitle-language=en"],
            "--subtitle-language: goes with --subtitles-from file or track",
        ),
        (["--random-encoders", "--subtitles-from=speech"], "--recogniser: goes with --subtitles-from speech"),
        (["--mae=nowhere", "--videos=x"], "nowhere"),
        (["--eva-vit=x", "--videos=x"], "--eva-vit: the encoder's file goes with --image image_tokens, and only there"),
        (["--mae=x", "--image=image_tokens", "--videos=x"], "no such file or folder: x"),
        (["--check", "a", "b"], "extract --check is a verb of its own: emollama compare A B"),
        (
            ["--random-encoders", "--config.projectors.feature_size=30", "--videos=."],
            "config.mae: hidden_size=30 must be a multiple of num_heads=4, where its features are as wide",
        ),
    ],
)
def test_arguments_refused(arguments, said, capsys):
    assert main(["extract", "--config=tiny", "clips", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_recipes_are_compared_by_their_encoders():
    assert Recipe(labels=MERR, encoders={"mae": "a"}) != Recipe(labels=MERR, encoders={"mae": "b"})
