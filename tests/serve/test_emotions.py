"""POST /v1/emotions gives the record of `emollama predict`, however the clip is sent, and keeps nothing of it."""

import base64
import io
import json
import tempfile
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emollama_jax.config import to_dict
from tests.serve.conftest import serving


def data_url(path: Path, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def send(running, path: Path, **fields):
    answer = running.client.post("/v1/emotions", files={"clip": (path.name, path.read_bytes())}, data=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def timeless(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in ("timings_s", "probabilities")}


@pytest.fixture(scope="module")
def tone(tmp_path_factory) -> Path:
    """A second of a tone, 16 kHz."""
    path = tmp_path_factory.mktemp("sound") / "tone.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((8000 * np.sin(np.arange(16000) / 16000 * 2 * np.pi * 220)).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def still() -> bytes:
    rng, file = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(256, size=(120, 160, 3)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_the_record_is_that_of_predict(running, engine, videos, monkeypatch, tmp_path):
    """Of the command itself, on the same engine."""
    from emollama_jax import cli
    from emollama_jax.cli import predict

    monkeypatch.setattr(predict.Engine, "load", lambda *args, **options: engine)
    config = tmp_path / "same.py"
    config.write_text(
        "import json\nfrom emollama_jax.config import from_dict\n"
        f"def get_config():\n    return from_dict(json.loads({json.dumps(to_dict(engine.config))!r}))\n"
    )
    out = tmp_path / "out.jsonl"
    argv = ["predict", str(videos[0].parent), "--config", str(config), "--out", str(out), "--batch-size", "1"]
    assert cli.main(argv) == 0
    for path, line in zip(videos, out.read_text().splitlines(), strict=True):
        expected = json.loads(line) | {"name": path.name}
        found = send(running, path)
        shared = {name: found[name] for name in expected if name != "video"}
        assert timeless(shared) == {k: v for k, v in timeless(expected).items() if k != "video"}
        assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=2e-6)
        assert found["label"] == found["answer"] == found["label_by_order"][0]
        assert found["weights"]["trained"].startswith("sha256:")
        assert {"decode", "face", "sound", "encode", "label"} == set(expected["timings_s"])


def test_a_form_and_a_json_text_are_one_clip(running, videos):
    form = send(running, videos[0], subtitle="I am fine.", labels="calm, tense", orders="2", modalities="VT")
    fields = {"subtitle": "I am fine.", "labels": ["calm", "tense"], "orders": 2, "modalities": "VT"}
    answer = running.client.post("/v1/emotions", json={"clip": data_url(videos[0]), **fields}).json()
    assert set(form["probabilities"]) == {"calm", "tense"} and len(form["label_by_order"]) == 2
    assert form["clip"]["subtitle_source"] == "given" and form["subtitle"] == "I am fine."
    assert timeless(answer) == timeless(form) | {"name": "clip"}
    assert answer["probabilities"] == pytest.approx(form["probabilities"], abs=2e-6)


def test_a_question_is_answered_beside_the_label(running, engine, videos):
    found = send(running, videos[1], question="[reason] Why?")
    assert found["answer"] == engine.ask(videos[1], "[reason] Why?").answer
    assert found["label"] == engine.label(videos[1]).label != found["answer"]
    assert found["timings_s"]["generate"] > 0


def test_a_known_clip_is_not_read_again(running, videos, monkeypatch):
    first = send(running, videos[2], subtitle="Once.")
    monkeypatch.setattr(running.service._videos, "read_one", lambda *args, **kwargs: pytest.fail("read again"))
    again = send(running, videos[2], subtitle="Twice.")
    assert again["clip"] == first["clip"] and again["subtitle"] == "Twice."
    assert again["fingerprint"] != first["fingerprint"]
    assert again["timings_s"].keys() == {"encode", "label"} and again["timings_s"]["encode"] < 1e-3


def test_the_cache_has_a_bound(engine, videos):
    with serving(engine, cache_mib=0) as small:
        send(small, videos[0])
        assert small.service._cache.nbytes == 0


def test_a_sound_alone_is_heard_and_a_picture_alone_is_seen(running, tone, still):
    heard = send(running, tone)
    assert heard["clip"]["sound_seconds"] == 1.0 and heard["clip"]["frames"] == 0
    answer = running.client.post("/v1/emotions", files={"clip": ("face.png", still)}).json()
    assert answer["clip"]["frames"] == 1 and "sound_seconds" not in answer["clip"]


def test_a_file_is_read_below_the_allowed_folder_alone(engine, running, videos, tmp_path):
    elsewhere, folder = tmp_path / "elsewhere.mp4", tmp_path / "allowed"
    folder.mkdir()
    for target in (elsewhere, folder / "in.mp4"):
        target.write_bytes(videos[0].read_bytes())
    (folder / "out.mp4").symlink_to(elsewhere)
    with serving(engine, allowed_media_path=folder) as server:
        ask = lambda url: server.client.post("/v1/emotions", json={"clip": url})
        assert ask((folder / "in.mp4").as_uri()).json()["name"] == "in.mp4"
        urls = [
            f"file://{folder}/../elsewhere.mp4",
            f"file://{folder}/out.mp4",
            "file:///etc/passwd",
            "file://h/in.mp4",
        ]
        for url in [*urls, f"file://{folder}", f"file://{folder}/missing.mp4", f"file://{folder}/%00", "file:in.mp4"]:
            refused = ask(url)
            assert refused.status_code == 400 and refused.json()["error"]["code"] == "bad_path", url
    refused = running.client.post("/v1/emotions", json={"clip": (folder / "in.mp4").as_uri()})
    assert refused.json()["error"]["code"] == "bad_path"


def test_many_at_once_each_get_the_answer_they_get_alone(running, videos):
    """Likelihoods of one row and of four are sums in another order: their logarithms agree to 2e-5 (test_score.py), so
    probabilities to 5e-6, and once more half a digit of the six that are written."""
    kinds = [(path, words) for path in videos for words in ("", "Oh no.", "Hurray!")]
    alone = [send(running, path, subtitle=words) for path, words in kinds]
    with ThreadPoolExecutor(18) as pool:
        together = list(pool.map(lambda kind: send(running, kind[0], subtitle=kind[1]), kinds * 2))
    for found, expected in zip(together, alone * 2, strict=True):
        assert timeless(found) == timeless(expected)
        assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=6e-6)


def test_nothing_is_left_of_an_upload(running, videos):
    send(running, videos[0])
    assert not list(Path(tempfile.gettempdir()).glob("emollama-request-*"))
    assert running.service._in_flight == 0 and not running.service.scheduler._unfinished
