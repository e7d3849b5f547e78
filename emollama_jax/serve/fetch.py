"""Clips from https addresses: only public ones, which are resolved once and then kept to.

A name is looked up, each of its addresses must be a global one, and the connection goes to the address that was
checked: a second look-up cannot give another. Redirects are followed by hand, three at most, and checked anew. No proxy
of the environment is used, and no content is decompressed.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from emollama_jax.errors import first_line
from emollama_jax.serve.errors import ApiError, bad_request

REDIRECTS = 3
TIMEOUT_S = 20.0
PARAM = "url"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [entry[4][0] for entry in found]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also when it carries an IPv4 address within."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = None
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in _NAT64:
            inner = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
    return (
        ip.is_global
        and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)
        and (inner is None or is_public(str(inner)))
    )


class Fetcher:
    """Fetches files.

    Args:
        domains: the only hosts that are asked; () is any.
        limit: bytes of a file.
        resolve, accepts: how names become addresses, and which of these may be asked; other ones serve tests.
        verify: the certificates that are trusted; default: those of the system.
    """

    def __init__(
        self,
        *,
        domains: Sequence[str] = (),
        limit: int,
        resolve: Resolve = resolve,
        accepts: Callable[[str], bool] = is_public,
        verify: ssl.SSLContext | bool = True,
    ):
        self._domains = {domain.lower().rstrip(".") for domain in domains}
        self._limit, self._resolve, self._accepts = limit, resolve, accepts
        self._options = {"verify": verify, "trust_env": False, "follow_redirects": False, "timeout": TIMEOUT_S}

    async def fetch(self, url: str, file: Path) -> None:
        """Write what is at an address into a file.

        Raises:
            ApiError: 400 for an address that is not asked or gives nothing, 413 for one that gives too much.
        """
        try:
            async with asyncio.timeout(TIMEOUT_S), httpx.AsyncClient(**self._options) as client:
                for _ in range(REDIRECTS + 1):
                    request = await self._request(client, url)
                    response = await client.send(request, stream=True)
                    try:
                        if response.is_redirect:
                            url = str(httpx.URL(url).join(response.headers.get("location", "")))
                            continue
                        await self._save(response, file)
                        return
                    finally:
                        await response.aclose()
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ssl.SSLError) as error:
            raise bad_request(f"the clip's address cannot be fetched ({first_line(error)})", PARAM, "fetch") from error
        except TimeoutError as error:
            raise bad_request(f"the clip's address gave it not within {TIMEOUT_S:g} s", PARAM, "fetch") from error
        raise bad_request(
            f"the clip's address redirects more than {REDIRECTS} times; give the last one", PARAM, "fetch"
        )

    async def _request(self, client: httpx.AsyncClient, url: str) -> httpx.Request:
        """The request to a checked address of the URL's host."""
        host, port = self._check(url)
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise bad_request(f"the clip's host {host!r} is not known", PARAM, "fetch") from error
        if not addresses or not all(map(self._accepts, addresses)):
            raise bad_request(f"the clip's host {host!r} is not on the public internet", PARAM, "fetch_refused")
        pinned = httpx.URL(url).copy_with(host=addresses[0])
        headers = {"Host": host if port == 443 else f"{host}:{port}", "Accept-Encoding": "identity"}
        return client.build_request("GET", pinned, headers=headers, extensions={"sni_hostname": host})

    def _check(self, url: str) -> tuple[str, int]:
        """Host and port of an address that may be asked. Raises ApiError."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port or 443
            same = httpx.URL(url)
        except (ValueError, httpx.InvalidURL) as error:
            raise bad_request("the clip's address is no URL", PARAM, "fetch_refused") from error
        if parts.scheme != "https" or not host or parts.username is not None or any(c in url for c in "\r\n\t \\"):
            raise bad_request("the clip's address must be https://HOST/..., without a user", PARAM, "fetch_refused")
        if same.host.lower().rstrip(".") != host and same.raw_host.decode().rstrip(".") != host:
            raise bad_request("the clip's address can be read in two ways", PARAM, "fetch_refused")
        if self._domains and host not in self._domains:
            raise bad_request(f"clips are not fetched from {host!r} (--allowed-media-domains)", PARAM, "fetch_refused")
        return host, port

    async def _save(self, response: httpx.Response, file: Path) -> None:
        if response.status_code != 200:
            message = f"the clip's address answers with status {response.status_code}"
            raise bad_request(message, PARAM, "fetch")
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise bad_request("the clip's address gives it compressed", PARAM, "fetch")
        size = 0
        with file.open("wb") as out:
            async for chunk in response.aiter_raw():
                size += len(chunk)
                if size > self._limit:
                    raise ApiError(413, f"the clip has more than {self._limit:,} bytes; cut it", "too_large", PARAM)
                out.write(chunk)
