"""A Hugging Face hub on loopback, with the faults of a real one."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_FROM = 1000  # bytes; larger files are kept on another host


@dataclass
class Fault:
    """What goes wrong with one request for a file."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    content: bytes | None = None
    ignore_range: bool = False


@dataclass
class FakeHub:
    """A hub with models, and what was asked of it.

    Attributes:
        models: by name, their files.
        gated: models that only accepted accounts may read.
        token: the only one that is accepted, where one comes.
        faults: by file's name, what goes wrong with the next requests for it.
        asked: (host, method, path, range, authorization) of each request.
        pushed: by path, what was uploaded.
    """

    address: str = ""
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_good"
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    asked: list[tuple[str, str, str, str, str]] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)

    def gets(self, name: str) -> list[tuple[str, str, str, str, str]]:
        """The requests for the content of a file."""
        return [one for one in self.asked if one[1] == "GET" and one[2].endswith(name)]


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            authorization = self.headers.get("Authorization", "")
            host = self.headers["Host"].partition(":")[0]
            hub.asked.append((host, self.command, path, self.headers.get("Range", ""), authorization))
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self._info(match[1], match[2] or "main")
            elif match := re.fullmatch(r"/(?:cdn/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._file(*match.groups(), on_cdn=path.startswith("/cdn/"))
            else:
                self._answer(404, b"")

        def do_POST(self):
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.asked.append((self.headers["Host"], "POST", path, "", self.headers.get("Authorization", "")))
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._answer(401, b"{}")
            elif path.endswith("/repos/create"):
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                hub.models.setdefault(name, {})
                self._json({"url": f"{hub.address}/{name}", "name": name, "id": "1"})
            elif path.endswith("/validate-yaml"):
                self._json({"warnings": [], "errors": []})
            elif "/preupload/" in path:
                files = json.loads(body)["files"]
                self._json(
                    {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
                )
            elif "/commit/" in path:
                lines = [json.loads(line) for line in body.splitlines() if line]
                hub.commits.append({"path": path, "lines": lines})
                url = f"{hub.address}/{path.split('/commit/')[0].removeprefix('/api/models/')}/commit/{COMMIT}"
                self._json({"commitUrl": url, "commitOid": COMMIT, "hookOutput": "", "success": True})
            else:
                self._answer(404, b"{}")

        def _json(self, value):
            self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _info(self, repo, revision):
            if self._refused(repo, for_content=False):
                return
            if revision not in ("main", COMMIT) and len(revision) != 40:
                self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = []
            for name, content in hub.models[repo].items():
                one = {"rfilename": name, "size": len(content), "blobId": _git_sha1(content)}
                if len(content) >= LFS_FROM:
                    digest = hashlib.sha256(content).hexdigest()
                    one["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
                siblings.append(one)
            self._json({"_id": "1", "id": repo, "sha": COMMIT, "siblings": siblings, "private": False})

        def _refused(self, repo, *, for_content) -> bool:
            bearer = self.headers.get("Authorization", "")
            if bearer and bearer != f"Bearer {hub.token}":
                message = {"X-Error-Message": "Invalid credentials in Authorization header"}
                self._answer(401, b"", message)
            elif repo not in hub.models:
                self._answer(401 if not bearer else 404, b"", {"X-Error-Code": "RepoNotFound"})
            elif for_content and repo in hub.gated:
                self._answer(403 if bearer else 401, b"", {"X-Error-Code": "GatedRepo"})
            else:
                return False
            return True

        def _file(self, repo, revision, name, *, on_cdn):
            if not on_cdn and self._refused(repo, for_content=True):
                return
            if name not in hub.models[repo]:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            content = hub.models[repo][name]
            is_lfs = len(content) >= LFS_FROM
            etag = hashlib.sha256(content).hexdigest() if is_lfs else _git_sha1(content)
            about = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            if is_lfs and not on_cdn:
                place = hub.address.replace("127.0.0.1", "localhost") + f"/cdn/{repo}/resolve/{revision}/{name}"
                about |= {"Location": place, "X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{etag}"'}
                self._answer(302, b"", about)
                return
            fault = Fault()
            if self.command == "GET" and hub.faults.get(name):
                fault = hub.faults[name].pop(0)
            if fault.status:
                self._answer(fault.status, b"", fault.headers)
                return
            content, first, status = fault.content or content, 0, 200
            asked = "" if fault.ignore_range else self.headers.get("Range", "")
            if match := re.fullmatch(r"bytes=(\d+)-", asked):
                first, status = int(match[1]), 206
                if first >= len(content):
                    self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                    return
                about["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self._answer(status, content[first:], about, cut_after=fault.cut_after)

        def _answer(self, status, content, headers=(), *, cut_after=None):
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                return
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content[:cut_after])
                self.wfile.flush()
            if cut_after is not None:
                self.close_connection = True

    return Handler


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serve() -> Iterator[FakeHub]:
    """Runs a hub; its address is http://127.0.0.1:PORT, and its large files are at http://localhost:PORT."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    server.handle_error = lambda request, address: None  # clients go away as they like
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[FakeHub]:
    """A hub that huggingface_hub takes for the real one, and an empty cache for it."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    with serve() as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.address)
        template = fake.address + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):
            if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
                monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        new_connections = getattr(_http, "reset_sessions", None) or _http.close_session  # before and since version 1
        new_connections()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield fake
        new_connections()
