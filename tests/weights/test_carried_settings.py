"""What a model's files say and ours does not need, through conversions and exports."""

import json

import pytest

from emollama_jax import cli
from emollama_jax.text.tokenizers import load_tokenizer
from tests.text.chatml import write as write_tokenizer
from tests.weights.tiny import random_weights, tiny_config, write_folder, write_gguf

CONFIG = tiny_config(num_layers=1, vocab_size=645)
GENERATION = {
    "temperature": 0.6,
    "top_p": 0.9,
    "do_sample": True,
    "eos_token_id": [642, 5],
    "transformers_version": "4",
}
KEPT = {"max_position_embeddings": 4096, "initializer_range": 0.03, "attention_dropout": 0.1, "pretraining_tp": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_folder(folder, CONFIG, random_weights(CONFIG), **KEPT, eos_token_id=[642, 5], _name_or_path="/home/x")
    write_tokenizer(folder)
    (folder / "special_tokens_map.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def assert_kept(folder):
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in KEPT} == KEPT
    assert (config["eos_token_id"], config["pad_token_id"], config["vocab_size"]) == ([642, 5], 641, 645)
    assert "_name_or_path" not in config
    assert json.loads((folder / "generation_config.json").read_text()) == GENERATION
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.end_ids) == (645, (642, 5))


def test_through_a_base_checkpoint_and_back(tmp_path, source):
    for start, end, form in ((source, "base", "base"), (tmp_path / "base", "hf", "hf"), (source, "at once", "hf")):
        assert cli.main(["convert", str(start), str(tmp_path / end), "--to", form]) == 0
        assert_kept(tmp_path / end)
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    read = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert (read.config.max_position_embeddings, read.generation_config.eos_token_id) == (4096, [642, 5])
    assert read.generation_config.temperature == 0.6


@pytest.mark.smoke
def test_of_a_gguf_file(tmp_path):
    config = tiny_config(num_layers=1)
    ids = {"llama.context_length": 4096, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7}
    write_gguf(tmp_path / "m.gguf", config, random_weights(config), numbers=ids)
    assert cli.main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    settings = json.loads((tmp_path / "hf/config.json").read_text())
    assert (settings["max_position_embeddings"], settings["eos_token_id"]) == (4096, [2, 7])
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == [2, 7]
    assert load_tokenizer(tmp_path / "hf").end_ids == (2, 7)
