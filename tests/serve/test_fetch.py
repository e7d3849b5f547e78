"""Clips from addresses: from the public internet alone, whatever names, redirects and servers say."""

import asyncio
import http.server
import ssl
import threading
from pathlib import Path

import pytest

trustme = pytest.importorskip("trustme", reason="no trustme: pip install 'emollama_jax[test]'")

from emollama_jax.serve.errors import ApiError  # noqa: E402
from emollama_jax.serve.fetch import Fetcher, is_public  # noqa: E402

PUBLIC = "127.0.0.2"  # stands for an address of the public internet
LIMIT = 1000


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the path: /ok, /hops/N, /to?URL, /large, /packed, /missing."""

    asked: list[str] = []

    def do_GET(self):
        type(self).asked.append(f"{self.headers['Host']}{self.path}")
        kind, _, more = self.path[1:].partition("/")
        location = None
        if kind == "hops":
            location = f"/hops/{int(more) - 1}" if int(more) else "/ok"
        elif kind.startswith("to?"):
            location = self.path.partition("?")[2]
        self.send_response(302 if location else 404 if kind == "missing" else 200)
        if location:
            self.send_header("Location", location)
        if kind == "packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        try:
            for _ in range(10**5 if kind == "large" else 1):
                self.wfile.write(b"a clip" if kind != "large" else bytes(1000))
        except OSError:  # the client has had enough
            pass

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    """(port, what trusts its certificate) of an https server at PUBLIC, for the host site.test."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("site.test").configure_cert(context)
    server = http.server.ThreadingHTTPServer((PUBLIC, 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    yield server.server_port, trust
    server.shutdown()
    server.server_close()


NAMES = {
    "site.test": [PUBLIC],
    "wrong.test": [PUBLIC],
    "private.test": ["10.0.0.1"],
    "mixed.test": [PUBLIC, "127.0.0.1"],
    "local.test": ["127.0.0.1"],
    "six.test": ["::ffff:7f00:1"],
    "nowhere.test": [],
}


def fetch(site, url: str, folder: Path, **options) -> bytes:
    async def resolve(host: str, port: int) -> list[str]:
        lookups.append(host)
        return NAMES.get(host, [host])

    lookups: list[str] = []
    accepts = lambda address: address == PUBLIC or is_public(address)
    fetcher = Fetcher(limit=LIMIT, resolve=resolve, accepts=accepts, verify=site[1], **options)
    file = folder / "clip"
    asyncio.run(fetcher.fetch(url.replace("PORT", str(site[0])), file))
    assert len(lookups) == len([hop for hop in lookups if hop])  # one look-up a hop
    return file.read_bytes()


def test_a_file_comes_from_the_address_that_was_checked(site, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    Handler.asked.clear()
    assert fetch(site, "https://site.test:PORT/ok", tmp_path) == b"a clip"
    assert Handler.asked == [f"site.test:{site[0]}/ok"]
    assert fetch(site, "https://site.test:PORT/hops/2", tmp_path, domains=["site.test"]) == b"a clip"


@pytest.mark.parametrize(
    "url, said",
    [
        ("https://site.test:PORT/hops/3", "redirects more than 3 times"),
        ("https://site.test:PORT/missing", "status 404"),
        ("https://site.test:PORT/packed", "compressed"),
        ("https://site.test:PORT/large", "more than 1,000 bytes"),
        ("https://wrong.test:PORT/ok", "cannot be fetched"),
        ("https://private.test:PORT/ok", "not on the public internet"),
        ("https://mixed.test:PORT/ok", "not on the public internet"),
        ("https://six.test:PORT/ok", "not on the public internet"),
        ("https://nowhere.test:PORT/ok", "not on the public internet"),
        ("https://127.0.0.1:PORT/ok", "not on the public internet"),
        ("https://site.test:PORT/to?https://local.test:PORT/ok", "not on the public internet"),
        ("https://site.test:PORT/to?https://[::1]:PORT/ok", "not on the public internet"),
        ("https://site.test:PORT/to?https://169.254.169.254/", "not on the public internet"),
        ("https://site.test:PORT/to?http://site.test/ok", "must be https"),
        ("https://site.test:PORT/to?file:///etc/passwd", "must be https"),
        ("http://site.test:PORT/ok", "must be https"),
        ("https://a:b@site.test:PORT/ok", "without a user"),
        ("https://site.test\\@127.0.0.1:PORT/ok", "must be https"),
        ("https://site.test:PORT/a\r\nX: y", "https://"),
        ("https:///ok", "must be https"),
    ],
)
def test_what_is_not_asked_or_not_taken(site, tmp_path, url, said):
    with pytest.raises(ApiError) as caught:
        fetch(site, url, tmp_path)
    print(caught.value)
    assert said in str(caught.value) or caught.value.code == "fetch_refused"
    assert caught.value.status in (400, 413)


def test_other_hosts_are_not_asked_where_some_are_named(site, tmp_path):
    for url in ("https://wrong.test:PORT/ok", "https://site.test.:PORT/to?https://wrong.test:PORT/ok"):
        with pytest.raises(ApiError, match="not fetched from 'wrong.test'"):
            fetch(site, url, tmp_path, domains=["site.test"])


@pytest.mark.parametrize(
    "address, public",
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        *[(address, False) for address in ("0.0.0.0", "127.0.0.1", "10.1.2.3", "100.64.0.1", "169.254.169.254")],
        *[(address, False) for address in ("172.16.0.1", "192.168.1.1", "224.0.0.1", "255.255.255.255", "240.0.0.1")],
        *[(address, False) for address in ("::", "::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1")],
        *[(address, False) for address in ("::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::7f00:1")],
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) == public
