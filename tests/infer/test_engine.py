"""`Engine`: a clip's answer is the same however the clip is given, in any company, and in pieces or whole."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import emollama_jax
from emollama_jax import Engine, cli
from emollama_jax.config import GenerateConfig, load_config
from emollama_jax.data.records import encode_frame
from emollama_jax.errors import UserError
from emollama_jax.infer.answer import ClipAnswer, ClipError, Query
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.infer.loading import StartError
from emollama_jax.synthetic.dataset import make_dataset
from emollama_jax.text.prompts import Turn
from tests.train.runs import LLAMA

WHY, SURE = "[reason] Why?", "Are you sure?"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    pytest.importorskip("av")
    made = make_dataset(tmp_path_factory.mktemp("videos"), clips={"train": 2}, workers=1)
    return [made.video(spec) for spec in made.clips]


@pytest.fixture(scope="module")
def config():
    config = load_config("tiny")
    small = {name: dataclasses.replace(getattr(config, name), num_layers=1) for name in ("mae", "videomae", "hubert")}
    return dataclasses.replace(
        config,
        **small,
        eva_vit=dataclasses.replace(config.eva_vit, num_layers=1),
        projectors=dataclasses.replace(config.projectors, feature_size=32),
        clip=dataclasses.replace(config.clip, max_faces=1),
        data=dataclasses.replace(config.data, sequence_length=256),
        generate=GenerateConfig(max_new_tokens=20),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    assert cli.main(["convert", str(LLAMA), str(folder), "--dtype", "float32"]) == 0
    return folder


@pytest.fixture(scope="module")
def engine(config, base):
    return Engine.load(config=config, base=base, random_encoders=True)


@pytest.fixture(scope="module")
def record(config):
    rng, size = np.random.default_rng(0), config.eva_vit.image_size
    features = rng.normal(size=(3, 32)).astype(np.float32)
    frame = rng.integers(256, size=(size, size, 3)).astype(np.uint8)
    record = {"name": "a record", "subtitle": "Oh no.", "features": features, "has_feature": np.ones(3, bool)}
    return record | {"frame": encode_frame(frame)}


def timeless(result: ClipAnswer) -> ClipAnswer:
    return dataclasses.replace(result, timings_s={})


def test_a_path_and_its_bytes_are_one_clip(engine, videos):
    by_path, by_bytes = engine.label(videos[0]), engine.label(videos[0].read_bytes())
    assert by_path.name == videos[0].name
    assert timeless(by_bytes) == dataclasses.replace(timeless(by_path), name="clip")
    assert by_path.fingerprint.startswith("sha256:") and by_path.clip_info["frame"] == 0
    assert by_path.label == next(iter(by_path.probabilities)) and sum(by_path.probabilities.values()) == pytest.approx(
        1
    )
    assert set(by_path.timings_s) == {"decode", "face", "sound", "encode", "label"}
    told = engine.label(videos[0], subtitle="I am so sorry.")
    assert told.subtitle == "I am so sorry." and told.probabilities != by_path.probabilities


def test_a_record_and_its_arrays_are_one_clip(engine, record):
    clip = ClipInput.of_record(record)
    assert timeless(engine.label(record)) == timeless(engine.label(clip))
    assert engine.label(clip).subtitle == "Oh no." and engine.label(clip, subtitle="Yes!").subtitle == "Yes!"


def test_a_conversation_goes_on_from_its_history(engine, record):
    whole = engine.ask(record, WHY, SURE)
    assert whole.answers == (engine.ask(record, WHY).answer, whole.answer)
    assert (whole.label, whole.probabilities) == (None, {})
    later = engine.ask(record, SURE, history=[Turn(WHY, whole.answers[0])])
    assert later.answer == whole.answer != engine.ask(record, SURE).answer
    with pytest.raises(ValueError, match="no question"):
        engine.ask(record)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_pieces_of_a_stream_are_the_answer(config, base, record, temperature):
    generate = GenerateConfig(max_new_tokens=40, temperature=temperature)
    engine = Engine.load(config=dataclasses.replace(config, generate=generate), base=base, inputs="image_tokens")
    clip = ClipInput.of_record(record)
    clip = dataclasses.replace(clip, frame=None, image_tokens=np.zeros((17, 48), np.float16))
    pieces = list(engine.stream(clip, WHY))
    assert "".join(pieces) == engine.ask(clip, WHY).answer and len(pieces) > 1
    history = [Turn(WHY, "Because.")]
    assert "".join(engine.stream(clip, SURE, history=history)) == engine.ask(clip, SURE, history=history).answer


def test_many_in_any_order_are_each_alone(engine, videos, record, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    queries = [
        Query(videos[0]),
        Query(broken),
        Query(record, (WHY,)),
        Query(videos[1].read_bytes(), (WHY, SURE), label=True, name="two"),
        Query(videos[1], (WHY,)),
        Query(ClipInput.of_record(record)),
        Query(record, subtitle="so " * 200),
    ]
    alone = [next(engine.answer([query])) for query in queries]
    assert [one.stage for one in alone if isinstance(one, ClipError)] == ["read", "prompt"]
    for order in ([0, 1, 2, 3, 4, 5, 6], [4, 6, 2, 5, 1, 3, 0]):
        for index, together in zip(order, engine.answer((queries[i] for i in order), batch_size=4), strict=True):
            expected = alone[index]
            assert type(together) is type(expected) and together.name == expected.name
            if isinstance(together, ClipAnswer):
                assert together.answers == expected.answers and together.label == expected.label
                assert together.probabilities == pytest.approx(expected.probabilities, abs=2e-6)
    assert [one.answers for one in engine.answer([record, videos[0]], (WHY,))] == [
        engine.ask(clip, WHY).answers for clip in (record, videos[0])
    ]


def test_threads_share_the_batch_and_get_their_own_answers(engine, record):
    """Whoever waits decodes for all; a stream that is left frees its slot."""
    questions = [WHY, SURE, "What?", "[reason] Who?", "And now?"]
    expected = [engine.ask(record, question).answer for question in questions]
    left = engine.stream(record, WHY)
    next(left)
    with ThreadPoolExecutor(len(questions)) as pool:
        streams = [pool.submit(lambda q=q: "".join(engine.stream(record, q))) for q in questions]
        asked = [pool.submit(lambda q=q: engine.ask(record, q).answer) for q in questions]
        assert [one.result() for one in asked] == expected == [one.result() for one in streams]
    left.close()
    assert not engine._batcher._batcher.busy and not engine._batcher._events


def test_clips_are_taken_as_they_are_needed(engine, record):
    taken = []
    results = engine.answer((taken.append(i) or record for i in range(100)), batch_size=2)
    next(results)
    assert len(taken) <= 3


def test_settings_are_replaced_and_weights_kept(engine, record):
    labels = ("calm", "tense")
    other = engine.replace(prompt=dataclasses.replace(engine.config.prompt, labels=labels), modalities="T", orders=2)
    found = other.label(record)
    assert set(found.probabilities) == set(labels) and len(found.label_by_order) == 2
    assert engine.label(record).label not in labels
    assert other.identity(requests=[])["modalities"] == "T" and engine.identity()["modalities"] == "AVT"


def test_an_error_names_the_clip_and_the_stage(engine, tmp_path, record):
    pytest.importorskip("av")
    with pytest.raises(ClipError, match="nowhere.mp4") as caught:
        engine.label(tmp_path / "nowhere.mp4")
    assert (caught.value.stage, caught.value.name) == ("read", "nowhere.mp4")
    with pytest.raises(ClipError, match="shorten the subtitle"):
        next(engine.stream(record, WHY, subtitle="so " * 300))


def test_an_engine_for_records_reads_no_videos(config, base, record, videos):
    engine = Engine.load(config=config, base=base, inputs="image_tokens")
    with pytest.raises(UserError, match="inputs='videos'"):
        engine.label(videos[0])
    with pytest.raises(ClipError, match="inputs='frames'"):
        engine.label(record)


def test_what_cannot_be_loaded_is_one_line(config, base, tmp_path):
    for options, kind, message in (
        ({"trained": "nowhere.pth"}, StartError, "nowhere.pth"),
        ({"base": tmp_path}, StartError, str(tmp_path)),
        ({"inputs": "frames"}, StartError, "weights.eva_vit: no such file"),
        ({"inputs": "sounds"}, UserError, "inputs 'sounds': give one of videos, frames, image_tokens"),
        ({"config": None}, UserError, "give its config"),
        ({"modalities": "X"}, UserError, "modalities 'X'"),
    ):
        with pytest.raises(kind, match=message) as caught:
            Engine.load(**{"config": config, "base": base, "inputs": "image_tokens", **options})
        assert "\n" not in str(caught.value)
    assert StartError.exit_code == 3


def test_the_package_shows_its_face():
    assert emollama_jax.Engine is Engine and emollama_jax.load_config is load_config
    with pytest.raises(AttributeError, match="no attribute 'engine_'"):
        _ = emollama_jax.engine_
