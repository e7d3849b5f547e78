"""The stream of batches reads no further ahead than it may, and refuses data that do not go together."""

import dataclasses

import pytest

from emollama_jax.data.datasets import (
    find_encoders,
    find_frame_rules,
    open_datasets,
)
from emollama_jax.data.pipeline import train_dataset
from emollama_jax.data.records import Records
from emollama_jax.errors import UserError
from tests.data.batches import clips_of, config_of
from tests.data.prepared import TOKENIZER, tiny_config, write_data


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
