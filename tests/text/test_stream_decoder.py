"""Streamed text: whatever the pieces, they join to the text of all tokens."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from emollama_jax.text.stream_decoder import StreamDecoder
from emollama_jax.text.tokenizers import HFTokenizer, load_tokenizer

LLAMA = Path(__file__).parents[1] / "data" / "reference_tiny" / "llama"
TEXTS = [
    "",
    "the person in the video says",
    " sad",
    "   three  spaces   and trailing   ",
    "line\nbreak\n\n\r\n end\n",
    "你好，世界。情感识别",
    "😀 smiles 👩‍👩‍👧 and 🏳️‍🌈",
    "é ñ e\u0301 Ω Привет مرحبا",
    "a replacement \ufffd stands here \ufffd\ufffd\ufffd\ufffd\ufffd",
    "word 字😀 " * 60,
]


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level"])
def tokenizer(request):
    if request.param == "sentencepiece":
        return load_tokenizer(LLAMA)
    bpe = hf.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet, specials = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    bpe.train_from_iterator(TEXTS, trainer)
    return HFTokenizer(bpe.to_str(), bos="<s>", eos="</s>", pad=None)


def pieces(tokenizer, ids, sizes):
    """What a decoder returns for the ids, so many at a time."""
    decoder, found, start = StreamDecoder(tokenizer), [], 0
    while start < len(ids):
        size = next(sizes)
        found.append(decoder.push(ids[start : start + size]))
        start += size
    return [*found, decoder.finish()]


def ones():
    while True:
        yield 1


def random_sizes(rng):
    while True:
        yield int(rng.integers(0, 9))


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_pieces_join_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    for sizes in (ones(), random_sizes(np.random.default_rng(0))):
        assert "".join(pieces(tokenizer, ids, sizes)) == tokenizer.decode(ids) == text


def test_random_ids(tokenizer):
    """Most of whose bytes are no characters, with special tokens among them."""
    rng = np.random.default_rng(1)
    for length in [*range(1, 40), 300, 1000]:
        ids = rng.integers(0, tokenizer.vocab_size, length).tolist()
        for sizes in (ones(), random_sizes(rng)):
            assert "".join(pieces(tokenizer, ids, sizes)) == tokenizer.decode(ids)
    low = rng.integers(0, 259, 400).tolist()  # special tokens and bytes only
    assert "".join(pieces(tokenizer, low, ones())) == tokenizer.decode(low)


def test_special_tokens_alone(tokenizer):
    word = tokenizer.encode(" word")
    ids = [*word, *[tokenizer.eos_id] * 200, *word]
    assert "".join(pieces(tokenizer, ids, ones())) == tokenizer.decode(ids)


@pytest.mark.smoke
def test_a_character_is_held_back_until_it_is_whole(tokenizer):
    ids = tokenizer.encode("a🦜b")
    decoder = StreamDecoder(tokenizer)
    shown = [decoder.push([token]) for token in ids]
    assert [text for text in shown if text] == ["a", "🦜", "b"]
    assert decoder.finish() == ""
    decoder.push(ids[:-2])  # and never whole
    assert decoder.finish() == tokenizer.decode(ids[:-2])[1:]
    assert decoder.push(tokenizer.encode(" c")) == tokenizer.decode(tokenizer.encode(" c"))  # a new text


@pytest.mark.parametrize("kind", ["text", "random"])
def test_the_cost_grows_with_the_text_not_with_its_square(tokenizer, kind, monkeypatch):
    real, decoded = tokenizer.decode, []
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or real(ids))
    for times in (1, 4):
        random = np.random.default_rng(2).integers(0, tokenizer.vocab_size, 500 * times)
        ids = tokenizer.encode(TEXTS[-1]) * times if kind == "text" else random.tolist()
        decoded.clear()
        pieces(tokenizer, ids, ones())
        assert sum(decoded) < 60 * len(ids)
