"""The stream of batches: every clip, once, the same whatever reads it."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest

from emollama_jax.config import EvaVitConfig
from emollama_jax.data.batch import batch_spec
from emollama_jax.data.batch_shards import process_shard
from emollama_jax.data.datasets import (
    find_clip_name,
    open_datasets,
)
from emollama_jax.data.modalities import PARTS
from emollama_jax.data.pipeline import eval_dataset, onto_devices, train_dataset
from emollama_jax.data.recipe import Recipe
from emollama_jax.data.records import Records
from emollama_jax.errors import UserError
from emollama_jax.models.emotion_llama import num_image_tokens
from emollama_jax.sharding import make_mesh
from emollama_jax.text.labels import MERR
from emollama_jax.text.prompts import (
    QUESTION_SETS,
    Turn,
    emotion_question,
    encode_turns,
    request,
    training_answer,
)
from tests.data.batches import TRAIN, VAL, assert_same, batches, clips_of, config_of, samples_of
from tests.data.prepared import SIZE, TOKENIZER, random_record, write_data

# -- every clip, once


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_clip_comes_once_an_epoch(folder, processes):
    config = config_of(folder)
    dataset = lambda i, epochs: train_dataset(config, TOKENIZER, shard_index=i, num_shards=processes, epochs=epochs)
    by_process = [batches(dataset(i, 1)) for i in range(processes)]
    assert sorted(clip for found in by_process for clip in clips_of(found)) == list(range(TRAIN))
    assert all(batch.tokens.shape == (4 // processes, 256) for found in by_process for batch in found)
    assert max(np.sum(batch.clip_mask, 1).max() for found in by_process for batch in found) > 1


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_has_every_clip_once_in_order(folder, processes):
    config = config_of(folder)
    by_process = [
        batches(eval_dataset(config, TOKENIZER, shard_index=i, num_shards=processes)) for i in range(processes)
    ]
    assert {len(found) for found in by_process} == {3}  # 10 clips in batches of 4 rows
    columns = [np.concatenate([batch.clip[:, 0] for batch in found]) for found in by_process]
    in_order = np.stack(columns, axis=1).ravel().tolist()
    assert in_order == [*range(VAL), -1, -1]
    padding = [batch for batch in by_process[-1] if (batch.clip < 0).any()][-1]
    empty = padding.clip[:, 0] < 0
    for array in (padding.segment_ids, padding.loss_weights, padding.clip_mask):
        assert not array[empty].any()


def test_shuffled_anew_in_every_epoch_and_with_every_seed(folder):
    config = config_of(folder)
    orders = [clips_of(batches(train_dataset(config, TOKENIZER, epochs=2)))]
    other = dataclasses.replace(config, seed=7)
    orders.append(clips_of(batches(train_dataset(other, TOKENIZER, epochs=2))))
    assert all(Counter(order) == Counter({clip: 2 for clip in range(TRAIN)}) for order in orders)
    assert orders[0] != orders[1]
    assert orders[0][:TRAIN] != orders[0][TRAIN:]
    assert clips_of(batches(train_dataset(config, TOKENIZER, epochs=2))) == orders[0]


@pytest.mark.slow
def test_workers_change_nothing(folder):
    found = [batches(train_dataset(config_of(folder, workers=n), TOKENIZER, epochs=1)) for n in (0, 1, 3)]
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_processes_share_one_stream(folder):
    """What a clip is asked does not depend on the process that reads it."""
    config = config_of(folder)
    whole = [s for batch in batches(train_dataset(config, TOKENIZER, epochs=1)) for s in samples_of(batch).values()]
    shared = [
        sample
        for i in range(4)
        for batch in batches(train_dataset(config, TOKENIZER, shard_index=i, num_shards=4, epochs=1))
        for sample in samples_of(batch).values()
    ]
    assert sorted(whole) == sorted(shared)


# -- what is in a batch


def possible_samples(record, config):
    """All samples that a record may become."""
    answers = {
        "emotion": MERR[record["emotion"]],
        "reason": record["caption_coarse"],
        "reason_v2": record["caption_fine"],
    }
    for task, answer in answers.items():
        pool = QUESTION_SETS["released"] if task != "emotion" else (emotion_question(MERR),)
        for question in pool:
            turn = Turn(request(task, question), training_answer(answer, config.prompt))
            yield encode_turns(
                TOKENIZER,
                [turn],
                config.prompt,
                subtitle=record["subtitle"],
                has_feature=record["has_feature"].tolist(),
                image_tokens=num_image_tokens(config.eva_vit, config.projectors),
            )


@pytest.mark.smoke
@pytest.mark.parametrize("missing", ["zeros", "omit"])
def test_a_packed_batch_gives_back_its_samples(folder, missing):
    config = config_of(folder)
    config = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, missing=missing))
    records, seen = Records(folder, "train"), 0
    for batch in batches(train_dataset(config, TOKENIZER, epochs=1)):
        for (row, k), (clip, *columns) in samples_of(batch).items():
            record, seen = records[clip], seen + 1
            choices = [
                [s.tokens.tolist(), s.soft.tolist(), s.is_answer.tolist()] for s in possible_samples(record, config)
            ]
            assert columns in choices
            assert (batch.features[row, k] == record["features"]).all()
            assert (batch.frames[row, k] == clip % 251).all()
        empty = ~batch.clip_mask
        assert not batch.features[empty].any() and not batch.frames[empty].any()
        assert (batch.soft_index[batch.segment_ids == 0] == -1).all()
    assert seen == TRAIN


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize("images", ["frames", "image_tokens"])
def test_batches_are_of_their_spec(folder, tokens_folder, images, kind):
    config = config_of(folder if images == "frames" else tokens_folder)
    if kind == "eval":
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, clips_per_row=1))
    batch = next(iter((train_dataset if kind == "train" else eval_dataset)(config, TOKENIZER)))
    spec = batch_spec(config, images=images)
    assert jax.tree.structure(batch) == jax.tree.structure(spec)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(batch)] == [(x.shape, x.dtype) for x in jax.tree.leaves(spec)]
    assert batch_spec(config, images=images, rows=7, sequence_length=5).tokens.shape == (7, 5)


def test_stored_image_tokens(tokens_folder):
    config = config_of(tokens_folder)
    batch = next(iter(train_dataset(config, TOKENIZER)))
    assert batch.frames is None and batch.image_tokens.dtype == np.float16
    for row, k in np.argwhere(batch.clip_mask):
        assert (batch.image_tokens[row, k] == batch.clip[row, k]).all()


@pytest.mark.parametrize("images", ["frames", "image_tokens"])
def test_modality_dropout_shows_clips_as_evaluation_does(folder, tokens_folder, images):
    """A training clip without modalities has the tokens and arrays that prediction makes of it without them."""
    path = folder if images == "frames" else tokens_folder
    config = config_of(path, modality_dropout=0.6)
    records, seen = Records(path, "train"), Counter()
    found = batches(train_dataset(config, TOKENIZER, epochs=6))
    assert jax.tree.structure(found[0]) == jax.tree.structure(batch_spec(config, images=images))
    for batch in found:
        samples = samples_of(batch)
        for (row, k), (number, tokens, *_) in samples.items():
            record, features = records[number], batch.features[row, k]
            text = TOKENIZER.decode(tokens)
            has_text = not record["subtitle"].strip() or f"The person in video says: {record['subtitle']}" in text
            has_audio, has_video = not number or features[2].any(), bool(batch.has_image[row, k])
            assert (features[:2] == (number if has_video else 0)).all() and (features[2] == number * has_audio).all()
            if number and record["subtitle"].strip():  # of others it does not show
                seen["A" * bool(has_audio) + "V" * has_video + "T" * has_text] += 1
    assert set(seen) == {"A", "V", "T", "AV", "AT", "VT", "AVT"}
    assert seen["AVT"] / seen.total() == pytest.approx(0.4, abs=0.1)
    assert max(seen[part] for part in PARTS) / seen.total() < 0.2
    assert next(iter(eval_dataset(config, TOKENIZER))).has_image is None


def test_views_are_drawn_by_their_weights_and_the_same_again(folder):
    config = config_of(folder, modality_dropout=1.0, dropout_view_weights=(3.0, 1.0, 0.0, 0.0, 0.0, 0.0))

    def draw(seed):
        found = batches(train_dataset(dataclasses.replace(config, seed=seed), TOKENIZER, epochs=6))
        return [
            (int(batch.clip[at]), bool(batch.has_image[at]))
            for batch in found
            for at in map(tuple, np.argwhere(batch.clip_mask))
        ]

    drawn = draw(3)
    assert draw(3) == drawn != draw(4)
    assert np.mean([has_video for _, has_video in drawn]) == pytest.approx(0.25, abs=0.08)  # audio three times as often
    assert len({has_video for clip, has_video in drawn if clip == 1}) == 2  # anew in each epoch


def test_tasks_and_data_sets_are_mixed_by_weight(folder, tmp_path):
    other = write_data(tmp_path / "other", {"train": 20}, seed=5)
    config = config_of(folder, train=(f"{folder}:train", f"{other}:train"), weights=(1.0, 3.0))
    prompt = dataclasses.replace(config.prompt, task_weights=(6.0, 1.0, 1.0))
    config = dataclasses.replace(config, prompt=prompt)
    datasets = open_datasets(config.data.train, config, "data.train")
    assert [dataset.first for dataset in datasets] == [0, TRAIN]
    assert (find_clip_name(datasets, TRAIN - 1), find_clip_name(datasets, TRAIN + 3)) == (f"clip {TRAIN - 1}", "clip 3")
    iterator, clips, answers = iter(train_dataset(config, TOKENIZER)), [], []
    while len(clips) < 600:
        batch = next(iterator)
        clips += clips_of([batch])
        answers += [int(np.sum(is_answer)) for _, _, _, is_answer in samples_of(batch).values()]
    assert np.mean(np.array(clips) >= TRAIN) == pytest.approx(0.75, abs=0.02)
    labels = {len(TOKENIZER.encode(label)) + 1 for label in MERR}
    assert np.mean([answer <= max(labels) for answer in answers]) == pytest.approx(0.75, abs=0.08)


def test_a_record_is_only_asked_what_it_answers(tmp_path):
    rng, recipe = np.random.default_rng(0), Recipe(labels=MERR, size=SIZE)
    blank = {"caption_coarse": "", "caption_fine": "", "emotion": -1}
    records = [
        random_record(0, rng, recipe, **blank | {"emotion": 3}),
        random_record(1, rng, recipe, **blank),  # nothing
        random_record(2, rng, recipe, **blank | {"caption_fine": "she smiles"}),
        random_record(3, rng, recipe, **blank | {"emotion": 8}),  # doubt: not among the labels asked for
    ]
    path = write_data(tmp_path / "few", {"train": 4}, records=records)
    config = config_of(path, eval=(f"{path}:train",))
    config = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, labels=MERR[:8]))
    found = batches(train_dataset(config, TOKENIZER, epochs=3))
    assert Counter(clips_of(found)) == {0: 3, 2: 3}
    found = batches(eval_dataset(config, TOKENIZER))
    assert clips_of(found) == [0, 1, 2, 3]
    assert [bool(mask.any()) for batch in found for mask in batch.loss_weights > 0] == [True, False, True, False]


def test_long_samples_are_truncated_in_their_answer(folder):
    config = config_of(folder, sequence_length=80, clips_per_row=1)
    config = dataclasses.replace(
        config, prompt=dataclasses.replace(config.prompt, tasks=("reason_v2",), questions=("Why?",))
    )
    records, truncated = Records(folder, "train"), 0
    for batch in batches(train_dataset(config, TOKENIZER, epochs=1)):
        for clip, tokens, _, is_answer in samples_of(batch).values():
            record = records[clip]
            whole = encode_turns(
                TOKENIZER,
                [Turn("[reason_v2] Why?", training_answer(record["caption_fine"], config.prompt))],
                subtitle=record["subtitle"],
                image_tokens=4,
            )
            assert tokens == whole.tokens[:80].tolist()
            assert np.sum(~np.array(is_answer)) == np.sum(~whole.is_answer)
            truncated += len(whole.tokens) > 80
    assert 0 < truncated < TRAIN
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=40))
    with pytest.raises(UserError, match="its prompt alone has .* tokens, a row has 40; raise data.sequence_length"):
        batches(train_dataset(config, TOKENIZER, epochs=1))


def test_rows_are_well_filled(tmp_path):
    """At full size, on answers about as long as MERR's fine captions: what is left over is less than a clip's length,
    so that the fill follows from the lengths; these fit well."""
    rng = np.random.default_rng(0)
    shape = (1025, 4)  # as many tokens as at full size, and narrow
    recipe = Recipe(labels=MERR, image_storage="image_tokens", size=SIZE, image_tokens_shape=shape)
    each = len(TOKENIZER.encode("she she she")) / 3
    text = lambda tokens: " ".join(["she"] * int(rng.gamma(8, tokens / 8 / each)))
    records = [random_record(i, rng, recipe, caption_fine=text(200), subtitle=text(12)) for i in range(600)]
    path = write_data(
        tmp_path / "merr", {"train": 600}, image="image_tokens", records=records, image_tokens_shape=shape
    )
    config = config_of(path, sequence_length=2048, clips_per_row=6, packing_rows=32)
    prompt = dataclasses.replace(config.prompt, tasks=("reason_v2",), questions=("Why?",))
    found = batches(
        train_dataset(
            dataclasses.replace(config, eva_vit=EvaVitConfig(hidden_size=4, num_heads=1), prompt=prompt),
            TOKENIZER,
            epochs=2,
        )
    )
    rows = np.concatenate([batch.segment_ids > 0 for batch in found])
    rows = rows[rows.any(1)]
    clips = len(clips_of(found))
    print(f"{clips} clips of {rows.sum() / clips:.0f} tokens in {len(rows)} rows of 2048: {rows.mean():.1%} filled")
    assert clips == 1200
    assert rows[:-32].mean() >= 0.95  # the last rows have nothing more to take


@pytest.mark.parametrize(
    ("name", "value"), [("sequence_length", 200), ("clips_per_row", 3), ("batch_rows", 2), ("packing_rows", 3)]
)
def test_every_field_of_packing_has_an_effect(folder, name, value):
    def first(**data):
        batch = next(iter(train_dataset(config_of(folder, **data), TOKENIZER)))
        return [(x.shape, x.tobytes()) for x in jax.tree.leaves(batch)]

    assert first(**{name: value}) != first()


def test_mixtures_count_clips_with_answers(folder, tmp_path):
    """A data set of which few clips answer what is asked still has its share; without end, or all of it once."""
    rng, recipe = np.random.default_rng(0), Recipe(labels=MERR, size=SIZE)
    records = [random_record(i, rng, recipe, **({} if i < 3 else {"caption_fine": "..."})) for i in range(20)]
    few = write_data(tmp_path / "few", {"train": 20}, records=records)
    config = config_of(folder, train=(f"{folder}:train", f"{few}:train"), weights=(1.0, 1.0))
    config = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, tasks=("reason_v2",)))
    iterator, clips = iter(train_dataset(config, TOKENIZER)), []
    while len(clips) < 300:
        clips += clips_of([next(iterator)])
    assert np.mean(np.array(clips) >= TRAIN) == pytest.approx(0.5, abs=0.03)
    assert sorted(clips_of(batches(train_dataset(config, TOKENIZER, epochs=2)))) == sorted([*range(TRAIN + 3)] * 2)


# -- on devices


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 4, 2), (4, 1, 2)], ids=str)
def test_onto_devices(folder, sizes):
    config = config_of(folder)
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)), jax.devices()[: int(np.prod(sizes))])
    assert process_shard(config, mesh) == (0, 1)
    placed = list(iter(onto_devices(train_dataset(config, TOKENIZER, epochs=1), config, mesh)))
    assert_same(
        [jax.tree.map(np.asarray, batch) for batch in placed], batches(train_dataset(config, TOKENIZER, epochs=1))
    )
    shards = placed[0].frames.sharding.shard_shape(placed[0].frames.shape)
    assert shards[0] == 4 // (sizes[0] * sizes[1])
