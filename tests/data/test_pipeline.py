"""The stream of batches: every clip, once, the same whatever reads it, and from any point on."""

import dataclasses
from collections import Counter
from pathlib import Path

import grain
import jax
import numpy as np
import pytest

from emollama_jax.config import EvaVitConfig
from emollama_jax.data import batch_shards, pipeline
from emollama_jax.data.batch import Batch, batch_spec
from emollama_jax.data.batch_shards import ProcessRows, StreamReader, process_rows, process_shard
from emollama_jax.data.datasets import (
    find_clip_name,
    find_encoders,
    find_frame_rules,
    open_datasets,
)
from emollama_jax.data.modalities import PARTS
from emollama_jax.data.pipeline import eval_dataset, onto_devices, train_batches, train_dataset
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
from tests.data.prepared import SIZE, TOKENIZER, random_record, tiny_config, write_data

TRAIN, VAL = 37, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "frames", {"train": TRAIN, "val": VAL})


@pytest.fixture(scope="module")
def tokens_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "tokens"
    return write_data(out, {"train": TRAIN, "val": VAL}, image="image_tokens", seed=1)


def config_of(folder: Path, **data):
    return tiny_config({"train": (f"{folder}:train",), "eval": (f"{folder}:val",), **data})


def batches(dataset) -> list[Batch]:
    iterator = iter(dataset)
    found = list(iterator)
    iterator.close()
    return found


def clips_of(batches) -> list[int]:
    return [int(clip) for batch in batches for clip in batch.clip[batch.clip_mask]]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def samples_of(batch) -> dict[tuple[int, int], tuple]:
    """(row, clip's place) -> (clip's number, ids, soft tokens, which are answers), taken back out of a packed batch."""
    found = {}
    for row in range(len(batch.tokens)):
        for k in np.flatnonzero(batch.clip_mask[row]):
            here = np.flatnonzero(batch.segment_ids[row] == k + 1)
            soft = batch.soft_index[row, here]
            is_answer = np.concatenate([[False], batch.loss_weights[row, here][:-1] > 0])
            assert not batch.loss_weights[row, here[-1]]
            assert batch.positions[row, here].tolist() == list(range(len(here)))
            found[row, int(k)] = (
                int(batch.clip[row, k]),
                batch.tokens[row, here].tolist(),
                [int(s) - int(k) * 8 if s >= 0 else -1 for s in soft],
                is_answer.tolist(),
            )
    return found


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


# -- from any point on


@pytest.mark.parametrize(
    ("kind", "workers"), [("train", 0), ("eval", 0), pytest.param("train", 2, marks=pytest.mark.slow)]
)
def test_restoring_at_every_state(folder, kind, workers):
    rows = 8 if workers else 4  # fewer batches, and at each of them workers begin anew
    config = config_of(folder, workers=workers, read_ahead=4, batch_rows=rows)
    dataset = train_dataset(config, TOKENIZER, epochs=1) if kind == "train" else eval_dataset(config, TOKENIZER)
    grain.experimental.assert_equal_output_after_checkpoint(dataset.map(vars))


def test_restoring_on_devices(folder):
    """The batches that wait on the devices come again: the state is that of the last one handed out."""
    config, mesh = config_of(folder, prefetch=3), make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    make = lambda: iter(onto_devices(train_dataset(config, TOKENIZER, epochs=1), config, mesh))
    iterator, states, found = make(), [], []
    while True:
        states.append(iterator.get_state())
        batch = next(iterator, None)
        if batch is None:
            break
        found.append(jax.tree.map(np.asarray, batch))
    assert len(found) > 3
    for start in (0, 2, len(found) - 1):
        again = make()
        again.set_state(states[start])
        assert_same([jax.tree.map(np.asarray, batch) for batch in again], found[start:])


def test_the_state_does_not_depend_on_workers(folder):
    """Nor do the batches, so that it is restored with any number of them."""
    alone, helped = (taken(train_dataset(config_of(folder, workers=n), TOKENIZER), 3) for n in (0, 2))
    assert_same(alone[0], helped[0])
    assert alone[1] == helped[1]


def test_the_state_of_workers_in_an_older_run_is_understood(folder):
    """Grain keeps what each of them has read."""
    stream = grain.MapDataset.range(40)
    old = iter(pipeline._read_ahead(stream, config_of(folder, workers=2).data))
    for _ in range(7):
        next(old)
    reader = iter(StreamReader(stream, lambda rest: rest.to_iter_dataset()))
    reader.set_state(old.get_state())
    old.close()
    assert next(reader) == 7 and reader.get_state() == {"next_index": 8}


ROWS_OF_PROCESSES = {
    "one": [((0, 4),)],
    "two": [((0, 2),), ((2, 4),)],
    "four": [((i, i + 1),) for i in range(4)],
    "interleaved": [((0, 1), (2, 3)), ((1, 2), (3, 4))],
}


def taken(dataset, count: int, state=None) -> tuple[list[Batch], dict]:
    """So many batches from a state on, and the state after them."""
    iterator = iter(dataset)
    if state is not None:
        iterator.set_state(state)
    found = [next(iterator) for _ in range(count)], iterator.get_state()
    iterator.close()
    return found


@pytest.mark.parametrize("began", ["one", "two", "four"])
def test_any_number_of_processes_goes_on_with_the_batches_of_a_run(folder, began, monkeypatch):
    config, mesh = config_of(folder), make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])

    def rows_of(layout: str, mine: int, parts: int | None) -> ProcessRows:
        shards = ROWS_OF_PROCESSES[layout]
        monkeypatch.setattr(batch_shards, "_row_ranges", lambda *arguments: (shards, shards[mine]))
        return process_rows(config, mesh, parts)

    def all_rows(layout: str, parts: int | None, state: dict | None) -> tuple[list[Batch], dict]:
        """Three batches of all processes, and their states together."""
        whole, states, order = [], {}, []
        for mine, ranges in enumerate(ROWS_OF_PROCESSES[layout]):
            rows = rows_of(layout, mine, parts)
            assert parts is not None or len(rows.parts) == 1  # as a run begins, nobody reads more than its own
            found, after = taken(train_batches(config, TOKENIZER, rows), 3, state)
            whole.append(found)
            states |= after["parts"]
            order += [row for start, stop in ranges for row in range(start, stop)]
        join = lambda *arrays: np.concatenate(arrays)[np.argsort(order)]
        return [jax.tree.map(join, *batch) for batch in zip(*whole, strict=True)], {"parts": states}

    _, state = all_rows(began, None, None)
    expected, after = all_rows(began, None, state)
    for layout in ROWS_OF_PROCESSES:
        if (began, layout) == ("two", "interleaved"):
            continue  # as many processes with other rows: the same parts, elsewhere in the batch
        parts = len(ROWS_OF_PROCESSES[began])
        found, found_after = all_rows(layout, parts, state)
        assert_same(found, expected)
        assert found_after == after


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


# -- bounded, and refused


def test_reading_ahead_is_bounded(folder, monkeypatch):
    read = []
    original = Records.__getitem__
    monkeypatch.setattr(Records, "__getitem__", lambda self, i: read.append(i) or original(self, i))
    config = config_of(folder, read_ahead=5, packing_rows=4, clips_per_row=2)
    iterator = iter(train_dataset(config, TOKENIZER))
    consumed = sum(len(clips_of([next(iterator)])) for _ in range(5))
    iterator.close()
    most = 5 + 1 + 8 + 4 * 2  # ahead, the one in hand, a thread each, and the rows being filled
    assert consumed <= len(read) <= consumed + most


def test_features_of_different_encoders_are_not_mixed(tmp_path):
    """What is not known of a data set, whose features were files, fits all."""
    encoders = [{"mae": "a", "hubert": "b"}, {"mae": "a"}, {}, {"mae": "a", "hubert": "c"}]
    paths = [f"{write_data(tmp_path / str(i), {'train': 2}, encoders=of)}:train" for i, of in enumerate(encoders)]
    datasets = open_datasets(paths[:3], tiny_config({}), "data.train")
    assert find_encoders(datasets) == {"mae": "a", "hubert": "b"}
    with pytest.raises(UserError, match=r"hubert features of different encoders .* \(b\) and .* \(c\); extract one of"):
        open_datasets(paths, tiny_config({}), "data.train")


def test_what_data_sets_say_of_their_images(tmp_path):
    """By which rules the frames were taken, and which encoder made image tokens of them."""
    recipes = [
        {"frame_rule": "peak", "encoders": {"mae": "m", "eva_vit": "a"}},
        {"frame_rule": "first", "encoders": {"mae": "m"}},
        {"frame_rule": "peak", "encoders": {"mae": "m", "eva_vit": "b"}},
    ]
    paths = [
        f"{write_data(tmp_path / str(i), {'train': 2}, image='image_tokens', **of)}:train"
        for i, of in enumerate(recipes)
    ]
    datasets = open_datasets(paths[:2], tiny_config({}), "data.train")
    assert find_encoders(datasets) == {"mae": "m", "eva_vit": "a"} and find_encoders(datasets[1:]) == {"mae": "m"}
    assert find_frame_rules(datasets) == ["first", "peak"] and find_frame_rules([datasets[0], datasets[0]]) == ["peak"]
    del datasets[1].records.metadata["recipe"]["frame_rule"]
    assert find_frame_rules(datasets) is None
    with pytest.raises(UserError, match=r"eva_vit features of different encoders .* \(a\) and .* \(b\); extract"):
        open_datasets(paths, tiny_config({}), "data.train")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": ()}, "data.train: no data; give prepared data sets as FOLDER:SPLIT"),
        ({"train": ("nowhere",)}, "data.train: 'nowhere' names no split; write FOLDER:SPLIT"),
        ({"train": ("nowhere:train",)}, "no prepared data set: nowhere; give the folder"),
        ({"train": ("{folder}:test",)}, "no split 'test': .*; it has train, val"),
        ({"batch_rows": 3}, "data.batch_rows=3: must be a multiple of the 2 processes"),
        ({"train": ("{folder}:train", "{tokens}:train")}, "different images or encoders cannot be mixed"),
        ({"prompt": {"labels": ("calm", "tense"), "tasks": ("emotion",)}}, "no clip of .*:train has an answer for"),
        ({"prompt": {"layout": "reference"}}, "prompt.layout=reference: answers are learnt in the layout trained"),
        ({"eva_vit": {"image_size": 28}}, "prepared with size=56, the model has 28: .*; prepare it for it"),
        ({"projectors": {"feature_size": 768}}, "prepared with feature_size=1024, the model has 768"),
        (
            {"eva_vit": {"image_size": 28}, "train": ("{tokens}:train",)},
            r"image_tokens_shape=\[17, 48\], the model has",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refused(folder, tokens_folder, data, said):
    data = dict(data)
    groups = {name: data.pop(name) for name in ("prompt", "eva_vit", "projectors") if name in data}
    if "train" in data:
        data["train"] = tuple(path.format(folder=folder, tokens=tokens_folder) for path in data["train"])
    with pytest.raises(UserError, match=said) as caught:
        config = config_of(folder, **data)
        for name, changes in groups.items():
            group = dataclasses.replace(getattr(config, name), **changes)
            config = dataclasses.replace(config, **{name: group})
        train_dataset(config, TOKENIZER, num_shards=2)
    assert "\n" not in str(caught.value)
