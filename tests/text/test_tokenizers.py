"""Tokenizers against the libraries they must agree with, and against files and texts that mean harm."""

import json
import pickle
import threading
from pathlib import Path

import pytest
import tokenizers as hf
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from emollama_jax.errors import UserError
from emollama_jax.text.gguf_tokenizers import tokenizer_from_gguf
from emollama_jax.text.tokenizers import (
    HFTokenizer,
    SentencePieceTokenizer,
    check_vocabulary,
    load_tokenizer,
)

LLAMA = Path(__file__).parents[1] / "data" / "reference_tiny" / "llama"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"

PLAIN_TEXTS = [
    "",
    " ",
    "   ",
    "the person in the video says",
    " sad",
    "   three spaces first",
    "trailing spaces  ",
    "two  spaces   inside",
    "\ttab\there",
    "line\nbreak\n\n\r\n end\n",
    "\"quoted\" and 'single', don't, I'LL, they've",
    "12345 and 3.14 or 1,000,000 ²Ⅷ٣",
    "你好，世界。情感识别",
    "😀 smiles 👩‍👩‍👧 and 🏳️‍🌈",
    "é ñ e\u0301 Ω Привет مرحبا",
    "control \x00\x01\x7f characters",
    "non-breaking\u00a0and wide\u3000spaces\u200b",
    "[INST] <video> <feature> [/INST] *** {'a': [1]} ###",
    "word " * 30,
]
SPECIAL_TEXTS = {
    "llama": [
        "</s>",
        " sad</s>",
        "<s>[INST] hi [/INST]",
        "a</s>b",
        "<unk> x <s></s> y\n</s> ",
        "</s",
        "<s><s>",
        "</s>\t",
    ],
    "bpe": [
        "<|im_end|>",
        "<|im_start|>user\nHi<|im_end|>\n",
        "a<|im_end|> b",
        " <|endoftext|> ",
        "<|im_end",
        "<|im_<|im_end|>",
    ],
}


def assert_same(one, other, texts):
    """Two tokenizers are the same in all that their interface shows."""
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "chat_template"):
        assert getattr(one, name) == getattr(other, name), name
    for text in texts:
        for specials in (True, False):
            ids = one.encode(text, specials=specials)
            assert ids == other.encode(text, specials=specials), text
            for skip in (True, False):
                assert one.decode(ids, skip_specials=skip) == other.decode(ids, skip_specials=skip), text


# ---- the sentencepiece model of LLaMA


@pytest.fixture(scope="module")
def llama():
    return load_tokenizer(LLAMA)


@pytest.fixture(scope="module")
def processor():
    return SentencePieceProcessor(model_file=str(LLAMA / "tokenizer.model"))


def test_llama_ids(llama):
    assert isinstance(llama, SentencePieceTokenizer)
    assert (llama.vocab_size, llama.bos_id, llama.eos_id, llama.pad_id) == (640, 1, 2, 2)
    assert llama.chat_template is None


@pytest.mark.parametrize("text", PLAIN_TEXTS)
def test_llama_plain_text_is_what_sentencepiece_says(llama, processor, text):
    for specials in (True, False):
        ids = llama.encode(text, specials=specials)
        assert ids == processor.encode(text)
        assert all(type(token) is int for token in ids)
    assert llama.decode(ids) == text


def test_llama_encodes_each_part_between_specials_with_its_own_space(llama, processor):
    """A worked example: the dummy space stands before `sad`, before ` b`, and before the text after `</s>`."""
    assert llama.encode(" sad</s>") == [*processor.encode(" sad"), 2]
    assert [processor.id_to_piece(token) for token in llama.encode(" sad</s>")] == ["▁", "▁sad", "</s>"]
    assert llama.encode("a</s> b<s><unk>c") == [
        *processor.encode("a"), 2, *processor.encode(" b"), 1, 0, *processor.encode("c")
    ]  # fmt: skip


def test_llama_equals_the_slow_hugging_face_tokenizer(llama):
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip("transformers 5 has no slow LlamaTokenizer to compare with")
    slow = transformers.LlamaTokenizer(str(LLAMA / "tokenizer.model"), legacy=True)
    for text in PLAIN_TEXTS + SPECIAL_TEXTS["llama"]:
        ids = slow.encode(text, add_special_tokens=False)
        assert llama.encode(text) == ids, text
        if ids and not text.startswith((" ", "<")):  # where it loses a second space, or there is no text to begin with
            assert llama.decode(ids) == slow.decode(ids, skip_special_tokens=True), text


def test_llama_decode(llama, processor):
    assert llama.decode([]) == ""
    ids = llama.encode("<s>the person</s>")
    assert llama.decode(ids) == "the person"
    assert llama.decode(ids, skip_specials=False) == "<s>the person</s>"
    assert llama.decode(iter(ids)) == "the person"
    for text in SPECIAL_TEXTS["llama"]:
        assert llama.decode(llama.encode(text), skip_specials=False) == text
        assert llama.decode(llama.encode(text, specials=False)) == text
    first, second = processor.encode("the"), processor.encode("person")
    assert llama.decode([0, *first, 2, *second]) == "the person"  # the space is the second text's own


def test_llama_decodes_bytes(llama, processor):
    smile = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    assert llama.decode(smile) == "😀"
    assert llama.decode(smile[:3]) == "\N{REPLACEMENT CHARACTER}" * 3
    assert llama.decode([*smile[1:2], *smile]) == "\N{REPLACEMENT CHARACTER}😀"


def test_llama_text_cannot_forge_specials(llama):
    for text in SPECIAL_TEXTS["llama"]:
        ids = llama.encode(text, specials=False)
        assert not {0, 1, 2} & set(ids)
        assert llama.decode(ids) == text


def test_llama_save_and_load(llama, tmp_path):
    own = SentencePieceTokenizer((LLAMA / "tokenizer.model").read_bytes(), pad="<unk>", chat_template=TEMPLATE)
    assert own.pad_id == 0
    for name, tokenizer in (("plain", llama), ("own", own)):
        tokenizer.save(tmp_path / "made" / name)
        assert_same(tokenizer, load_tokenizer(tmp_path / "made" / name), PLAIN_TEXTS + SPECIAL_TEXTS["llama"])
    assert (tmp_path / "made" / "own" / "tokenizer.model").read_bytes() == (LLAMA / "tokenizer.model").read_bytes()


def test_llama_pickles(llama):
    assert_same(llama, pickle.loads(pickle.dumps(llama)), PLAIN_TEXTS + SPECIAL_TEXTS["llama"])


def test_llama_padding_that_the_model_lacks_is_eos(tmp_path):
    """Chat models that name a `<pad>` beyond the sentencepiece model, and old folders with wrong BOS and EOS."""
    (tmp_path / "tokenizer.model").write_bytes((LLAMA / "tokenizer.model").read_bytes())
    write(tmp_path / "tokenizer_config.json", {"pad_token": "<pad>", "bos_token": "", "eos_token": ""})
    write(tmp_path / "config.json", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)


# ---- a tokenizer.json


def words(pre):
    """The pre-tokenizers the GGUF names stand for, put together anew."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    return gpt2


def train(pre="smollm"):
    tokenizer = hf.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words(pre)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    # With `<|` among the merges, a special token spelled out must not be cut just anywhere.
    tokenizer.train_from_iterator([*PLAIN_TEXTS, "<| |> <|im |>"] * 3, trainer)
    tokenizer.add_tokens([hf.AddedToken("<video>", normalized=False)])
    return tokenizer


def make(tokenizer, **changes):
    names = {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|endoftext|>", "chat_template": TEMPLATE}
    return HFTokenizer(tokenizer.to_str(), **{**names, **changes})


def write(file, value):
    file.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture(scope="module")
def trained():
    return train()


@pytest.fixture(scope="module")
def bpe(trained):
    return make(trained)


def test_bpe_ids(bpe, trained):
    assert (bpe.vocab_size, bpe.bos_id, bpe.eos_id, bpe.pad_id) == (trained.get_vocab_size(), 1, 2, 0)
    assert bpe.chat_template == TEMPLATE
    assert make(trained, bos=None, pad=None).bos_id is None
    assert make(trained, bos="<none>", pad=None).bos_id is None
    assert make(trained, bos=None, pad=None).pad_id == 2
    assert make(trained, eos=0).eos_id == 0


def test_bpe_equals_the_fast_hugging_face_tokenizer(bpe, trained):
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=hf.Tokenizer.from_str(trained.to_str()), clean_up_tokenization_spaces=False
    )
    for text in PLAIN_TEXTS + SPECIAL_TEXTS["bpe"]:
        ids = fast.encode(text, add_special_tokens=False)
        assert bpe.encode(text) == ids, text
        assert bpe.decode(ids) == fast.decode(ids, skip_special_tokens=True), text
        assert bpe.decode(ids, skip_specials=False) == fast.decode(ids), text
        plain = fast.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert bpe.encode(text, specials=False) == plain, text


def test_bpe_round_trip(bpe):
    for text in PLAIN_TEXTS + SPECIAL_TEXTS["bpe"]:
        assert bpe.decode(bpe.encode(text), skip_specials=False) == text
        assert bpe.decode(bpe.encode(text, specials=False)) == text
    assert bpe.encode("<|im_start|>a<|im_end|>")[::2] == [1, 2]
    assert bpe.decode(bpe.encode("<|im_start|>a<|im_end|>")) == "a"
    assert "\N{REPLACEMENT CHARACTER}" in bpe.decode(bpe.encode("情")[:1])


def test_bpe_text_cannot_forge_specials(bpe):
    for text in SPECIAL_TEXTS["bpe"]:
        assert not {0, 1, 2} & set(bpe.encode(text, specials=False))


def test_bpe_added_token_that_is_not_special_is_always_one_token(bpe, trained):
    token = trained.token_to_id("<video>")
    assert bpe.encode("a<video>", specials=False)[1:] == bpe.encode("a<video>")[1:] == [token]
    assert bpe.decode([token]) == "<video>"


def test_bpe_post_processor_truncation_and_padding_are_not_used(bpe, trained):
    changed = hf.Tokenizer.from_str(trained.to_str())
    changed.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    changed.enable_truncation(4)
    changed.enable_padding(length=64)
    assert_same(make(changed), bpe, PLAIN_TEXTS + SPECIAL_TEXTS["bpe"])


def test_bpe_save_load_and_pickle(bpe, trained, tmp_path):
    for name, tokenizer in (("full", bpe), ("bare", make(trained, bos=None, pad=None, chat_template=None))):
        tokenizer.save(tmp_path / name)
        write(tmp_path / name / "config.json", {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 7})
        texts = PLAIN_TEXTS + SPECIAL_TEXTS["bpe"]
        assert_same(tokenizer, load_tokenizer(tmp_path / name), texts)
        assert_same(tokenizer, load_tokenizer(tmp_path / name / "tokenizer.json"), texts)
        assert_same(tokenizer, pickle.loads(pickle.dumps(tokenizer)), texts)


def test_bpe_eos_is_special_even_if_only_the_configuration_says_so(trained):
    spec = json.loads(trained.to_str())
    spec["added_tokens"] = []
    tokenizer = HFTokenizer(json.dumps(spec), bos=None, eos="<|im_end|>", pad=None)
    assert tokenizer.encode("a<|im_end|>")[-1] == 2
    assert 2 not in tokenizer.encode("a<|im_end|>", specials=False)
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>")) == "a"


def test_bpe_in_threads(bpe):
    text = "<|im_start|>hello there<|im_end|>" * 20
    expected = {specials: bpe.encode(text, specials=specials) for specials in (True, False)}
    wrong = []

    def work(specials):
        wrong.extend(None for _ in range(200) if bpe.encode(text, specials=specials) != expected[specials])

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_model_whose_words_hold_a_special_token(tmp_path):
    """Such a model finds `</s>` without parsing it, here even behind a normaliser that makes it from other letters."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁a", -1.0), ("▁", -2.0), *((c, -3.0) for c in "</s>ab")]
    model = hf.Tokenizer(models.Unigram(pieces, unk_id=0))
    model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    model.add_special_tokens(["</s>"])
    tokenizer = HFTokenizer(model.to_str(), bos=None, eos="</s>", pad=None)
    assert 1 in tokenizer.encode("a</s>")
    for text in ("a</s>", "</s></s>b", "＜/ｓ＞", "a</s>" * 500):
        assert 1 not in tokenizer.encode(text, specials=False), text


@pytest.mark.parametrize(
    ("config", "names", "model", "expected"),
    [
        ({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": None}, {}, {}, (1, 2, 2)),
        ({"eos_token": {"content": "<|im_end|>"}}, {}, {}, (None, 2, 2)),
        ({}, {"eos_token": {"content": "<|im_end|>"}}, {"eos_token_id": 0}, (None, 2, 2)),
        ({"bos_token": None, "eos_token": None}, {}, {"bos_token_id": 1, "eos_token_id": 2}, (None, 2, 2)),
        ({}, {}, {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 0}, (1, 2, 0)),
        ({}, {}, {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": -1}, (None, 2, 2)),
        ({"bos_token": "<none>", "eos_token": "<|im_end|>", "pad_token": "<none>"}, {}, {}, (None, 2, 2)),
    ],
)
def test_bpe_folder_names_the_special_tokens(trained, tmp_path, config, names, model, expected):
    trained.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json", config)
    write(tmp_path / "special_tokens_map.json", names)
    write(tmp_path / "config.json", model)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == expected


def test_bpe_folder_has_the_chat_template(trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>"}
    write(tmp_path / "tokenizer_config.json", config)
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path).chat_template == "from the file"
    named = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": TEMPLATE}]
    write(tmp_path / "tokenizer_config.json", {**config, "chat_template": named})
    assert load_tokenizer(tmp_path).chat_template == TEMPLATE


# ---- GGUF metadata


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


def message(error):
    text = str(error.value)
    assert "\n" not in text and "; " in text, text
    return text


@pytest.mark.parametrize("ids", [[-1], [5, 10_000]])
def test_decode_refuses_ids_outside_the_vocabulary(llama, bpe, ids):
    for tokenizer in (llama, bpe):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode(ids)


def test_check_vocabulary(llama):
    check_vocabulary(llama, 640, "model")
    check_vocabulary(llama, 704, "model")
    with pytest.raises(UserError, match=r"640 ids .* 639 .*: a/model;") as error:
        check_vocabulary(llama, 639, "a/model")
    message(error)


def test_missing_files(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "tokenizer.model", tmp_path / "tokenizer.json"):
        with pytest.raises(UserError) as error:
            load_tokenizer(path)
        assert str(path) in message(error)


def test_damaged_sentencepiece_models(tmp_path):
    whole = (LLAMA / "tokenizer.model").read_bytes()
    proto = ModelProto.FromString(whole)
    at_a_piece = len(ModelProto(pieces=proto.pieces[:400]).SerializeToString())
    no_eos = ModelProto.FromString(whole)
    no_eos.trainer_spec.eos_piece = "▁the"
    file = tmp_path / "tokenizer.model"
    for content in (b"", whole[: len(whole) // 2], whole[:at_a_piece], b"IQ== 0\nIg== 1\n", no_eos.SerializeToString()):
        file.write_bytes(content)
        with pytest.raises(UserError) as error:
            load_tokenizer(tmp_path)
        assert str(file) in message(error)
        assert content or "empty" in message(error)


def test_broken_json(trained, tmp_path):
    file, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    write(config, {"eos_token": "<|im_end|>"})
    for content in (b"", b"{}", b"[1]", b"\xff\xfe", trained.to_str().encode()[:500]):
        file.write_bytes(content)
        with pytest.raises(UserError) as error:
            load_tokenizer(tmp_path)
        assert str(file) in message(error)
    trained.save(str(file))
    for content in (b"", b"{", b"[]", b"\xff\xfe"):
        config.write_bytes(content)
        with pytest.raises(UserError) as error:
            load_tokenizer(tmp_path)
        assert str(config) in message(error)
    for value in ({}, {"eos_token": "<none>"}, {"eos_token": {}}):
        write(config, value)
        with pytest.raises(UserError, match="end-of-sequence") as error:
            load_tokenizer(tmp_path)
        assert str(file) in message(error)


def test_save_beside_another_tokenizer(llama, bpe, tmp_path):
    llama.save(tmp_path)
    with pytest.raises(UserError, match="another tokenizer") as error:
        bpe.save(tmp_path)
    message(error)


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
