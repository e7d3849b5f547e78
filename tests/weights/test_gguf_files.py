"""GGUF files that the gguf package itself writes, read back; and damaged or unsupported ones."""

import struct

import gguf
import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.weights.sources import open_source

Kind = gguf.GGMLQuantizationType

METADATA = {
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.chat_template": "{{ grüß }}\n",
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["<s>", "▁a", "é"],
    "tokenizer.ggml.token_type": [3, 1, 1],
}


def write_gguf(path, kinds, shape=(6, 64), endian=gguf.GGUFEndian.LITTLE):
    """One random tensor a type; returns what gguf makes of each."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_string("tokenizer.chat_template", METADATA["tokenizer.chat_template"])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", METADATA["tokenizer.ggml.tokens"])
    writer.add_array("tokenizer.ggml.token_type", METADATA["tokenizer.ggml.token_type"])
    expected = {}
    for kind in kinds:
        stored = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(f"{kind.name}.weight", stored, raw_dtype=kind)
        expected[f"{kind.name}.weight"] = gguf.quants.dequantize(stored, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def fails(path, *words):
    with pytest.raises(UserError) as caught:
        open_source(path)
    message = str(caught.value)
    assert "\n" not in message and path.name in message
    for word in words:
        assert word in message


KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1]


def test_round_trip_of_every_type(tmp_path):
    expected = write_gguf(tmp_path / "m.gguf", KINDS)
    with open_source(tmp_path / "m.gguf") as source:
        assert source.format == "gguf"
        assert source.names() == sorted(expected)
        for name, value in expected.items():
            assert source.shape(name) == (6, 64)
            array = source.read(name)
            assert type(array) is np.ndarray and array.dtype == np.float32 and array.flags.writeable
            np.testing.assert_array_equal(array, value)


def test_long_tensors_are_read_in_pieces(tmp_path):
    expected = write_gguf(tmp_path / "m.gguf", [Kind.Q8_0], shape=(3, 700, 32))
    source = open_source(tmp_path)  # the only GGUF file of a folder
    assert source.shape("Q8_0.weight") == (3, 700, 32)
    np.testing.assert_array_equal(source.read("Q8_0.weight"), expected["Q8_0.weight"])


def test_vectors(tmp_path):
    expected = write_gguf(tmp_path / "m.gguf", [Kind.F32, Kind.F16], shape=(32,))
    source = open_source(tmp_path / "m.gguf")
    for name, value in expected.items():
        assert source.shape(name) == (32,)
        np.testing.assert_array_equal(source.read(name), value)


def test_metadata_is_plain_python(tmp_path):
    write_gguf(tmp_path / "m.gguf", [Kind.F32])
    config = open_source(tmp_path / "m.gguf").config
    assert config["general.architecture"] == "llama"
    for name, value in METADATA.items():
        assert config[name] == value and type(config[name]) is type(value)
    assert all(type(value) is int for value in config["tokenizer.ggml.token_type"])


def test_several_files_in_a_folder(tmp_path):
    write_gguf(tmp_path / "a.gguf", [Kind.F32])
    write_gguf(tmp_path / "b.gguf", [Kind.F32])
    fails(tmp_path, "2 gguf files")


def patch_type(path, name, number):
    """Overwrite the type of a two-dimensional tensor in the file's table."""
    data = path.read_bytes()
    at = data.index(name.encode()) + len(name) + 4 + 2 * 8
    path.write_bytes(data[:at] + struct.pack("<I", number) + data[at + 4 :])


def test_unsupported_type_names_tensor_type_and_remedy(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, [Kind.F32, Kind.Q8_0])
    patch_type(path, "Q8_0.weight", Kind.I8)  # of one byte, so that the sizes still fit
    fails(path, "I8", "Q8_0.weight", "use another")


def test_unknown_type(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, [Kind.F32])
    patch_type(path, "F32.weight", 9999)
    fails(path, "does not know", "Q8_0")


def test_big_endian(tmp_path):
    write_gguf(tmp_path / "m.gguf", [Kind.F32], endian=gguf.GGUFEndian.BIG)
    fails(tmp_path / "m.gguf", "big-endian")


def write_part(folder, number, count, tensors, **fields):
    """Part `number`, from 1, of a split file; the first has the metadata."""
    writer = gguf.GGUFWriter(folder / f"m-{number:05d}-of-{count:05d}.gguf", "llama")
    writer.add_uint16("split.no", number - 1)
    writer.add_uint16("split.count", count)
    for name, value in fields.items():
        writer.add_uint32(name, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_split_file_is_one(tmp_path):
    """Found by its folder or by any of its parts."""
    tensors = {name: np.full((2, 2), i, np.float32) for i, name in enumerate("abc")}
    for number, names in enumerate(["a", "bc"], 1):
        fields = {"llama.block_count": 7, "split.tensors.count": 3} if number == 1 else {}
        write_part(tmp_path, number, 2, {name: tensors[name] for name in names}, **fields)
    for path in (tmp_path, tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"):
        source = open_source(path)
        assert (source.format, source.config["llama.block_count"]) == ("gguf", 7)
        assert source.names() == ["a", "b", "c"]
        for name, value in tensors.items():
            np.testing.assert_array_equal(source.read(name), value)


@pytest.mark.parametrize("fault", ["missing", "renamed", "swapped", "lost"])
def test_a_split_file_that_is_not_whole(tmp_path, fault):
    one = {"a": np.ones((2, 2), np.float32)}
    write_part(tmp_path, 1, 2, one, **{"split.tensors.count": 3 if fault == "lost" else 2})
    write_part(tmp_path, 2, 2, {"b": one["a"]})
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    match fault:
        case "missing":
            second.unlink()
        case "renamed":
            first = first.rename(tmp_path / "m.gguf")
        case "swapped":
            second.write_bytes(first.read_bytes())
    words = {
        "missing": ["1 of 2 parts are missing", second.name, "copy them too"],
        "renamed": ["one of 2 parts of a GGUF file", "00001-of-00002.gguf again"],
        "swapped": ["not part 2 of 2", second.name],
        "lost": ["not a GGUF file, or damaged"],
    }
    with pytest.raises(UserError) as caught:
        open_source(first)
    assert all(word in str(caught.value) for word in words[fault]), caught.value


def test_not_gguf_and_reversed(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, [Kind.F32])
    data = path.read_bytes()
    path.write_bytes(data[:4][::-1] + data[4:])
    fails(path, "not a GGUF file", "again")


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_truncated(tmp_path, fraction):
    path = tmp_path / "m.gguf"
    write_gguf(path, [Kind.F32, Kind.Q8_0])
    data = path.read_bytes().rstrip(b"\0")  # the padding at the end may go
    path.write_bytes(data[: int(len(data) * fraction)])
    fails(path, "again")


def test_a_flipped_header_byte_never_escapes_as_another_error(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, [Kind.F32, Kind.Q8_0])
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        bad = bytearray(data)
        bad[rng.integers(600)] = rng.integers(256)
        path.write_bytes(bad)
        try:
            source = open_source(path)
            [source.read(name) for name in source.names()]
        except UserError as error:
            assert "\n" not in str(error)
