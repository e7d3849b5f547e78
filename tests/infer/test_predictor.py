"""What is said about a clip is what a clip of training would be asked for, and does not depend on its neighbours."""

import copy
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.config import GenerateConfig
from emollama_jax.data.datasets import open_datasets
from emollama_jax.data.modalities import ALL
from emollama_jax.data.pipeline import make_sample_transform
from emollama_jax.data.recipe import Recipe
from emollama_jax.data.records import Records
from emollama_jax.errors import UserError
from emollama_jax.infer.answer import ClipError, Query
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.infer.predictor import Predictor, task_questions
from emollama_jax.infer.slots import GenerationRequest, SlotBatcher
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.models.projectors import PROJECTORS
from emollama_jax.sharding import init_sharded
from emollama_jax.text.labels import MER2023, MERR
from emollama_jax.text.prompts import QUESTION_SETS, Turn
from emollama_jax.weights.engine import first_device
from tests.data.prepared import SIZE, TOKENIZER, random_record, tiny_config, write_data

CLIPS = 6


def records_of(kind: str) -> list[dict]:
    """Clips whose parts all differ from one another."""
    rng, recipe = (
        np.random.default_rng(5),
        Recipe(labels=MERR, image_storage=kind, size=SIZE, image_tokens_shape=(17, 48)),
    )
    made = []
    for number in range(CLIPS):
        has = np.array([True, number != 1, number != 2])
        record = random_record(number, rng, recipe, has_feature=has, subtitle="" if number == 3 else f"word {number}")
        record["features"] = np.where(has[:, None], rng.normal(size=(3, 1024)), 0).astype(np.float32)
        if kind == "image_tokens":
            record["image_tokens"] = rng.normal(size=(17, 48)).astype(np.float16)
        made.append(record)
    made[4]["emotion"] = -1
    return made


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    kinds = ("image_tokens", "frame")
    return {
        kind: write_data(folder / kind, {"test": CLIPS}, image_storage=kind, records=records_of(kind)) for kind in kinds
    }


@pytest.fixture(scope="module")
def config():
    config = tiny_config({}, labels=MER2023)
    return dataclasses.replace(config, generate=GenerateConfig(max_new_tokens=6))


@pytest.fixture(scope="module")
def model(config):
    """Adapters and projectors that say something: with new ones, clips hardly differ."""
    parts = (config.llama, config.lora, config.projectors, config.eva_vit)
    model = init_sharded(lambda: EmotionLlama.init(*parts, rngs=nnx.Rngs(3)), first_device(), ())
    for name in PROJECTORS:
        kernel = getattr(model.projectors, name).kernel
        kernel[...] = 3 * kernel[...]
    return model


@pytest.fixture(scope="module")
def records(paths):
    return Records(paths["image_tokens"], "test")


@pytest.fixture(scope="module")
def clips(records):
    return clips_of(records)


def clips_of(records, count=CLIPS):
    return [ClipInput.of_record(records[i]) for i in range(count)]


@pytest.mark.smoke
def test_prompts_are_those_of_training(paths, config, model, records, clips):
    """Token by token up to the answer, for every task and clip."""
    for task in ("emotion", "reason", "reason_v2"):
        asked = dataclasses.replace(config.prompt, tasks=(task,), questions=("Why?",), labels=MERR)
        of_task = dataclasses.replace(config, prompt=asked)
        predictor = Predictor(model, TOKENIZER, of_task)
        (dataset,) = open_datasets([f"{paths['image_tokens']}:test"], of_task, "data")
        for number, clip in enumerate(clips):
            element = make_sample_transform(of_task, TOKENIZER).random_map(dataset[number], np.random.default_rng(0))
            prompt = predictor.prompt(clip, [Turn(*task_questions(asked, task))])
            length = int((~element["is_answer"]).sum())
            np.testing.assert_array_equal(prompt.tokens, element["tokens"][:length])
            np.testing.assert_array_equal(prompt.soft, element["soft"][:length])
            np.testing.assert_array_equal(clip.features, element["features"][0])
            np.testing.assert_array_equal(clip.image_tokens, element["image_tokens"][0])


def test_labels_are_scored_where_they_are_asked_for(model, config, clips, monkeypatch):
    predictor = Predictor(model, TOKENIZER, config)
    why = ("[reason] Why?",)
    first, second, third = predictor.answer([Query(clips[0]), Query(clips[1], why), Query(clips[2], why, label=True)])
    assert tuple(sorted(first.probabilities)) == tuple(sorted(MER2023)) and first.answers == ()
    assert first.label == first.answer == max(first.probabilities, key=first.probabilities.get)
    assert sum(first.probabilities.values()) == pytest.approx(1)
    assert (second.label, second.probabilities) == (None, {}) and second.answers == (second.answer,)
    assert third.label in MER2023 and third.answer == third.answers[0] != third.label
    scored = predictor.labels(clips[:1], predictor.soft_tokens(clips[:1])).probabilities[0]
    assert first.probabilities == pytest.approx(dict(zip(MER2023, scored, strict=True)), abs=1e-5)
    monkeypatch.setattr(Predictor, "labels", None)
    assert predictor.answer([Query(clips[1], why)])[0].answer == second.answer


def test_a_clip_without_an_answer_leaves_the_others_theirs(model, config, clips):
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=200))
    long = dataclasses.replace(clips[1], subtitle="so " * 200)
    good, bad, last = Predictor(model, TOKENIZER, short).answer([Query(clip) for clip in (clips[0], long, clips[2])])
    assert isinstance(bad, ClipError) and (bad.stage, bad.name) == ("prompt", "clip 1")
    assert (good.name, last.name) == ("clip 0", "clip 2")
    frames = EmotionLlama(model.llama, model.projectors)  # without EVA-ViT
    framed = ClipInput("framed", "", clips[0].features, clips[0].has_feature, frame=np.zeros((SIZE, SIZE, 3), np.uint8))
    (bad,) = Predictor(frames, TOKENIZER, config).answer([Query(framed)])
    assert isinstance(bad, ClipError) and "inputs='frames'" in str(bad)


def test_a_clip_alone_is_the_clip_among_others(model, config, clips):
    predictor, some = Predictor(model, TOKENIZER, config), clips[1:4]
    soft = predictor.soft_tokens(some)
    together = predictor.labels(some, soft).log_likelihoods
    asked = [("[reason] Why?",), ("What?", "And why?"), ("What do you see and hear in this clip of a person?",)]
    answers = predictor.answers(some, soft, asked)
    assert [len(of_clip) for of_clip in answers] == [1, 2, 1]
    alone, soft = some[1:2], predictor.soft_tokens(some[1:2])
    np.testing.assert_allclose(predictor.labels(alone, soft).log_likelihoods[0], together[1], atol=1e-4)
    assert predictor.answers(alone, soft, asked[1:2]) == answers[1:2]


def test_later_questions_see_the_answers_before(model, config, clips):
    predictor = Predictor(model, TOKENIZER, config)
    soft = predictor.soft_tokens(clips[:1])
    ((first, second),) = predictor.answers(clips[:1], soft, [("[reason] Why?", "Are you sure?")])
    turns = [Turn("[reason] Why?", first), Turn("Are you sure?")]
    request = GenerationRequest(predictor.prompt(clips[0], turns), config.generate, soft=soft[0])
    (expected,) = SlotBatcher(model.llama, [TOKENIZER.eos_id]).run([request])
    assert second == TOKENIZER.decode(expected.tokens).strip()
    assert first != second


def test_an_answer_ends_at_every_end_that_the_files_name(model, config, clips):
    """Not only at EOS: chat models end a turn with another token."""
    soft = Predictor(model, TOKENIZER, config).soft_tokens(clips[:1])
    prompt = Predictor(model, TOKENIZER, config).prompt(clips[0], [Turn("Why?")])
    (whole,) = SlotBatcher(model.llama, []).run([GenerationRequest(prompt, config.generate, soft=soft[0])])
    tokenizer = copy.copy(TOKENIZER)
    tokenizer.end_ids = (TOKENIZER.eos_id, whole.tokens[2])
    ((answer,),) = Predictor(model, tokenizer, config).answers(clips[:1], soft, [("Why?",)])
    shorter = whole.tokens[: whole.tokens.index(whole.tokens[2])]
    assert answer == TOKENIZER.decode(shorter).strip() != TOKENIZER.decode(whole.tokens).strip()


def test_what_is_drawn_depends_on_the_seed_and_the_clip(model, config, clips):
    def drawn(seed: int, order: list[int]) -> dict[int, str]:
        sampled = dataclasses.replace(config, seed=seed, generate=GenerateConfig(max_new_tokens=6, temperature=1.5))
        predictor, some = Predictor(model, TOKENIZER, sampled), [clips[i] for i in order]
        answers = predictor.answers(some, predictor.soft_tokens(some), [("Why?",)] * len(some))
        return dict(zip(order, (answer for (answer,) in answers), strict=True))

    assert drawn(1, [0, 1]) == dict(sorted(drawn(1, [1, 0]).items()))
    assert drawn(1, [0, 1]) != drawn(2, [0, 1])


@pytest.mark.parametrize("kind", ["image_tokens", "frame"])
def test_a_modality_that_is_left_out_makes_no_difference(model, config, paths, kind):
    """Whatever is changed in it; what is left matters."""
    clips = clips_of(Records(paths[kind], "test"), 2)
    changes = {
        "A": {"features": np.stack([np.vstack([c.features[:2], c.features[2:] + 1]) for c in clips])},
        "V": {"features": np.stack([np.vstack([c.features[:2] + 1, c.features[2:]]) for c in clips])},
        "T": {"subtitle": ["other words", "said here"]},
    }
    image = "frame" if kind == "frame" else "image_tokens"
    changes["V"][image] = [np.flip(getattr(clip, image), axis=0).copy() + 1 for clip in clips]

    def scores(modalities: str, changed: str = "") -> np.ndarray:
        fields = changes.get(changed, {})
        some = [dataclasses.replace(clip, **{k: v[i] for k, v in fields.items()}) for i, clip in enumerate(clips)]
        predictor = Predictor(model, TOKENIZER, config, modalities=modalities)
        return predictor.labels(some, predictor.soft_tokens(some)).log_likelihoods

    for left in ("A", "V", "T", "AV"):
        expected = scores(left)
        for changed in ALL:
            difference = np.abs(scores(left, changed) - expected).max(axis=(1, 2))
            assert (difference > 1e-4).all() if changed in left else (difference == 0).all(), (left, changed)


def test_what_is_left_out_is_as_a_clip_without_it(model, config, clips):
    for missing, tokens in (("zeros", 8), ("omit", 5)):
        settings = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, missing=missing))
        bare = ClipInput(
            "bare", "", np.zeros((3, 1024), np.float32), np.zeros(3, bool), image_tokens=np.zeros((17, 48))
        )
        bare = dataclasses.replace(bare, subtitle=clips[0].subtitle)
        left, whole = Predictor(model, TOKENIZER, settings, modalities="T"), Predictor(model, TOKENIZER, settings)
        np.testing.assert_array_equal(left.soft_tokens(clips[:1]), whole.soft_tokens([bare]))
        prompt = left.prompt(clips[0], [Turn("Why?")])
        np.testing.assert_array_equal(prompt.tokens, whole.prompt(bare, [Turn("Why?")]).tokens)
        assert (prompt.soft >= 0).sum() == tokens
        bias = model.projectors.hubert_proj.bias[...]
        np.testing.assert_allclose(left.soft_tokens(clips[:1])[0, 6], bias, rtol=1e-6)


def test_frames_go_through_the_encoder(model, config, paths):
    clips = clips_of(Records(paths["frame"], "test"), 3)
    soft = Predictor(model, TOKENIZER, config).soft_tokens(clips)
    tokens = model.eva_vit.encode(jnp.stack([clip.frame for clip in clips]))
    expected = model.projectors(tokens, jnp.stack([clip.features for clip in clips]))
    np.testing.assert_allclose(soft, expected, atol=1e-5)


def test_questions_of_tasks(config):
    assert task_questions(config.prompt) == (
        "[emotion] Please determine which emotion label in the video represents: "
        "happy, sad, neutral, angry, worried, surprise.",
    )
    assert task_questions(config.prompt, "reason_v2") == (f"[reason_v2] {QUESTION_SETS['released'][0]}",)
    assert task_questions(config.prompt, "reason", ("One?", "Two?")) == ("One?", "Two?")


@pytest.mark.parametrize("modalities", ["", "AX", "AVA", "av"])
def test_modalities_that_are_none(model, config, modalities):
    with pytest.raises(UserError, match=r"give any of A \(audio\), V \(video\) and T \(text\)"):
        Predictor(model, TOKENIZER, config, modalities=modalities)


def test_a_prompt_that_no_row_of_training_holds_is_refused(model, config, clips):
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=90))
    with pytest.raises(UserError, match="clip clip 0: its prompt has [0-9]+ tokens, a row 90; shorten the subtitle"):
        Predictor(model, TOKENIZER, short).check(dataclasses.replace(clips[0], subtitle="so " * 200))
