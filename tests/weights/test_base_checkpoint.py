"""Base checkpoints: written, read back, put on a mesh, and damaged in every file."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.config import DEFAULT_SHARDING
from emollama_jax.io.file_list import write_file_list
from emollama_jax.models.llama import Llama
from emollama_jax.models.lora import LoRAConfig, is_adapter
from emollama_jax.sharding import make_mesh
from emollama_jax.text.tokenizers import load_tokenizer
from emollama_jax.weights import base_checkpoint, engine
from emollama_jax.weights.base_checkpoint import fingerprint_of, is_base_checkpoint, read_manifest, save_base
from emollama_jax.weights.convert import write_base_from
from emollama_jax.weights.pretrained import load_base_tokenizer, load_llama
from emollama_jax.weights.sources import open_source
from tests.weights.older_base import as_older_base
from tests.weights.tiny import (
    FLOAT32,
    REFERENCE,
    assert_bit_equal,
    logits_of,
    random_weights,
    save_flax,
    stored_values,
    tiny_config,
    user_error,
    write_config,
    write_folder,
    write_gguf,
)

KERNELS = ("float32", "bfloat16", "int8", "nf4")
LORA = LoRAConfig(rank=4, targets=("k_proj", "down_proj"))
CONFIG = tiny_config(num_layers=2)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By the storage of the kernels: (folder, model that was saved, fingerprint). Tests only look at them."""
    where = tmp_path_factory.mktemp("bases")
    weights = write_folder(where / "hf", CONFIG, random_weights(CONFIG))
    made = {}
    for dtype in KERNELS:
        floats = "bfloat16" if dtype == "bfloat16" else "float32"
        model, _ = load_llama(weights, kernel_dtype=dtype, param_dtype=floats, compute_dtype="float32", remat="none")
        (where / dtype).mkdir()
        made[dtype] = where / dtype, model, save_base(where / dtype, model, source="tiny")
    return made


@pytest.fixture
def damaged(bases, tmp_path):
    """A copy of the int8 checkpoint, for a test to spoil."""
    return shutil.copytree(bases["int8"][0], tmp_path / "base")


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", KERNELS)
def test_round_trip(bases, dtype):
    folder, model, fingerprint = bases[dtype]
    assert is_base_checkpoint(folder)
    manifest = read_manifest(folder)
    assert (manifest["fingerprint"], manifest["source"], manifest["format"]) == (fingerprint, "tiny", 3)
    assert manifest["llama"] == dataclasses.replace(model.config, attention="auto")  # the devices' business
    again, report = load_llama(folder)
    assert again.config == model.config
    assert set(report.read) == set(stored_values(model))
    assert (report.dropped, report.initialised) == ((), ())
    assert_bit_equal(stored_values(again), stored_values(model))
    np.testing.assert_array_equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("dtype", KERNELS)
def test_onto_a_mesh(bases, dtype):
    folder, model, _ = bases[dtype]
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices()[:8])
    again, _ = load_llama(folder, mesh=mesh, rules=DEFAULT_SHARDING)
    assert_bit_equal(stored_values(again), stored_values(model))
    for path, value in stored_values(again).items():
        for leaf in jax.tree.leaves(value):
            assert len(leaf.sharding.device_set) == 8, path
    down = jax.tree.leaves(stored_values(again)["layers.mlp.down_proj.kernel"])[0]
    assert {shard.data.shape for shard in down.addressable_shards} == {(2, 64, 32)}
    assert {shard.data.shape for shard in again.embed.embedding[...].addressable_shards} == {(320, 32)}


def test_new_adapters_come_from_the_seed(bases):
    """On one device and on a mesh."""
    folder, model, _ = bases["bfloat16"]
    new = stored_values(Llama(model.config, LORA, rngs=nnx.Rngs(5)))
    adapters = {path for path in new if "lora_" in path}
    assert len(adapters) == 4
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices()[:8])
    for places in ({}, {"mesh": mesh, "rules": DEFAULT_SHARDING}):
        again, report = load_llama(folder, lora=LORA, seed=5, **places)
        values = stored_values(again)
        assert set(report.initialised) == adapters
        assert_bit_equal({p: values[p] for p in adapters}, {p: new[p] for p in adapters})
        assert_bit_equal({p: values[p] for p in set(values) - adapters}, stored_values(model))


def test_adapters_are_not_saved(bases, tmp_path):
    folder, _, fingerprint = bases["float32"]
    model, _ = load_llama(folder, lora=LORA)
    assert save_base(tmp_path, model, source="with adapters") == fingerprint
    assert not nnx.state(load_llama(tmp_path)[0], is_adapter)


# --- other dtypes ---


@pytest.mark.parametrize(
    ("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16")]
)
def test_floats_are_cast(bases, stored, wanted):
    folder, model, _ = bases[stored]
    again, _ = load_llama(folder, kernel_dtype=wanted, param_dtype=wanted)
    expected = {path: value.astype(wanted) for path, value in stored_values(model).items()}
    assert_bit_equal(stored_values(again), expected)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_quantised_kernels_keep_their_scales_when_the_rest_is_cast(bases, dtype):
    folder, model, _ = bases[dtype]
    again, _ = load_llama(folder, param_dtype="bfloat16")
    for path, value in stored_values(model).items():
        quantised = "_proj" in path
        expected = value if quantised else value.astype(jnp.bfloat16)
        assert_bit_equal({path: stored_values(again)[path]}, {path: expected})


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("int8", "nf4"), ("nf4", "int8"), ("int8", "float32"), ("nf4", "bfloat16"), ("float32", "nf4")],
)
def test_kernels_that_cannot_be_had(bases, stored, wanted):
    folder, _, _ = bases[stored]
    with user_error(f"holds {stored} kernels, not {wanted}", str(folder), f"--kernel-dtype {wanted}"):
        load_llama(folder, kernel_dtype=wanted)


def test_execution_fields_are_the_callers(bases):
    model, _ = load_llama(bases["int8"][0], compute_dtype="bfloat16", remat="full", scan_layers=False)
    assert (model.config.compute_dtype, model.config.remat, model.config.scan_layers) == ("bfloat16", "full", False)
    assert model.config.kernel_dtype == "int8"


# --- fingerprints ---


def test_fingerprint_does_not_depend_on_the_format(bases, tmp_path):
    weights = random_weights(CONFIG)
    write_config(tmp_path / "flax", CONFIG)
    save_flax(weights, tmp_path / "flax/flax_model.msgpack")
    write_gguf(tmp_path / "tiny.gguf", CONFIG, weights)
    prints = {bases["float32"][2]}
    for where in ("flax", "tiny.gguf"):
        model, _ = load_llama(tmp_path / where, **FLOAT32)
        (tmp_path / f"base {where}").mkdir()
        prints.add(save_base(tmp_path / f"base {where}", model, source=where))
    assert len(prints) == 1
    assert next(iter(prints)).startswith("sha256:")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_fingerprint_tells_any_number(bases, dtype):
    """One number of any parameter, by the smallest step there is; and which layer holds which numbers."""
    _, model, fingerprint = bases[dtype]
    values = stored_values(model)
    assert fingerprint_of(values) == fingerprint
    prints = [fingerprint]
    for path in values:
        leaves, tree = jax.tree.flatten(values[path])
        for i, leaf in enumerate(leaves):
            array = np.array(leaf)
            array.flat[-1] = array.flat[-1] ^ 1 if array.dtype == np.int8 else np.nextafter(array.flat[-1], np.inf)
            prints.append(fingerprint_of(values | {path: tree.unflatten([*leaves[:i], array, *leaves[i + 1 :]])}))
            if path.startswith("layers"):
                turned = tree.unflatten([*leaves[:i], np.array(leaf)[::-1], *leaves[i + 1 :]])
                prints.append(fingerprint_of(values | {path: turned}))
    assert len(set(prints)) == len(prints) > 20


def test_fingerprint_tells_dtypes_and_names(bases):
    assert len({fingerprint for _, _, fingerprint in bases.values()}) == len(bases)
    zeros = {"a": np.zeros((2, 2), np.float32), "b": np.zeros((2, 2), np.float32)}
    variants = [zeros, zeros | {"a": np.zeros((2, 2), np.int32)}, zeros | {"a": np.zeros((4, 1), np.float32)}]
    variants += [{"a": zeros["a"]}, {"a": zeros["a"], "c": zeros["b"]}]
    assert len({fingerprint_of(values) for values in variants}) == len(variants)
    assert fingerprint_of(dict(reversed(zeros.items()))) == fingerprint_of(zeros)


# --- damage ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m | {"format": 4}, ["format 4, not 3"]),
        (lambda m: {k: v for k, v in m.items() if k != "format"}, ["damaged", "'format'"]),
        (lambda m: {k: v for k, v in m.items() if k != "llama"}, ["damaged", "llama"]),
        (lambda m: {k: v for k, v in m.items() if k != "fingerprint"}, ["damaged", "fingerprint"]),
        (lambda m: m | {"llama": m["llama"] | {"new_field": 1}}, ["damaged", "new_field"]),
        (lambda m: m | {"llama": m["llama"] | {"num_layers": 0}}, ["damaged", "num_layers"]),
        (lambda m: m | {"llama": m["llama"] | {"num_heads": 3}}, ["damaged"]),
        (lambda m: m | {"llama": None}, ["damaged"]),
        (lambda m: [m], ["damaged"]),
        (lambda m: None, ["damaged"]),
    ],
)
def test_damaged_manifest(damaged, change, words):
    file = damaged / "model.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with user_error(str(file), "again", *words):
        load_llama(damaged)


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 2', b"\xff\xfe\x00"])
def test_manifest_that_is_no_json(damaged, content):
    (damaged / "model.json").write_bytes(content)
    with user_error(str(damaged / "model.json"), "damaged", "again"):
        load_llama(damaged)


def test_manifest_of_another_model(damaged):
    file = damaged / "model.json"
    manifest = json.loads(file.read_text())
    manifest["llama"]["num_layers"] = 3
    file.write_text(json.dumps(manifest))
    with user_error("damaged", str(damaged), "model.json is not what was written", "again"):
        load_llama(damaged)


def test_folder_without_parameters(damaged):
    shutil.rmtree(damaged / "params")
    with user_error("damaged", str(damaged), "no params/", "again"):
        load_llama(damaged)


def test_no_damaged_file_is_loaded(damaged):
    """Every file in turn, the tokenizer's too: one bit changed, cut short, emptied and removed."""
    load = lambda: (load_llama(damaged), load_base_tokenizer(damaged, CONFIG.vocab_size))
    (damaged / "files.json").unlink()
    load_tokenizer(REFERENCE).save(damaged)
    write_file_list(damaged)
    load()
    of_one = "layers.attn.q_proj.kernel"  # the folders of the other parameters are alike
    files = [file for file in damaged.rglob("*") if file.is_file()]
    files = [file for file in files if {"params", of_one} & {*file.relative_to(damaged).parts} != {"params"}]
    assert {"params", "model.json", "tokenizer.model"} <= {file.relative_to(damaged).parts[0] for file in files}
    for file in files:
        content = file.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 0x40]) + content[middle + 1 :]
        for kept in (flipped, content[:middle], b"", None):
            if kept is None:
                file.unlink()
            else:
                file.write_bytes(kept)
            words = ["again"] if kept is not None or file.name != "model.json" else []  # else it is no base checkpoint
            with user_error(str(damaged), *words):
                load()
            file.write_bytes(content)
    load()


@pytest.mark.parametrize("format", [1, 2])
@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_an_older_checkpoint_is_loaded(bases, tmp_path, caplog, format, dtype):
    """The first ones have no list of files, and cannot be checked."""
    folder, model, _ = bases[dtype]
    older = shutil.copytree(folder, tmp_path / "older")
    as_older_base(older, format)
    assert_bit_equal(stored_values(load_llama(older)[0]), stored_values(model))
    assert ("which cannot be checked" in caplog.text and str(older) in caplog.text) == (format == 1)


def test_a_checkpoint_is_written_and_read_one_parameter_at_a_time(tmp_path, monkeypatch):
    """Of a stream of parameters each is made after the one before has been written; the result is the whole model's."""
    weights = write_folder(tmp_path / "hf", CONFIG, random_weights(CONFIG))
    load_tokenizer(REFERENCE).save(weights)
    model, _ = load_llama(weights, kernel_dtype="int8", param_dtype="float32")
    written, read, made = [], [], []

    def record(log, function):
        return lambda folder, arrays, **options: (log.append(sorted(arrays)), function(folder, arrays, **options))[1]

    monkeypatch.setattr(base_checkpoint, "save_arrays", record(written, base_checkpoint.save_arrays))
    monkeypatch.setattr(base_checkpoint, "restore_arrays", record(read, base_checkpoint.restore_arrays))
    fill = engine._fill
    monkeypatch.setattr(engine, "_fill", lambda *given: (made.append(len(written)), fill(*given))[1])
    (tmp_path / "base").mkdir()
    with open_source(weights) as source:
        storage = {"dtype": "float32", "kernel_dtype": "int8"}
        fingerprint = write_base_from(source, tmp_path / "base", **storage, name="tiny")
    assert made == list(range(len(written)))
    assert fingerprint == fingerprint_of(stored_values(model))
    assert_bit_equal(stored_values(load_llama(tmp_path / "base")[0]), stored_values(model))
    assert sorted(written) == sorted(read) == [[name] for name in sorted(stored_values(model))]
