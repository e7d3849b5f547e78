"""Models of a hub in place of folders, out of its cache; local folders win."""

import shutil
from pathlib import Path

import pytest

from emollama_jax import cli
from emollama_jax.config import load_config
from emollama_jax.errors import UserError
from emollama_jax.features.encoders import load_encoders
from emollama_jax.weights.base_checkpoint import read_manifest
from emollama_jax.weights.locate import _download, choose_files, is_hub_name, locate
from emollama_jax.weights.model_identity import identify_model
from emollama_jax.weights.pretrained import load_base_tokenizer, load_llama
from emollama_jax.weights.sources import open_source
from tests.hub.fake_hub import COMMIT, FakeHub, hub  # noqa: F401
from tests.train.runs import LLAMA
from tests.weights.tiny import FLOAT32, assert_bit_equal, stored_values

REPO = "org/llama"


@pytest.fixture
def model(hub, tmp_path, monkeypatch) -> FakeHub:  # noqa: F811
    """A hub with a language model; the current folder is empty."""
    files = {file.name: file.read_bytes() for file in LLAMA.iterdir()}
    hub.models[REPO] = files | {"pytorch_model.bin": b"x" * 5000, "onnx/model.onnx": b"y" * 5000, "README.md": b"z"}
    monkeypatch.chdir(tmp_path)
    _download.cache_clear()
    yield hub
    _download.cache_clear()


@pytest.mark.smoke
@pytest.mark.parametrize("name", [REPO, f"{REPO}@main", f"{REPO}@{COMMIT}", f"hf://{REPO}", f"hf://{REPO}@main"])
def test_a_language_model_by_name(model, name):
    loaded, _ = load_llama(name, **FLOAT32)
    assert_bit_equal(stored_values(loaded), stored_values(load_llama(LLAMA, **FLOAT32)[0]))
    assert load_base_tokenizer(name, loaded.config.vocab_size).encode("a") == load_base_tokenizer(
        LLAMA, loaded.config.vocab_size
    ).encode("a")
    assert identify_model(name) == identify_model(LLAMA)
    assert all(file.is_symlink() for file in Path(locate(name)).iterdir())
    assert not model.gets("pytorch_model.bin") and not model.gets("model.onnx")


def test_local_folders_win(model, tmp_path):
    shutil.copytree(LLAMA, tmp_path / REPO)
    assert str(locate(REPO)) == str(tmp_path / REPO) and not model.asked
    shutil.rmtree(tmp_path / REPO)
    assert not is_hub_name("org/other")  # a folder `org` is here: a name in it that is wrong is no model of the hub
    assert is_hub_name("hf://org/other")


@pytest.mark.parametrize(
    "path", ["weights/llama2", "runs/stage2", "data/x", "a/b/c", "a", "/a/b", "./a", "../a", "a b/c"]
)
def test_paths_are_no_models(model, path):
    assert not is_hub_name(path) and not is_hub_name("gs://bucket/llama2")
    with pytest.raises(UserError, match="no such file or folder"):
        open_source(path)
    assert not model.asked


def test_one_file_of_a_model(model):
    assert locate(f"hf://{REPO}/config.json").read_bytes() == (LLAMA / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"no such file: org/llama"):
        locate(f"hf://{REPO}/none.bin")
    with pytest.raises(UserError, match="no name of a model on the hub: hf://org; write hf://ORG/NAME"):
        locate("hf://org")


@pytest.mark.parametrize(("name", "said"), [("org/none", "no model of this name"), (f"{REPO}@v9", "no revision v9")])
def test_a_name_that_the_hub_does_not_know(model, name, said):
    with pytest.raises(UserError, match=rf"{said}.*is no folder here, so it was taken for a model of the hub"):
        load_llama(name)


def test_without_the_hub_the_cache_serves(model, monkeypatch):
    locate(REPO)
    _download.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(model.asked)
    assert (locate(REPO) / "config.json").is_file() and len(model.asked) == asked
    with pytest.raises(UserError, match=r"not in the cache of the hub.*: org/none; unset HF_HUB_OFFLINE"):
        locate("org/none")


def test_damage_in_the_cache_is_seen_and_mended(model):
    blob = (locate(REPO) / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    _download.cache_clear()
    with pytest.raises(UserError, match=r"damaged in the hub's cache, by its hash: .*model.safetensors; it was"):
        locate(REPO)
    assert (locate(REPO) / "model.safetensors").read_bytes() == (LLAMA / "model.safetensors").read_bytes()


def test_a_cache_snapshot_as_a_folder(model):
    """As people who downloaded with other programs name it."""
    folder = locate(REPO)
    assert folder.name == COMMIT
    assert_bit_equal(stored_values(load_llama(folder, **FLOAT32)[0]), stored_values(load_llama(LLAMA, **FLOAT32)[0]))


def test_convert_and_encoders_by_name(model, tmp_path, capsys):
    assert cli.main(["convert", f"{REPO}@main", str(tmp_path / "base"), "--dtype", "float32"]) == 0
    assert read_manifest(tmp_path / "base")["source"] == REPO  # where PEFT finds it
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    config = transformers.ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=16,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    transformers.ViTMAEModel(config).save_pretrained(tmp_path / "mae")
    model.models["org/mae"] = {file.name: file.read_bytes() for file in (tmp_path / "mae").iterdir()}
    ours = load_encoders(load_config("tiny"), mae="org/mae")
    theirs = load_encoders(load_config("tiny"), mae=tmp_path / "mae")
    assert ours.fingerprints(load_config("tiny")) == theirs.fingerprints(load_config("tiny"))


def test_one_format_is_chosen():
    tokenizer = ["config.json", "tokenizer.model"]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)] + ["model.safetensors.index.json"]
    others = ["pytorch_model.bin", "optimizer.pt", "consolidated.safetensors", "x/model.safetensors", "README.md"]
    assert sorted(choose_files([*others, *shards, *tokenizer])) == sorted([*shards, *tokenizer])
    adapter = ["adapter_config.json", "adapter_model.safetensors", "projectors.safetensors"]
    assert sorted(choose_files([*adapter, "README.md"])) == sorted(adapter)
    with pytest.raises(UserError, match=r"2 GGUF files; name one as hf://ORG/NAME/a.gguf"):
        choose_files(["a.gguf", "b.gguf"])
    with pytest.raises(UserError, match="no weights among the files"):
        choose_files(["README.md"])
