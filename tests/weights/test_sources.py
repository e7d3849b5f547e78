"""Safetensors, torch and Flax weights written by their own libraries and read back; every bad input is one line."""

import fractions
import json
import pickle
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from emollama_jax.errors import UserError
from emollama_jax.weights.safetensors_files import write_safetensors_folder
from emollama_jax.weights.sources import open_source

DTYPES = ["float32", "float16", "float64", "bfloat16", "int8", "uint8", "int16", "int32", "int64", "bool"]


def mixed_tensors():
    """A tensor of every dtype, a scalar and an empty one."""
    rng = np.random.default_rng(0)
    tensors = {f"layers.{i}.{name}": rng.integers(0, 2, (3, 5)).astype(name) for i, name in enumerate(DTYPES)}
    tensors["embed.weight"] = rng.normal(size=(7, 4)).astype(np.float32)
    tensors["norm.weight"] = rng.normal(size=9).astype(ml_dtypes.bfloat16)
    tensors["scalar"] = np.array(3.5, np.float32)
    tensors["empty"] = np.zeros((0, 4), np.float16)
    return tensors


def assert_same(source, tensors):
    assert source.names() == sorted(tensors)
    for name, expected in tensors.items():
        assert source.shape(name) == expected.shape
        array = source.read(name)
        assert isinstance(array, np.ndarray) and array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def fails(path, *words, file=None):
    """Opening fails with one line that names the file and holds the words."""
    with pytest.raises(UserError) as caught:
        open_source(path)
    message = str(caught.value)
    assert "\n" not in message and (file or path.name) in message
    for word in words:
        assert word in message


# --- safetensors, reading and writing ---


def test_safetensors_file_and_folder(tmp_path):
    tensors = mixed_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with open_source(path) as source:
            assert (source.format, source.path, source.config) == ("safetensors", path, {"hidden_size": 8})
            assert_same(source, tensors)
    assert source.names() == []  # closed


def test_the_only_safetensors_file_of_a_folder_may_have_any_name(tmp_path):
    save_file(mixed_tensors(), tmp_path / "ln_vision.safetensors")
    source = open_source(str(tmp_path))
    assert_same(source, mixed_tensors())
    assert source.config is None


def test_unknown_name_is_a_key_error(tmp_path):
    save_file(mixed_tensors(), tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    with pytest.raises(KeyError):
        source.read("nothing")
    with pytest.raises(KeyError):
        source.shape("nothing")


def test_written_folder_of_one_shard(tmp_path):
    tensors = mixed_tensors()
    write_safetensors_folder(tmp_path, tensors.items())
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(open_source(tmp_path), tensors)
    assert safe_open(tmp_path / "model.safetensors", framework="numpy").metadata() == {"format": "pt"}


def test_written_folder_of_several_shards(tmp_path):
    tensors = mixed_tensors()
    write_safetensors_folder(tmp_path, iter(tensors.items()), max_shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [*shards, "model.safetensors.index.json"]
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    for shard in shards:
        held = load_file(tmp_path / shard)
        assert sum(array.nbytes for array in held.values()) <= 100 or len(held) == 1
        assert safe_open(tmp_path / shard, framework="numpy").metadata() == {"format": "pt"}
    assert_same(open_source(tmp_path), tensors)
    assert_same(open_source(tmp_path / "model.safetensors.index.json"), tensors)


def test_writer_takes_any_memory_layout(tmp_path):
    square = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {"t": square.T, "step": square[:, ::2], "big": square.astype(">f4")}
    write_safetensors_folder(tmp_path, tensors.items())
    assert_same(open_source(tmp_path), {"t": square.T, "step": square[:, ::2], "big": square})


@pytest.mark.slow
def test_writer_keeps_no_earlier_shard(tmp_path):
    alive = []

    class Tracked(np.ndarray):
        pass

    def stream():
        import gc
        import weakref

        for i in range(6):
            array = np.full((4,), i, np.float32).view(Tracked)
            alive.append(weakref.ref(array.base))
            yield f"t{i}", array
            del array
            gc.collect()
            assert sum(reference() is not None for reference in alive) <= 2

    write_safetensors_folder(tmp_path, stream(), max_shard_bytes=16)
    assert len(open_source(tmp_path).names()) == 6


def test_written_files_are_as_readable_as_others(tmp_path):
    write_safetensors_folder(tmp_path, mixed_tensors().items())
    (tmp_path / "other").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_writer_refuses_a_name_twice(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        write_safetensors_folder(tmp_path, [("a", np.ones(2)), ("a", np.ones(2))])


def test_transformers_reads_the_written_folder(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    config.save_pretrained(tmp_path)
    write_safetensors_folder(tmp_path, state.items(), max_shard_bytes=4000)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


# --- bad safetensors and indexes ---


def sharded(folder):
    write_safetensors_folder(folder, mixed_tensors().items(), max_shard_bytes=100)
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("size", [4, 30, -1])
def test_truncated_safetensors(tmp_path, size):
    path = tmp_path / "model.safetensors"
    save_file(mixed_tensors(), path)
    path.write_bytes(path.read_bytes()[:size])
    fails(path, "download or copy it again")
    fails(tmp_path, "download or copy it again", file="model.safetensors")


def test_safetensors_take_address_space_for_one_tensor_at_a_time(tmp_path):
    save_file(mixed_tensors(), tmp_path / "model.safetensors")
    with open_source(tmp_path) as source:
        kept = source.read(source.names()[0])
        if (maps := Path("/proc/self/maps")).exists():
            assert str(tmp_path) not in maps.read_text()
        (tmp_path / "model.safetensors").unlink()  # as of a copy out of an object store
        assert_same(source, mixed_tensors())
    assert np.array_equal(kept, mixed_tensors()[sorted(mixed_tensors())[0]])


def test_unsupported_safetensors_dtype(tmp_path):
    save_file({"w": np.ones(4, ml_dtypes.float8_e4m3fn)}, tmp_path / "model.safetensors")
    fails(tmp_path / "model.safetensors", "F8_E4M3", "tensor w", "bfloat16")


def test_missing_shard(tmp_path):
    sharded(tmp_path)
    gone = next(tmp_path.glob("model-00002*"))
    gone.unlink()
    fails(tmp_path, "1 of", "missing", "copy", file=gone.name)


def test_truncated_shard(tmp_path):
    sharded(tmp_path)
    shard = next(tmp_path.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    fails(tmp_path, "again", file=shard.name)


def test_index_names_a_tensor_that_its_shard_lacks(tmp_path):
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = content["weight_map"]["scalar"]
    index.write_text(json.dumps(content))
    fails(tmp_path, "ghost", index.name, "again", file=content["weight_map"]["scalar"])


def test_tensor_that_the_index_does_not_mention_is_offered(tmp_path):
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    del content["weight_map"]["layers.0.float32"]
    index.write_text(json.dumps(content))
    assert_same(open_source(tmp_path), mixed_tensors())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\xff"])
def test_bad_index(tmp_path, text):
    index = sharded(tmp_path)
    index.write_bytes(text.encode("latin-1"))
    fails(tmp_path, "again", file=index.name)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_bad_config(tmp_path, text):
    save_file(mixed_tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    fails(tmp_path, file="config.json")


def test_shards_without_index(tmp_path):
    sharded(tmp_path).unlink()
    fails(tmp_path, "safetensors files", "index")


# --- finding the weights ---


def test_preferred_format(tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize({"a": np.ones(1)}))
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert open_source(tmp_path).format == "flax"
    (tmp_path / "training_args.bin").write_bytes(b"x")
    assert open_source(tmp_path).format == "flax"
    save_file({"b": np.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert open_source(tmp_path).format == "safetensors"


def test_format_is_told_from_the_content(tmp_path):
    save_file({"a": np.ones(1)}, tmp_path / "weights.bin")
    assert open_source(tmp_path / "weights.bin").format == "safetensors"


def test_missing_path(tmp_path):
    fails(tmp_path / "nowhere", "no such file or folder")


def test_empty_folder(tmp_path):
    fails(tmp_path, "no weights", "model.safetensors")


def test_empty_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    fails(tmp_path / "model.safetensors", "empty", "again")


def test_unknown_kind(tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    fails(tmp_path / "weights.h5", "known kind", ".safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "flax_model.msgpack", "m.gguf"])
def test_git_lfs_pointer(tmp_path, name):
    (tmp_path / name).write_bytes(b"version https://git-lfs" + b".example/spec/v1\noid sha256:0\nsize 99\n")
    fails(tmp_path, "git-lfs pointer", "git lfs pull", file=name)


def test_git_lfs_pointer_as_shard(tmp_path):
    sharded(tmp_path)
    shard = next(tmp_path.glob("model-00001*"))
    shard.write_bytes(b"version https://git-lfs" + b".example/spec/v1\n")
    fails(tmp_path, "git-lfs pointer", file=shard.name)


# --- torch ---


def as_torch(torch, array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    tensors = mixed_tensors()
    state = {name: as_torch(torch, array) for name, array in tensors.items()}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        source = open_source(path)
        assert source.format == "torch"
        assert_same(source, tensors)


def test_torch_views_parameters_and_ties(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(12.0).reshape(3, 4)
    state = {"t": base.T, "half": base.T.bfloat16(), "tied": base, "p": torch.nn.Parameter(base[1])}
    torch.save(state, tmp_path / "x.pth")
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = {"t": value.T, "half": value.T.astype(ml_dtypes.bfloat16), "tied": value, "p": value[1]}
    assert_same(open_source(tmp_path / "x.pth"), expected)


def test_torch_checkpoint_is_flattened(tmp_path):
    torch = pytest.importorskip("torch")
    one = torch.ones(2)
    optimizer = {"state": {0: {"exp_avg": one}}, "param_groups": [{"lr": 0.1}]}
    torch.save(
        {
            "model": {"a.weight": one, "a.bias": one},
            "optimizer": optimizer,
            "config": {"run": {"seed": 42}},
            "epoch": 7,
        },
        tmp_path / "checkpoint_7.pth",
    )
    source = open_source(tmp_path / "checkpoint_7.pth")
    assert source.names() == ["a.bias", "a.weight"]
    assert source.outside == ("optimizer/state/0/exp_avg",)
    assert source.extra == {"optimizer/param_groups": [{"lr": 0.1}], "config/run/seed": 42, "epoch": 7}


def test_reading_a_torch_array_never_changes_the_file(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(4)}, tmp_path / "x.pth")
    before = (tmp_path / "x.pth").read_bytes()
    open_source(tmp_path / "x.pth").read("a")[:] = 5
    assert (tmp_path / "x.pth").read_bytes() == before


def test_torch_shards(tmp_path):
    torch = pytest.importorskip("torch")
    shards = [{"a": torch.ones(2), "b": torch.zeros(3)}, {"c": torch.full((2, 2), 7.0)}]
    names = [f"pytorch_model-{i:05d}-of-00002.bin" for i in (1, 2)]
    for name, shard in zip(names, shards, strict=True):
        torch.save(shard, tmp_path / name)
    weight_map = {"a": names[0], "b": names[0], "c": names[1]}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    expected = {name: tensor.numpy() for shard in shards for name, tensor in shard.items()}
    assert_same(open_source(tmp_path), expected)
    (tmp_path / names[1]).unlink()
    fails(tmp_path, "missing", file=names[1])


def test_torch_model_folder(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path, safe_serialization=False, max_shard_size="4KB")
    if not (tmp_path / "pytorch_model.bin.index.json").exists():
        pytest.skip("this transformers writes no .bin files")
    source = open_source(tmp_path)
    assert source.config["hidden_size"] == 16
    expected = {n: t.view(-1).float().numpy().astype(ml_dtypes.bfloat16) for n, t in model.state_dict().items()}
    assert source.names() == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(source.read(name).reshape(-1), array)


class Evil:
    """Unpickled with Python's own pickle, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle2", "pickle4"])
def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path, how):
    torch = pytest.importorskip("torch")
    path, mark = tmp_path / "evil.pth", tmp_path / "executed"
    content = {"a": torch.ones(2), "b": Evil(mark)}
    if how.startswith("pickle"):
        path.write_bytes(pickle.dumps({"b": Evil(mark)}, protocol=int(how[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    fails(path, "refused", "nothing was executed", "safetensors")
    assert not mark.exists()


def test_refusal_names_the_culprit(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"model": {"a": torch.ones(2)}, "lr": fractions.Fraction(1, 2)}, tmp_path / "odd.pth")
    fails(tmp_path / "odd.pth", "fractions.Fraction")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("size", [4, 40, -20])
def test_truncated_torch(tmp_path, zipped, size):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(30)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:size])
    fails(path, "again")


def test_other_zip_archive_and_text(tmp_path):
    pytest.importorskip("torch")
    np.savez(tmp_path / "x.npz", a=np.ones(2))
    fails(tmp_path / "x.npz", "not a torch checkpoint")
    (tmp_path / "x.bin").write_text("hello")
    fails(tmp_path / "x.bin")


def test_torch_file_without_dict(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save([torch.ones(2)], tmp_path / "x.pt")
    fails(tmp_path / "x.pt", "a list", "state_dict")


def test_unreadable_torch_tensor(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "x.pt")
    fails(tmp_path / "x.pt", "tensor w", "float8_e4m3fn", "bfloat16")


def test_torch_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(50))
    fails(tmp_path, "pip install 'emollama_jax[convert]'", file="pytorch_model.bin")


# --- Flax ---


def as_tree(tensors):
    tree = {}
    for name, array in tensors.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return tree


def test_flax_file_and_folder(tmp_path):
    tensors = mixed_tensors()
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(as_tree(tensors)))
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    for path in (tmp_path, tmp_path / "flax_model.msgpack"):
        source = open_source(path)
        assert (source.format, source.config) == ("flax", {"hidden_size": 8})
        assert_same(source, {name.replace(".", "/"): array for name, array in tensors.items()})
    assert source.read("embed/weight").flags.writeable and source.read("embed/weight").flags.aligned


@pytest.mark.parametrize("size", [1, 3, 200, 300, 70_000])
def test_flax_payload_sizes(tmp_path, size):
    """Every width of msgpack's length fields, and wide and long maps."""
    tree = {"a": np.arange(size, dtype=np.uint8), **{f"k{i}": np.float32(i) for i in range(20)}}
    (tmp_path / "m.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    assert_same(open_source(tmp_path), {name: np.asarray(array) for name, array in tree.items()})


def test_flax_chunked_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)
    big = np.random.default_rng(0).normal(size=(11, 13)).astype(ml_dtypes.bfloat16)
    tree = {"model": {"embed": {"embedding": big}, "norm": {"scale": np.ones(3, np.float32)}}}
    data = serialization.msgpack_serialize(tree)
    assert b"__msgpack_chunked_array__" in data
    (tmp_path / "flax_model.msgpack").write_bytes(data)
    assert_same(open_source(tmp_path), {"model/embed/embedding": big, "model/norm/scale": np.ones(3, np.float32)})


def test_flax_values_beside_tensors(tmp_path):
    (tmp_path / "m.msgpack").write_bytes(serialization.msgpack_serialize({"a": np.ones(2), "step": 3, "note": "x"}))
    assert open_source(tmp_path).extra == {"step": 3, "note": "x"}


def test_flax_shards_as_transformers_writes_them(tmp_path):
    """Its shards are flat maps whose keys hold the slashes."""
    shards = [{"model/a/kernel": np.ones((2, 3), np.float32)}, {"model/b/kernel": np.zeros(4, ml_dtypes.bfloat16)}]
    names = [f"flax_model-{i:05d}-of-00002.msgpack" for i in (1, 2)]
    for name, shard in zip(names, shards, strict=True):
        (tmp_path / name).write_bytes(serialization.msgpack_serialize(shard))
    weight_map = {"model/a/kernel": names[0], "model/b/kernel": names[1]}
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(open_source(tmp_path), shards[0] | shards[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_flax_llama_folder(tmp_path, max_shard_size):
    transformers = pytest.importorskip("transformers")
    try:
        flax_llama = transformers.FlaxLlamaForCausalLM
    except AttributeError:
        pytest.skip("this transformers has no Flax models")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = flax_llama(config)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "flax_model.msgpack.index.json").exists() == (max_shard_size == "20KB")
    from flax.traverse_util import flatten_dict

    expected = {name: np.asarray(array) for name, array in flatten_dict(model.params, sep="/").items()}
    assert "model/layers/0/self_attn/q_proj/kernel" in expected
    assert_same(open_source(tmp_path), expected)


@pytest.mark.parametrize("size", [1, 2, 10, 20, 100, -1])
def test_truncated_flax(tmp_path, size):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(serialization.msgpack_serialize(as_tree(mixed_tensors()))[:size])
    fails(path, "again")


def test_msgpack_with_more_behind_it(tmp_path):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(serialization.msgpack_serialize({"a": np.ones(2)}) + b"x")
    fails(path, "again")


@pytest.mark.slow
def test_a_flipped_msgpack_byte_never_escapes_as_another_error(tmp_path):
    path = tmp_path / "flax_model.msgpack"
    data = serialization.msgpack_serialize(as_tree(mixed_tensors()))
    rng = np.random.default_rng(0)
    for _ in range(500):
        bad = bytearray(data)
        bad[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(bad)
        try:
            source = open_source(path)
            [source.read(name) for name in source.names()]
        except UserError as error:
            assert "\n" not in str(error)
