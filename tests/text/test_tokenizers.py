"""Tokenizers against the libraries they must agree with, and against files and texts that mean harm."""

import json
import pickle
import threading

import pytest
import tokenizers as hf
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from emollama_jax.errors import UserError
from emollama_jax.text.tokenizers import (
    HFTokenizer,
    SentencePieceTokenizer,
    check_vocabulary,
    load_tokenizer,
)
from tests.text.tokenizer_samples import (
    LLAMA,
    PLAIN_TEXTS,
    SPECIAL_TEXTS,
    TEMPLATE,
    assert_same,
    make,
    message,
    write,
)

# ---- the sentencepiece model of LLaMA


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


# ---- what users get wrong


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
