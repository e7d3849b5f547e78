"""Requests that no honest client sends: each is refused with a message, and the server goes on."""

import base64
import gzip
import io
import socket
import struct
import zipfile
import zlib

import numpy as np
import pytest

from emollama_jax.media.read_limits import ReadLimits
from emollama_jax.serve import guard, server
from tests.media import hostile
from tests.serve.conftest import serving
from tests.serve.test_emotions import data_url

EMOTIONS, CHAT = "/v1/emotions", "/v1/chat/completions"
B64 = lambda data: base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def small(engine, tmp_path_factory):
    """A server that takes little, soon, and fetches from anywhere it may."""
    patch = pytest.MonkeyPatch()
    patch.setattr(guard, "BODY_SECONDS", 1.5)
    patch.setattr(server, "HEAD_SECONDS", 1.5)
    folder = tmp_path_factory.mktemp("allowed")
    with serving(engine, max_upload_mb=1, fetch=True, allowed_media_path=folder) as found:
        yield found
    patch.undo()


def png(width: int, height: int) -> bytes:
    """A picture of zeros that says it is so large."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    packed = zlib.compressobj(9)
    rows = b"".join(packed.compress(bytes(1 + width * 3)) for _ in range(min(height, 300))) + packed.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("clip.mp4", bytes(50 * 2**20))
    return file.getvalue()


def clip(data: bytes, kind: str = "video/mp4") -> dict:
    return {"json": {"clip": f"data:{kind};base64,{B64(data)}"}}


def url(text: str) -> dict:
    return {"json": {"clip": text}}


def chat(*content: dict, **more) -> dict:
    return {"path": CHAT, "json": {"messages": [{"role": "user", "content": list(content)}], **more}}


def raw(body: bytes, kind: str = "application/json", path: str = EMOTIONS) -> dict:
    return {"path": path, "content": body, "headers": {"Content-Type": kind}}


TEXT = {"type": "text", "text": "[reason] Why?"}
FORM = 'multipart/form-data; boundary="x"'
PART = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
FILE = b'--x\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n%s\r\n'

# What is sent -> the status, and the code of the error.
REQUESTS = {
    # bodies
    "oversized body": (raw(b'{"clip": "' + b"A" * 5_000_000 + b'"}'), 413, "too_large"),
    "oversized clip in base64": (clip(b"\x1a\x45\xdf\xa3" + bytes(1_100_000)), 413, "too_large"),
    "oversized clip in a form": ({"files": {"clip": b"\x1a\x45\xdf\xa3" + bytes(1_100_000)}}, 413, "too_large"),
    "oversized field of a form": (raw(PART % (b"question", b"a" * 1_200_000) + b"--x--\r\n", FORM), 400, None),
    "no body": (raw(b""), 400, None),
    "not JSON": (raw(b"{clip:"), 400, None),
    "JSON that is a list": (raw(b"[]"), 400, None),
    "JSON in UTF-16": (raw('{"clip": "data:,"}'.encode("utf-16")), 400, None),
    "half a surrogate": (raw(rb'{"clip": "\ud800"}'), 400, None),
    "deep nesting": (raw(b"[" * 15_000 + b"]" * 15_000), 400, None),
    "deeper nesting": (raw(b'{"clip":' * 60_000), 400, "too_many_parts"),
    "a million numbers": (raw(b'{"clip": [' + b"1," * 600_000 + b"1]}"), 400, "too_many_parts"),
    "a huge number": (raw(b'{"clip": "data:,", "orders": ' + b"9" * 50_000 + b"}"), 400, None),
    "infinity": (
        raw(b'{"messages": [{"role": "user", "content": "a"}], "temperature": Infinity}', path=CHAT),
        400,
        None,
    ),
    "gzip that nobody asked for": (raw(gzip.compress(bytes(2**20))), 400, None),
    "plain text": (raw(b"hello", "text/plain"), 415, "content_type"),
    "no content type": ({"content": b"hello"}, 415, "content_type"),
    "a form of no boundary": (raw(b"--x", "multipart/form-data"), 400, None),
    "a damaged form": (raw(b"--y\r\nnonsense", FORM), 400, None),
    "a form without a clip": (raw(PART % (b"question", b"why") + b"--x--\r\n", FORM), 400, None),
    "a form with two files": (
        raw(FILE % (b"clip", b"a", b"1") + FILE % (b"clip", b"b", b"2") + b"--x--\r\n", FORM),
        400,
        None,
    ),
    "a form of a thousand fields": (raw(PART % (b"a", b"b") * 1000 + b"--x--\r\n", FORM), 400, None),
    "a file in place of a question": (
        raw(FILE % (b"question", b"a", b"1") + PART % (b"clip", b"data:,") + b"--x--\r\n", FORM),
        400,
        None,
    ),
    "a file named as a path": (
        raw(FILE % (b"clip", b"../../etc/passwd", b"not a clip") + b"--x--\r\n", FORM),
        415,
        "no_clip",
    ),
    # clips
    "bad base64": (url("data:video/mp4;base64,@@@@"), 400, "bad_base64"),
    "base64 of a wrong length": (url("data:video/mp4;base64,AAAAA"), 400, "bad_base64"),
    "an empty clip": (url("data:video/mp4;base64,"), 400, "empty_clip"),
    "a data URL without data": (url("data:video/mp4"), 400, "bad_url"),
    "a zip bomb": (clip(zip_bomb()), 415, "no_clip"),
    "a PNG bomb": (clip(png(60_000, 60_000), "image/png"), 422, "cannot_read"),
    "a PNG cut short": (clip(png(640, 480)[:60], "image/png"), 422, "cannot_read"),
    "a script called a video": (clip(b"#!/bin/sh\nrm -rf /\n"), 415, "no_clip"),
    "a play list": (clip(b"#EXTM3U\nfile:///etc/passwd\n"), 415, "no_clip"),
    "a play list in the coat of an MP4": (clip(b"\0\0\0\x18ftypisom" + b"#EXTM3U\nfile:///etc/passwd\n"), 422, None),
    "an SVG that includes files": (clip(b'<svg xmlns:xlink="x"><image href="/etc/passwd"/></svg>'), 415, "no_clip"),
    "noise in the coat of an MP4": (clip(b"\0\0\0\x18ftypisom" + np.random.default_rng(0).bytes(50_000)), 422, None),
    "noise in the coat of Matroska": (clip(b"\x1a\x45\xdf\xa3" + np.random.default_rng(0).bytes(50_000)), 422, None),
    # addresses
    "file:///etc/passwd": (url("file:///etc/passwd"), 400, "bad_path"),
    "a path": (url("/etc/passwd"), 400, "bad_url"),
    "http": (url("http://example.com/a.mp4"), 400, "bad_url"),
    "ftp": (url("ftp://example.com/a.mp4"), 400, "bad_url"),
    "gopher": (url("gopher://127.0.0.1:6379/_FLUSHALL"), 400, "bad_url"),
    "loopback": (url("https://127.0.0.1/a.mp4"), 400, "fetch_refused"),
    "localhost": (url("https://localhost/a.mp4"), 400, "fetch_refused"),
    "IPv6 loopback": (url("https://[::1]/a.mp4"), 400, "fetch_refused"),
    "IPv4 within IPv6": (url("https://[::ffff:127.0.0.1]/a.mp4"), 400, "fetch_refused"),
    "IPv4 behind NAT64": (url("https://[64:ff9b::7f00:1]/a.mp4"), 400, "fetch_refused"),
    "a zone": (url("https://[fe80::1%25lo]/a.mp4"), 400, None),
    "decimal loopback": (url("https://2130706433/a.mp4"), 400, None),
    "short loopback": (url("https://127.1/a.mp4"), 400, None),
    "metadata": (url("https://169.254.169.254/latest/meta-data"), 400, "fetch_refused"),
    "a private net": (url("https://192.168.0.1/a.mp4"), 400, "fetch_refused"),
    "a user in the address": (url("https://example.com@127.0.0.1/a.mp4"), 400, "fetch_refused"),
    "two lines in the address": (url("https://127.0.0.1/a\r\nHost: b"), 400, None),
    "a backslash": (url("https://example.com\\@127.0.0.1/"), 400, None),
    "a bad port": (url("https://example.com:99999/"), 400, None),
    # chats
    "no messages": ({"path": CHAT, "json": {"messages": []}}, 400, None),
    "an unknown part": (chat({"type": "tool", "tool": 1}), 400, None),
    "a part of another's shape": (chat({"type": "video_url", "video_url": "data:,"}), 400, None),
    "two clips": (
        chat(TEXT, *[{"type": "video_url", "video_url": {"url": "data:,a"}}] * 2),
        400,
        "several_clips",
    ),
    "a negative length": (chat(TEXT, max_tokens=-1), 400, None),
    "a seed of a thousand digits": (chat(TEXT, seed=10**999), 400, None),
    "a choice of one": (chat(TEXT, guided_choice=["yes"]), 400, None),
    "a field that is none": (chat(TEXT, best_of=9), 400, None),
    # routes
    "a path that is none": ({"path": "/v1/secrets", "json": {}}, 404, "not_found"),
    "a path out of the root": ({"path": "/v1/models/..%2f..%2fetc%2fpasswd", "method": "GET"}, 404, None),
    "a method that is none": ({"path": EMOTIONS, "method": "DELETE"}, 405, "method_not_allowed"),
    "another host": ({"path": "/health", "method": "GET", "headers": {"Host": "evil.example"}}, 421, "wrong_host"),
}


def is_alive(small, videos) -> bool:
    answer = small.client.post(EMOTIONS, files={"clip": videos[0].read_bytes()})
    return answer.status_code == 200 and small.client.get("/health").status_code == 200


@pytest.mark.parametrize("name", REQUESTS)
def test_a_hostile_request_is_refused_with_a_message(small, name):
    request, status, code = REQUESTS[name]
    request = {"method": "POST", "path": EMOTIONS, **request}
    answer = small.client.request(request.pop("method"), request.pop("path"), **request)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    print(f"{name}: {status} {error['message']}")
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) > 10 and "\n" not in error["message"] and "/tmp/" not in error["message"]
    assert code is None or error["code"] == code


def test_the_server_is_alive_after_all_of_them(small, videos):
    assert is_alive(small, videos)
    assert not small.service.scheduler._unfinished and small.service._in_flight == 0


def test_clips_that_are_too_long_or_too_many_pixels_are_not_decoded(small, tmp_path, monkeypatch):
    long = hostile.write(tmp_path / "long.mp4", hostile.pictures(3), stamps=lambda i: 3000.0 * i, options={"bf": "0"})
    answer = small.client.post(EMOTIONS, json={"clip": data_url(long)})
    assert answer.status_code == 422 and "more than 20 s" in answer.json()["error"]["message"], answer.text
    many = hostile.write(tmp_path / "many.mp4", hostile.pictures(100, 640, 480))
    object.__setattr__(small.service.settings, "read_limits", small.service.settings.read_limits._replace(pixels=1e7))
    answer = small.client.post(EMOTIONS, json={"clip": data_url(many)})
    assert answer.status_code == 422 and "100 pictures of 640 x 480" in answer.json()["error"]["message"], answer.text


def test_a_reader_that_takes_too_long_is_ended(engine, videos):
    with serving(engine, read_limits=ReadLimits(seconds=0.01)) as server:
        answer = server.client.post(EMOTIONS, files={"clip": videos[1].read_bytes()})
        assert answer.status_code == 422 and "in time" in answer.json()["error"]["message"], answer.text


def exchange(running, *sent: bytes, half_close: bool = False) -> bytes:
    """What the server says to these bytes, up to its closing the connection."""
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        for data in sent:
            try:
                connection.sendall(data)
            except OSError:  # it has closed the connection, as it may
                break
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        said = b""
        try:
            while data := connection.recv(65536):
                said += data
        except ConnectionResetError:
            pass
        return said


def head(path: str = EMOTIONS, *lines: str) -> bytes:
    return "\r\n".join(
        [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines, "", ""]
    ).encode()


SOCKETS = {
    "a body that never comes": ([head(EMOTIONS, "Content-Length: 100"), b"{"], b"408"),
    "a head that never ends": ([b"POST /v1/emotions HTTP/1.1\r\nHost: loc"], b""),
    "a connection without a request": ([], b""),
    "a head of a megabyte": ([b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2**20 + b"\r\n\r\n"], b"400"),
    "no HTTP": ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300) + b"\r\n\r\n"], b"400"),
    "two lengths": ([head(EMOTIONS, "Content-Length: 4", "Content-Length: 9"), b"null"], b"400"),
    "a negative length": ([head(EMOTIONS, "Content-Length: -1")], b"400"),
    "a length that is a lie": ([head(EMOTIONS, "Content-Length: 99999999999999")], b"413"),
    "a null in a header": ([head(EMOTIONS, "X-A: a\0b", "Content-Length: 0")], b"400"),
    "a folded header": ([head(EMOTIONS, "X-A: a\r\n b: c", "Content-Length: 4", "Connection: close"), b"null"], b"400"),
    "chunks of no size": ([head(EMOTIONS, "Transfer-Encoding: chunked"), b"zz\r\nnull\r\n"], b"400"),
    "an unknown coding": ([head(EMOTIONS, "Transfer-Encoding: gzip"), b"null"], b"501|400"),
    "half a body, half closed": ([head(EMOTIONS, "Content-Length: 100"), b'{"clip"'], b""),
}


@pytest.mark.parametrize("name", SOCKETS)
def test_a_hostile_connection_is_closed(small, name):
    sent, expected = SOCKETS[name]
    said = exchange(small, *sent, half_close="half closed" in name)
    status = said.split(b" ", 2)[1] if said else b""
    print(f"{name}: {status.decode() or 'closed'}")
    assert status in expected.split(b"|"), said[:300]


def test_endless_chunks_are_cut_off(small):
    chunk = b"10000\r\n" + b"A" * 0x10000 + b"\r\n"
    said = exchange(small, head(EMOTIONS, "Transfer-Encoding: chunked"), *[chunk] * 200)
    assert not said or b" 413 " in said.split(b"\r\n")[0]


def test_headers_are_not_forged_by_what_is_sent(small):
    answer = small.client.get("/v1/models/a%0d%0aSet-Cookie:%20b=c")
    assert answer.status_code == 404 and "set-cookie" not in answer.headers


def test_the_server_is_alive_after_these_too(small, videos):
    assert small.client.get("/ready").json() == {"status": "ready"}
    assert is_alive(small, videos)


def test_the_key_is_asked_for(engine, videos):
    with serving(engine, api_key="secret") as server:
        body = {"files": {"clip": videos[0].read_bytes()}}
        for wrong in ("", "Bearer", "Bearer wrong", "Basic secret", "Bearer secret2", "Bearer \xff"):
            refused = server.client.post(EMOTIONS, headers={"Authorization": wrong.encode("latin-1")}, **body)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["error"]["code"] == "invalid_api_key"
        assert server.client.post(EMOTIONS, **body).status_code == 200
        for path in ("/v1/models", "/metrics"):
            assert server.client.get(path, headers={"Authorization": ""}).status_code == 401
        for path in ("/health", "/ready", "/version", "/openapi.json"):
            assert server.client.get(path, headers={"Authorization": ""}).status_code == 200


def test_too_many_are_told_when_to_come_again(engine, videos):
    """Those that are taken are answered all the same."""
    with serving(engine, slots=1, max_queue=1) as server:
        with server.service.admitted(), server.service.admitted():
            refused = server.client.post(EMOTIONS, files={"clip": videos[0].read_bytes()})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
            assert server.client.get("/health").status_code == 200
        assert server.client.post(EMOTIONS, files={"clip": videos[0].read_bytes()}).status_code == 200
        assert 'refusals_total{cause="queue_full"} 1.0' in server.client.get("/metrics").text


def test_an_answer_that_is_late_is_given_up(engine, videos):
    with serving(engine, request_timeout=0.001) as server:
        late = server.client.post(EMOTIONS, files={"clip": videos[2].read_bytes()})
        assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
