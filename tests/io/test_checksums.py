"""Checksums of files: right, read once, read again when the file changes."""

import hashlib
import os
import shutil

import pytest

from emollama_jax.io import checksums
from emollama_jax.io.checksums import bytes_read, file_digest


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("size", [0, 1, (1 << 22) + 1])
def test_the_digest_is_that_of_the_bytes_and_read_once(tmp_path, size):
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    (tmp_path / "file").write_bytes(data)
    before = bytes_read()
    assert file_digest(tmp_path / "file") == file_digest(str(tmp_path / "file")) == sha256(data)
    assert bytes_read() - before == size


def test_a_changed_file_is_read_again(tmp_path):
    file = tmp_path / "file"
    for number in range(50):  # of one size, as fast as they can be written
        file.write_bytes(bytes([number]))
        assert file_digest(file) == sha256(bytes([number]))


def test_a_file_whose_time_was_put_back_is_read_again(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    found = file.stat()
    assert file_digest(file) == sha256(b"one")
    file.write_bytes(b"two")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert file_digest(file) == sha256(b"two")


def test_another_file_in_its_place_is_read(tmp_path):
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_bytes(b"one")
    assert file_digest(file) == sha256(b"one")
    other.write_bytes(b"two")
    shutil.copystat(file, other)
    other.replace(file)
    assert file_digest(file) == sha256(b"two")


@pytest.mark.smoke
def test_the_digests_of_large_files_are_kept_for_other_processes(tmp_path, monkeypatch):
    file, kept = tmp_path / "file", tmp_path / "cache/digests.jsonl"
    monkeypatch.setattr(checksums, "KEPT", kept)
    monkeypatch.setattr(checksums, "KEPT_FROM", 3)

    def another_process():
        monkeypatch.setattr(checksums, "_digests", None)
        before = bytes_read()
        digest = file_digest(file)
        return digest, bytes_read() - before

    file.write_bytes(b"ab")
    assert [another_process()[1] for _ in range(2)] == [2, 2]
    file.write_bytes(b"abc")
    assert another_process() == (sha256(b"abc"), 3)
    kept.write_bytes(b"{\n" + kept.read_bytes() + b'{"version": 1')  # two lines that were cut short
    assert another_process() == (sha256(b"abc"), 0)
    before = bytes_read()
    assert file_digest(file, anew=True) == sha256(b"abc") and bytes_read() - before == 3
    file.write_bytes(b"abd")
    assert another_process() == (sha256(b"abd"), 3)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "missing")
