"""The tokenizers that the tests share."""

import pytest

from emollama_jax.text.tokenizers import load_tokenizer
from tests.text.tokenizer_samples import LLAMA, make, train


@pytest.fixture(scope="module")
def llama():
    return load_tokenizer(LLAMA)


@pytest.fixture(scope="module")
def trained():
    return train()


@pytest.fixture(scope="module")
def bpe(trained):
    return make(trained)
