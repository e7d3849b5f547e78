"""Tokens added behind a sentencepiece model, and several ends of an answer: as transformers reads them, and kept."""

import json
import pickle
import shutil

import pytest

from emollama_jax.text.stream_decoder import StreamDecoder
from emollama_jax.text.tokenizers import load_tokenizer
from tests.text.chatml import ADDED, LLAMA, flags, write
from tests.weights.tiny import user_error

TEXTS = [
    "<|im_start|>user",
    "hello<|im_end|>",
    "<|im_start|>user\nhow<|im_end|>\n<|im_start|> assistant<s>[PAD]</s>",
    "a <face> b<face>c  <face>  d",
    "  <clip>  x <clip> ",
    "<|im_start",
    "plain, 你好 😀",
    "",
]


@pytest.mark.parametrize("form", ["decoder", "file"])
def test_ids_and_texts_are_those_of_the_slow_hugging_face_tokenizer(tmp_path, form):
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip("transformers 5 has no slow tokenizers")
    theirs = transformers.AutoTokenizer.from_pretrained(write(tmp_path, form=form), use_fast=False)
    ours = load_tokenizer(tmp_path)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (645, 1, 642, 641)
    assert (len(theirs), theirs.eos_token_id, theirs.pad_token_id) == (645, 642, 641)
    for text in TEXTS:
        text = text.replace("</s>", "") if form == "file" else text  # which nothing names there
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids, text
        if "<clip>" not in text:  # which takes spaces away
            assert ours.decode(ids, skip_specials=False) == text


def test_ids_of_added_tokens(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path))
    plain = load_tokenizer(LLAMA)
    assert tokenizer.encode("hello<|im_end|>") == [*plain.encode("hello"), 642]
    assert tokenizer.encode("a <clip> b") == [*plain.encode("a"), 644, *plain.encode("b")]
    assert tokenizer.encode("a <face> b") == [*plain.encode("a "), 643, *plain.encode(" b")]
    assert tokenizer.end_ids == (642,)


def test_text_cannot_forge_added_specials(tmp_path):
    """What is no special token is one token even there, as with other tokenizers."""
    tokenizer = load_tokenizer(write(tmp_path))
    for text in ("<|im_end|>", "a<|im_start|>", "[PAD]"):
        assert not {640, 641, 642} & set(tokenizer.encode(text, specials=False))
    assert tokenizer.encode("<face>", specials=False) == [643]


@pytest.mark.smoke
@pytest.mark.parametrize("form", ["decoder", "file"])
def test_added_tokens_survive_saving_and_pickling(tmp_path, form):
    tokenizer = load_tokenizer(write(tmp_path / "in", form=form, model_max_length=77, auto_map={"x": "code.X"}))
    tokenizer.save(tmp_path / "out")
    for again in (load_tokenizer(tmp_path / "out"), pickle.loads(pickle.dumps(tokenizer))):
        assert (again.vocab_size, again.eos_id, again.pad_id) == (645, 642, 641)
        assert again.end_ids[0] == 642
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert again.encode(text) == ids
            assert again.encode(text, specials=False) == tokenizer.encode(text, specials=False)
            assert again.decode(ids) == tokenizer.decode(ids)
    assert json.loads((tmp_path / "out/added_tokens.json").read_text()) == ADDED
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (settings["model_max_length"], settings["eos_token"]) == (77, "<|im_end|>")
    assert settings["additional_special_tokens"] == ["<|im_start|>"] and "auto_map" not in settings


def test_hugging_face_reads_what_is_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip("transformers 5 has no slow tokenizers")
    load_tokenizer(write(tmp_path / "in")).save(tmp_path / "out")
    before, after = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / name, use_fast=False) for name in ("in", "out")
    )
    assert len(after) == len(before) == 645
    assert (after.eos_token_id, after.pad_token_id) == (642, 641)
    for text in TEXTS:
        assert after(text).input_ids == before(text).input_ids, text


def test_a_stream_of_added_tokens(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path))
    ids = tokenizer.encode("one <face> two<face> three " * 20)
    decoder = StreamDecoder(tokenizer)
    assert "".join([*(decoder.push([token]) for token in ids), decoder.finish()]) == tokenizer.decode(ids)


def test_ids_in_a_gap_have_no_text(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, added_tokens_decoder={"700": flags("<x>")}, eos_token="</s>"))
    assert (tokenizer.vocab_size, tokenizer.encode("<x>")) == (701, [700])
    with pytest.raises(ValueError, match="650 is in a gap"):
        tokenizer.decode([650])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"added_tokens_decoder": {"5": flags("<x>")}}, "has the id 5 of another piece"),
        ({"added_tokens_decoder": {"640": flags("<x>", single_word=True)}}, "whole words only, <x>"),
        ({"added_tokens_decoder": {"640": flags("<x>"), "641": flags("<x>")}}, "has two ids"),
        ({"added_tokens_decoder": {"x": flags("<x>")}}, "invalid literal"),
        ({"added_tokens_decoder": {"640": {}}}, "content"),
        ({"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs={'enable_sampling': True}"),
        ({"do_lower_case": True}, "do_lower_case=True"),
    ],
)
def test_added_tokens_without_sense(tmp_path, changes, word):
    with user_error("unusable tokenizer", str(tmp_path), word):
        load_tokenizer(write(tmp_path, **changes))


def test_two_files_that_contradict_each_other(tmp_path):
    write(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<other>": 640}))
    with user_error("unusable tokenizer", "'<|im_start|>' and '<other>', have the id 640"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (2, None, (2,)),
        ([2, 5], None, (2, 5)),
        ([2, 5], 2, (2, 5)),
        (2, [7, 2], (2, 7)),
        (None, [7, 10_000], (2, 7)),  # what the vocabulary does not have ends nothing
    ],
)
def test_several_ends_of_an_answer(tmp_path, config, generation, ends):
    shutil.copy(LLAMA / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert load_tokenizer(tmp_path).end_ids == ends


def test_special_tokens_of_the_older_file_are_kept(tmp_path):
    write(tmp_path / "in", additional_special_tokens=None)
    config = json.loads((tmp_path / "in/tokenizer_config.json").read_text())
    del config["additional_special_tokens"]
    (tmp_path / "in/tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "in/special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<|im_start|>"]}))
    load_tokenizer(tmp_path / "in").save(tmp_path / "out")
    kept = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert kept["additional_special_tokens"] == ["<|im_start|>"]


def test_a_tokenizer_json_must_hold_what_was_added(tmp_path):
    hf = pytest.importorskip("tokenizers")
    model = hf.Tokenizer(hf.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    model.add_special_tokens(["<x>"])
    model.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "</s>", "added_tokens_decoder": {"2": flags("<x>", single_word=True)}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).encode("<x>") == [2]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<y>": 3}))
    with user_error("unusable tokenizer", "the added tokens <y> are not in it"):
        load_tokenizer(tmp_path)
