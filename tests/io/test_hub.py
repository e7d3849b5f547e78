"""Downloads from a hub on loopback: whole, or an error in one line and nothing that could be taken for whole."""

import os
import re
import resource
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from emollama_jax.errors import UserError
from emollama_jax.io.hub import RemoteFile, download_all, list_files
from tests.hub.fake_hub import COMMIT, FakeHub, Fault, hub  # noqa: F401

LARGE = bytes(range(256)) * 4000
FILES = {"config.json": b'{"a": 1}', "model.safetensors": LARGE}
REPO = "org/model"
VERSION = tuple(map(int, huggingface_hub.__version__.split(".")[:2]))


@pytest.fixture
def model(hub, monkeypatch) -> FakeHub:  # noqa: F811
    hub.models[REPO] = dict(FILES)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    sleep = lambda seconds: hub.asked.append(("", "sleep", str(seconds), "", ""))
    for module in ("emollama_jax.io.hub", "huggingface_hub.utils._http"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(**{**vars(time), "sleep": sleep}))
    return hub


def fetch(folder, repo=REPO, revision="main", on_bytes=lambda count: None):
    commit, files = list_files(repo, revision)
    assert commit == COMMIT
    download_all(files, folder, on_bytes)


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_files_come_whole_and_are_counted(model, tmp_path):
    counted = []
    fetch(tmp_path / "model", on_bytes=counted.append)
    assert content(tmp_path / "model") == FILES
    assert sum(counted) == sum(map(len, FILES.values()))
    asked = len(model.gets("model.safetensors"))
    fetch(tmp_path / "model")  # nothing comes a second time
    assert len(model.gets("model.safetensors")) == asked


def test_the_token_goes_to_the_hub_alone(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    fetch(tmp_path / "model")
    seen = {(host, authorization) for host, _, _, _, authorization in model.gets("model.safetensors")}
    assert seen == {("127.0.0.1", "Bearer hf_good"), ("localhost", "")}


def test_another_server_gets_no_token(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    url = f"{model.address}/cdn/{REPO}/resolve/main/model.safetensors"
    download_all([RemoteFile("file.bin", url)], tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == LARGE
    assert {authorization for *_, authorization in model.gets("model.safetensors")} == {""}


def test_a_cut_connection_is_gone_on_with(model, tmp_path):
    model.faults["model.safetensors"] = [Fault(cut_after=400_000)]
    fetch(tmp_path / "model")
    assert content(tmp_path / "model") == FILES
    ranges = [one[3] for one in model.gets("model.safetensors") if one[0] == "localhost"]
    assert len(ranges) == 2 and re.fullmatch(r"bytes=[1-9]\d*-", ranges[1])


def test_a_stopped_download_goes_on_in_the_next_process(model, tmp_path):
    def stop(count):
        if count > 10_000 and (tmp_path / "model/model.safetensors.partial").stat().st_size:
            raise KeyboardInterrupt

    model.faults["model.safetensors"] = [Fault(cut_after=400_000)]
    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path / "model", on_bytes=stop)
    there = content(tmp_path / "model")
    assert 0 < len(there["model.safetensors.partial"]) < len(LARGE) and "model.safetensors" not in there
    counted = []
    fetch(tmp_path / "model", on_bytes=counted.append)
    assert content(tmp_path / "model") == FILES and sum(counted) == sum(map(len, FILES.values()))
    assert model.gets("model.safetensors")[-1][3] == f"bytes={len(there['model.safetensors.partial'])}-"


def test_a_server_that_knows_no_ranges_begins_anew(model, tmp_path):
    (tmp_path / "file.bin.partial").write_bytes(LARGE[:5000])
    url = f"{model.address}/cdn/{REPO}/resolve/main/model.safetensors"
    counted = []
    model.faults["model.safetensors"] = [Fault(ignore_range=True)]
    download_all([RemoteFile("file.bin", url, len(LARGE))], tmp_path, counted.append)
    assert (tmp_path / "file.bin").read_bytes() == LARGE and sum(counted) == len(LARGE)


def test_what_has_come_whole_already_is_not_asked_for_again(model, tmp_path):
    """A process was killed between the last byte and the comparison; the size is not known."""
    (tmp_path / "file.bin.partial").write_bytes(LARGE)
    url = f"{model.address}/cdn/{REPO}/resolve/main/model.safetensors"
    download_all([RemoteFile("file.bin", url)], tmp_path)
    assert content(tmp_path) == {"file.bin": LARGE}


def test_no_file_goes_elsewhere(tmp_path):
    for name in ("../x", "/x", "a/../../x"):
        with pytest.raises(UserError, match="a file that would go elsewhere"):
            download_all([RemoteFile(name, "http://127.0.0.1:9/x")], tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", FILES)
def test_wrong_content_is_removed(model, tmp_path, name):
    wrong = b"x" * len(FILES[name])
    model.faults[name] = [Fault(content=wrong)]
    with pytest.raises(UserError, match=rf"{name} is not what it should be, by its SHA-\d+: http.*download it again"):
        fetch(tmp_path / "model")
    assert not [there for there in content(tmp_path / "model") if there.startswith(name)]
    fetch(tmp_path / "model")
    assert content(tmp_path / "model") == FILES


def test_more_than_was_said_is_not_taken(model, tmp_path):
    model.faults["model.safetensors"] = [Fault(content=LARGE * 3)]
    with pytest.raises(UserError, match=r"sends more than the 1,024,000 bytes of model.safetensors"):
        fetch(tmp_path / "model")
    assert len(content(tmp_path / "model")["model.safetensors.partial"]) == 0


def test_a_busy_server_is_given_the_pause_that_it_asks_for(model, tmp_path):
    model.faults["config.json"] = [Fault(429, {"Retry-After": "7"}), Fault(503)]
    fetch(tmp_path / "model")
    pauses = [float(one[2]) for one in model.asked if one[1] == "sleep"]
    assert 7 <= max(pauses) <= 8 and len(pauses) >= 2
    assert content(tmp_path / "model") == FILES


@pytest.mark.skipif(VERSION >= (1,), reason="huggingface_hub waits by itself since its version 1")
def test_a_pause_that_is_too_long_is_not_waited_for(model, tmp_path):
    model.faults["config.json"] = [Fault(429, {"Retry-After": "7200"})] * 9
    with pytest.raises(UserError, match=r"is asked too often, wait 7200 s: org/model; run the command again"):
        fetch(tmp_path / "model")


@pytest.mark.parametrize(
    ("token", "repo", "revision", "said"),
    [
        ("hf_bad", REPO, "main", r"does not accept the token: org/model; check HF_TOKEN"),
        ("", "org/gated", "main", r"org/gated is given to those who accept its terms: .* at http://.*/org/gated, then"),
        ("hf_good", "org/gated", "main", r"accept them at http://127.0.0.1:\d+/org/gated"),
        ("", "org/none", "main", r"no model of this name at 127.0.0.1:\d+ that your token, if any, may see: org/none"),
        ("hf_good", "org/none", "main", r"no model of this name"),
        ("", REPO, "v9", r"no revision v9: org/model; http.*/org/model/commits/main lists them"),
        ("", "a/b/c", "main", r"no name of a model: a/b/c"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(model, tmp_path, monkeypatch, token, repo, revision, said):
    model.models["org/gated"] = dict(FILES)
    model.gated.add("org/gated")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=said) as error:
        fetch(tmp_path / "model", repo, revision)
    assert "\n" not in str(error.value) and not content(tmp_path / "model").keys() & FILES.keys()


@pytest.mark.parametrize(
    ("status", "said"),
    [(403, r"refuses: .*HF_TOKEN"), (404, "no such file, config.json"), (418, "answers with error 418")],
)
def test_other_refusals(model, tmp_path, status, said):
    model.faults["config.json"] = [Fault(status)]
    with pytest.raises(UserError, match=said):
        fetch(tmp_path / "model")


def test_a_hub_that_is_not_there(model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"127.0.0.1:9 is not reached, .* \(.*refused.*\): org/model; run the"):
        fetch(tmp_path / "model")


def test_a_disk_that_is_too_small_is_seen_before(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 10**12, 10**6))
    with pytest.raises(UserError, match=r"too little room: 0.0 GB are to come .* free: .*make room there"):
        fetch(tmp_path / "model")
    assert not model.gets("model.safetensors")


FULL = """
import resource, sys
from pathlib import Path
from emollama_jax.errors import as_user_error
from emollama_jax.io.hub import RemoteFile, download_all
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    download_all([RemoteFile("model.safetensors", sys.argv[1])], Path(sys.argv[2]))
except Exception as error:
    print(as_user_error(error))
"""


def test_a_disk_that_fills_up_meanwhile(model, tmp_path):
    """A limit on the size of files stands for it: writing fails in the same place."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    url = f"{model.address}/cdn/{REPO}/resolve/main/model.safetensors"
    command = [sys.executable, "-c", FULL, url, str(tmp_path / "model")]
    online = os.environ | {"HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=online, check=True)
    assert re.fullmatch(r"cannot write: .*File too large; make room there, or choose another place\n", done.stdout)
    assert content(tmp_path / "model").keys() == {"model.safetensors.partial"}
