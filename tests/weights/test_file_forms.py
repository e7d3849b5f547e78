"""Weights as people have them: under other names, beside other files, in containers, with objects beside them."""

import argparse
import collections
import datetime
import os
import pathlib
import types
import uuid

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emollama_jax.errors import UserError
from emollama_jax.weights.pretrained import load_llama
from emollama_jax.weights.sources import ADAPTER_FILES, open_source
from tests.weights.tiny import (
    FLOAT32,
    assert_holds,
    random_weights,
    save_torch,
    tiny_config,
    user_error,
    write_config,
    write_folder,
    write_gguf,
    write_sharded,
)

CONFIG = tiny_config(num_layers=1)
TENSORS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.ones(2, np.float32)}


def assert_opened(path, format, tensors=TENSORS):
    with open_source(path) as source:
        assert source.format == format
        assert source.names() == sorted(tensors)
        for name, value in tensors.items():
            np.testing.assert_array_equal(source.read(name), value)


# --- names and places ---


def test_a_torch_file_called_safetensors(tmp_path):
    save_torch(TENSORS, tmp_path / "model.safetensors")
    assert_opened(tmp_path, "torch")


def test_a_safetensors_file_called_torchs(tmp_path):
    save_file(TENSORS, tmp_path / "pytorch_model.bin")
    assert_opened(tmp_path, "safetensors")


def test_torch_shards_called_safetensors(tmp_path):
    write_sharded(tmp_path, CONFIG, TENSORS, "model.safetensors", save_torch)
    assert_opened(tmp_path, "torch")


def test_shards_of_several_formats(tmp_path):
    write_sharded(tmp_path, CONFIG, TENSORS, "model.safetensors", save_file)
    save_torch({}, tmp_path / "model-00002-of-00003.safetensors")
    with user_error("shards of several formats, safetensors, torch", str(tmp_path)):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "flax_model.msgpack", "m.gguf", "x"])
@pytest.mark.parametrize(
    "text", ["<!doctype html><title>429</title>", '{"error": "no access"}', "\ufeff<html>é" + "é" * 200]
)
def test_a_web_page_instead_of_weights(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with user_error("text instead of weights, maybe a web page", str(tmp_path / name), "download it again"):
        open_source(tmp_path / name)


def test_what_trainers_leave_beside_the_weights_is_not_them(tmp_path):
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "projectors.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x02")
    with user_error("no weights in this folder"):
        open_source(tmp_path)
    write_gguf(tmp_path / "m.gguf", CONFIG, {})
    assert open_source(tmp_path).format == "gguf"


def test_models_and_adapters_in_one_folder(tmp_path):
    save_file({"m": np.ones(2)}, tmp_path / "model.safetensors")
    save_file({"a": np.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert open_source(tmp_path).names() == ["m"]
    assert open_source(tmp_path, ADAPTER_FILES).names() == ["a"]
    (tmp_path / "model.safetensors").unlink()
    with user_error("an adapter's weights instead of a model's, adapter_model.safetensors", str(tmp_path)):
        open_source(tmp_path)


@pytest.mark.parametrize("gone", ["model.safetensors", "config.json", "model-00002-of-00003.safetensors"])
def test_a_link_whose_target_is_gone(tmp_path, gone):
    """As in a download that was broken off, where a snapshot links to files in a cache."""
    if "of" in gone:
        write_sharded(tmp_path, CONFIG, TENSORS, "model.safetensors", save_file)
    else:
        write_folder(tmp_path, CONFIG, TENSORS)
    (tmp_path / gone).unlink()
    os.symlink("../blobs/0123", tmp_path / gone)
    with user_error("a link to a file that is gone, ../blobs/0123", str(tmp_path / gone), "download or copy it again"):
        open_source(tmp_path)


def test_the_folder_of_a_cache(tmp_path):
    (tmp_path / "snapshots/abc").mkdir(parents=True)
    with user_error("the folder of a download cache", f"give a snapshot in it, e.g. {tmp_path / 'snapshots/abc'}"):
        open_source(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_as_windows_editors_save_it(tmp_path, encoding):
    write_sharded(tmp_path, CONFIG, TENSORS, "model.safetensors", save_file)
    for name in ("config.json", "model.safetensors.index.json"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_bytes(text.encode(encoding))
    assert open_source(tmp_path).config["hidden_size"] == 64
    assert_opened(tmp_path, "safetensors")


# --- tied tensors ---


def test_of_shared_tensors_a_file_keeps_one(tmp_path):
    """And says in its metadata whose the other names are, as safetensors' own save_model does."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_model

    model = torch.nn.ModuleDict({"z": torch.nn.Linear(3, 2), "b": torch.nn.Linear(3, 2, bias=False)})
    model["b"].weight = model["z"].weight
    save_model(model, tmp_path / "model.safetensors")
    assert len(load_file(tmp_path / "model.safetensors")) == 2
    assert_opened(tmp_path, "safetensors", {name: value.numpy() for name, value in model.state_dict().items()})


@pytest.mark.parametrize("head", ["alone", "same", "other"])
def test_the_head_of_a_tied_model(tmp_path, head):
    config = tiny_config(num_layers=1, tie_embeddings=True)
    weights = random_weights(config)
    embedding = weights["model.embed_tokens.weight"]
    stored = weights | {"lm_head.weight": embedding + 1 if head == "other" else embedding}
    if head == "alone":
        del stored["model.embed_tokens.weight"]
    write_folder(tmp_path, config, stored)
    if head == "other":
        with user_error("lm_head.weight is not model.embed_tokens.weight", "tie_word_embeddings", str(tmp_path)):
            load_llama(tmp_path, **FLOAT32)
    else:
        assert_holds(load_llama(tmp_path, **FLOAT32)[0], weights)


# --- containers and wrappers ---

PREFIXES = (
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "_fsdp_wrapped_module.",
    "model.",
    "model._orig_mod.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_that_wrappers_lengthen(tmp_path, prefix):
    save_file({prefix + name: value for name, value in TENSORS.items()}, tmp_path / "model.safetensors")
    assert_opened(tmp_path, "safetensors")


def test_names_that_wrappers_lengthen_inside(tmp_path):
    inside = {name.replace("a.", "a._orig_mod._checkpoint_wrapped_module."): value for name, value in TENSORS.items()}
    save_file(inside | {"x_orig_mod.y": TENSORS["a.bias"]}, tmp_path / "model.safetensors")
    assert_opened(tmp_path, "safetensors", TENSORS | {"x_orig_mod.y": TENSORS["a.bias"]})


def test_names_that_only_look_lengthened(tmp_path):
    """A part of the model may be called module; and two names must not become one."""
    some = {"module.a": np.ones(1), "b": np.ones(1)}
    save_file(some, tmp_path / "some.safetensors")
    assert_opened(tmp_path / "some.safetensors", "safetensors", some)
    own = {"model.embed_tokens.weight": np.ones(1), "model.norm.weight": np.ones(1)}
    save_file(own, tmp_path / "own.safetensors")
    assert_opened(tmp_path / "own.safetensors", "safetensors", own)
    both = {"_orig_mod.a": np.ones(1), "a": np.ones(1)}
    save_file(both, tmp_path / "both.safetensors")
    assert_opened(tmp_path / "both.safetensors", "safetensors", both)


@pytest.mark.parametrize(
    "keys", [["state_dict"], ["model_state_dict"], ["model"], ["module"], ["module", "state_dict"]]
)
def test_containers(tmp_path, keys):
    torch = pytest.importorskip("torch")
    held = {f"module.{name}": torch.from_numpy(value) for name, value in TENSORS.items()}
    for key in keys:
        held = {key: held, "optimizer": {"step": torch.ones(1)}, "epoch": 3}
    torch.save(held, tmp_path / "x.pth")
    assert_opened(tmp_path / "x.pth", "torch")
    outer = list(reversed(keys))
    expected = {"/".join([*outer[:depth], "optimizer/step"]) for depth in range(len(keys))}
    assert set(open_source(tmp_path / "x.pth").outside) == expected


def test_a_container_of_any_name(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"net": {name: torch.from_numpy(x) for name, x in TENSORS.items()}, "epoch": 3}, tmp_path / "x.pth")
    assert_opened(tmp_path / "x.pth", "torch")
    torch.save({"net": {"a": torch.ones(1)}, "optim": {"b": torch.ones(1)}}, tmp_path / "x.pth")
    assert open_source(tmp_path / "x.pth").names() == ["net/a", "optim/b"]


def test_two_models_in_one_file(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({key: {"a": torch.ones(1)} for key in ("model", "state_dict")}, tmp_path / "x.pth")
    with user_error("tensors under state_dict and model", "save the state dict of the model alone"):
        open_source(tmp_path / "x.pth")


# --- objects beside tensors ---


def beside(torch):
    return {
        "best": np.float64(1.5),
        "step": np.int64(3),
        "mean": np.ones(3, np.float32),
        "dtype": np.dtype("float32"),
        "args": argparse.Namespace(out=pathlib.PosixPath("/x"), lr=0.1, seen={1, 2}),
        "when": datetime.datetime(2024, 1, 2),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "size": torch.Size([1, 2]),
        "version": torch.__version__,
        "id": uuid.UUID(int=3),
        "more": types.SimpleNamespace(a=frozenset([1])),
        "zone": datetime.UTC,
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_that_training_scripts_save_are_no_obstacle(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    state = collections.defaultdict(int, {name: torch.from_numpy(value) for name, value in TENSORS.items()})
    torch.save(state | beside(torch), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with open_source(tmp_path / "x.pth") as source:
        assert source.names() == sorted(TENSORS)
        np.testing.assert_array_equal(source.read("a.weight"), TENSORS["a.weight"])
        assert source.extra["args"].lr == 0.1
        assert source.extra["counts/a"] == [1]


class Loud:
    """An object whose making, and whose state, would be noticed."""

    made = 0

    def __init__(self, *arguments):
        Loud.made += 1

    def __setstate__(self, state):
        Loud.made += 1


def test_code_hidden_among_known_objects_never_runs(tmp_path):
    torch = pytest.importorskip("torch")
    bad = argparse.Namespace(inner=[Loud()])
    Loud.made = 0
    torch.save({"a": torch.ones(1), "args": bad, "best": np.float64(1.0)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="refused, nothing was executed: the pickle holds .*Loud"):
        open_source(tmp_path / "x.pth")
    assert Loud.made == 0


def test_a_wrapped_checkpoint_becomes_a_model(tmp_path):
    torch = pytest.importorskip("torch")
    weights = random_weights(CONFIG)
    write_config(tmp_path, CONFIG)
    state = {f"module.{name}": torch.from_numpy(value.copy()) for name, value in weights.items()}
    torch.save({"state_dict": state, "optimizer": {"m": torch.ones(1)}}, tmp_path / "pytorch_model.bin")
    model, report = load_llama(tmp_path, **FLOAT32)
    assert_holds(model, weights)
    assert report.dropped == ("optimizer/m",)


@pytest.mark.parametrize("prefix", ["model.", "model.model.", "", "module."])
def test_a_model_inside_lightnings_module_or_without_a_head(tmp_path, prefix):
    """Tied, so that nothing but the names tells one from the other."""
    config = tiny_config(num_layers=2, tie_embeddings=True)
    weights = random_weights(config)
    write_config(tmp_path, config)
    named = {prefix + name.removeprefix("model."): value for name, value in weights.items()}
    save_file(named, tmp_path / "model.safetensors")
    model, report = load_llama(tmp_path, **FLOAT32)
    assert_holds(model, weights)
    assert report.dropped == ()


def test_a_model_without_a_head_needs_one(tmp_path):
    write_config(tmp_path, CONFIG)
    bare = {n.removeprefix("model."): x for n, x in random_weights(CONFIG).items() if n != "lm_head.weight"}
    save_file(bare, tmp_path / "model.safetensors")
    with user_error("no lm_head", "LlamaModel", "save the LlamaForCausalLM", str(tmp_path)):
        load_llama(tmp_path, **FLOAT32)


@pytest.mark.smoke
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_rotary_factors_of_a_gguf_file(tmp_path, factor):
    weights = random_weights(CONFIG)
    write_gguf(tmp_path / "m.gguf", CONFIG, weights | {"rope_freqs.weight": np.full(12, factor, np.float32)})
    if factor == 1:
        assert_holds(load_llama(tmp_path / "m.gguf", **FLOAT32)[0], weights)
    else:
        with user_error("scaled rotary positions, rope_freqs.weight", "m.gguf"):
            load_llama(tmp_path / "m.gguf", **FLOAT32)
