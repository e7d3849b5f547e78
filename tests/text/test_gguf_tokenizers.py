"""Tokenizers from the metadata of GGUF files, against those that the metadata was made from."""

import json

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import pre_tokenizers

from emollama_jax.errors import UserError
from emollama_jax.text.gguf_tokenizers import tokenizer_from_gguf
from emollama_jax.text.tokenizers import load_tokenizer
from tests.text.tokenizer_samples import (
    LLAMA,
    PLAIN_TEXTS,
    SPECIAL_TEXTS,
    SPECIALS,
    TEMPLATE,
    assert_same,
    make,
    message,
    train,
)


def sentencepiece_metadata(**changes):
    proto = ModelProto.FromString((LLAMA / "tokenizer.model").read_bytes())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.{key}": value for key, value in changes.items()}


def bpe_metadata(tokenizer, pre="smollm"):
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    kinds = {**dict.fromkeys(SPECIALS, 3), "<video>": 4}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }


def test_gguf_sentencepiece_equals_its_source(llama, tmp_path):
    texts = PLAIN_TEXTS + SPECIAL_TEXTS["llama"]
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata())
    assert_same(tokenizer, llama, texts)
    tokenizer.save(tmp_path)
    assert_same(load_tokenizer(tmp_path), llama, texts)
    implied = sentencepiece_metadata()
    for token, name in enumerate(("unknown", "bos", "eos")):
        del implied[f"tokenizer.ggml.{name}_token_id"]
        implied["tokenizer.ggml.token_type"][token] = 1
    assert_same(tokenizer_from_gguf(implied), llama, texts)


def test_gguf_sentencepiece_settings(llama, tmp_path):
    changes = {"ggml.padding_token_id": 0, "ggml.add_space_prefix": False, "chat_template": TEMPLATE}
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(**changes))
    assert (tokenizer.pad_id, tokenizer.chat_template) == (0, TEMPLATE)
    assert tokenizer.encode(" the") == llama.encode("the")
    for text in PLAIN_TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save(tmp_path)
    assert_same(load_tokenizer(tmp_path), tokenizer, PLAIN_TEXTS + SPECIAL_TEXTS["llama"])


def test_gguf_sentencepiece_user_defined_and_unused_pieces():
    metadata = sentencepiece_metadata()
    for token, kind in (("<two words>", 4), ("[PAD641]", 5), ("[TOOL]", 3), ("[TOOL]s", 3)):
        metadata["tokenizer.ggml.tokens"].append(token)
        metadata["tokenizer.ggml.scores"].append(-1000.0)
        metadata["tokenizer.ggml.token_type"].append(kind)
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.vocab_size == 644
    assert tokenizer.encode("a<two words>", specials=False)[-1] == 640
    assert tokenizer.decode([640]) == "<two words>"
    assert tokenizer.encode("[TOOL][TOOL]s") == [642, 643]
    assert not {641, 642, 643} & set(tokenizer.encode("[PAD641] [TOOL] [TOOL]s", specials=False))


def test_gguf_sentencepiece_without_byte_pieces():
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁a", "▁", "a"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
    }
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("aa b") == [3, 5, 4, 0]
    assert tokenizer.decode([3, 5, 4, 0]) == "aa "


@pytest.mark.parametrize("pre", ["smollm", "gpt-2"])
def test_gguf_bpe_equals_its_source(pre):
    trained = train(pre)
    tokenizer = tokenizer_from_gguf(bpe_metadata(trained, pre))
    assert_same(tokenizer, make(trained), PLAIN_TEXTS + SPECIAL_TEXTS["bpe"])


def test_gguf_pre_tokenizers_cut_digits_differently():
    """One vocabulary with `1 2` -> `12` and `12 3` -> `123`: who may merge digits?"""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|im_end|>", *alphabet, "12", "123", "45", "ĠI", "'LL", "ĊĊ"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["1 2", "12 3", "4 5"],
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.eos_token_id": 0,
    }

    def pieces(pre, text):
        tokenizer = tokenizer_from_gguf({**metadata, "tokenizer.ggml.pre": pre})
        return [tokens[token] for token in tokenizer.encode(text)]

    assert pieces("smollm", "12345") == ["1", "2", "3", "4", "5"]
    assert pieces("gpt-2", "1212345") == ["12", "123", "45"]
    assert pieces("llama-bpe", "1212345") == ["12", "1", "2", "3", "4", "5"]
    # Words of the vocabulary that no merge leads to, an upper-case contraction, line ends in one word.
    assert pieces("llama-bpe", "'LL I\n\n") == ["'LL", "ĠI", "ĊĊ"]
    assert pieces("gpt-2", "'LL I\n\n") == ["'", "L", "L", "Ġ", "I", "Ċ", "Ċ"]


def test_gguf_bpe_text_cannot_forge_specials(trained):
    metadata = bpe_metadata(trained, "llama-bpe")
    metadata["tokenizer.ggml.tokens"].append("secret")
    metadata["tokenizer.ggml.token_type"].append(3)
    secret = len(metadata["tokenizer.ggml.tokens"]) - 1
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("secret") == [secret]
    for text in ("secret", "secret!secret", *SPECIAL_TEXTS["bpe"]):
        ids = tokenizer.encode(text, specials=False)
        assert not {0, 1, 2, secret} & set(ids), text
        assert tokenizer.decode(ids) == text


# ---- what users get wrong


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ggml.model": "bert"}, "'bert'"),
        ({"ggml.model": None}, "None"),
        ({"ggml.pre": "deepseek-coder"}, "'deepseek-coder'"),
        ({"ggml.pre": None}, "None"),
        ({"ggml.merges": ["no_space"]}, "tokenizer.*"),
        ({"ggml.merges": ["Ġ nowhere"]}, "nowhere"),
        ({"ggml.token_type": [1, 2, 3]}, "tokenizer.*"),
        ({"ggml.eos_token_id": 10_000}, "end-of-sequence"),
        ({"ggml.eos_token_id": None}, "end-of-sequence"),
    ],
)
def test_unusable_gguf_bpe(trained, change, named):
    with pytest.raises(UserError) as error:
        tokenizer_from_gguf(bpe_metadata(trained) | {f"tokenizer.{key}": value for key, value in change.items()})
    assert named in message(error)


@pytest.mark.parametrize("key", ["tokens", "scores", "token_type"])
def test_incomplete_gguf_sentencepiece(key):
    metadata = sentencepiece_metadata()
    with pytest.raises(UserError) as error:
        tokenizer_from_gguf({k: v for k, v in metadata.items() if k != f"tokenizer.ggml.{key}"})
    assert f"tokenizer.ggml.{key}" in message(error)
    cut = metadata[f"tokenizer.ggml.{key}"][:300]
    with pytest.raises(UserError) as error:
        tokenizer_from_gguf(metadata | {f"tokenizer.ggml.{key}": cut})
    message(error)


def test_gguf_sentencepiece_with_impossible_ids():
    for name in ("bos", "eos", "unknown"):
        with pytest.raises(UserError) as error:
            tokenizer_from_gguf(sentencepiece_metadata(**{f"ggml.{name}_token_id": 640}))
        message(error)
