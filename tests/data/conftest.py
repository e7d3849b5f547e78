"""Prepared data that the tests of the pipeline read."""

import pytest

from tests.data.batches import TRAIN, VAL
from tests.data.prepared import write_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "frames", {"train": TRAIN, "val": VAL})


@pytest.fixture(scope="module")
def tokens_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "tokens"
    return write_data(out, {"train": TRAIN, "val": VAL}, image="image_tokens", seed=1)
