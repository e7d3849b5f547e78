"""What stands before the routes: which host is meant, who asks, how many, and how much they send."""

import asyncio
import contextlib
import hmac
import logging
import time

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emollama_jax.serve.errors import ApiError
from emollama_jax.serve.service import Service

KEPT_BY_KEY = ("/v1/", "/metrics")
ASKS = ("/v1/emotions", "/v1/chat/completions")  # which take a place in the queue
BODY_SECONDS = 60.0  # for a whole body to come
DRAINED = (401, 429, 503)  # refusals before the body, which an honest client is sending
DRAIN_SECONDS = 5.0
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
BODIES = 4  # times the largest body that all bodies together may have in memory or on the disk


class Guard:
    """ASGI middleware. Every refusal has OpenAI's shape, and every request is counted."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service, self._settings = app, service, service.settings
        self._key = service.settings.api_key.encode()
        self._received = 0  # bytes of the bodies of requests under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket" and not self._is_meant(_headers(scope)):
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        status, start = 0, time.perf_counter()

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._guarded(scope, receive, noting_send)
        except ClientDisconnect:
            status = status or 499
        except ApiError as error:
            if not status:
                await self._refuse(error, scope, receive, noting_send)
        except Exception as error:
            logging.getLogger(__name__).exception("%s %s", scope["method"], scope["path"])
            if not status:
                message = f"a defect of the server ({type(error).__name__})"
                await self._refuse(ApiError(500, message, "defect"), scope, receive, noting_send)
        finally:
            metrics, path = self._service.metrics, _route(scope)
            metrics.requests.labels(path, str(status)).inc()
            metrics.request_seconds.labels(path).observe(time.perf_counter() - start)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.metrics.refusals.labels(error.code).inc()
        if error.status in DRAINED:
            await self._discard_body(receive)
        error.headers = {**error.headers, "Connection": "close"}  # the rest of the body is not read
        await error.response()(scope, receive, send)

    async def _discard_body(self, receive: Receive) -> None:
        """Read what is being sent: a client that is still sending would see a broken connection, and no reply."""
        left = self._settings.max_body
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = _headers(scope), scope["path"]
        if not self._is_meant(headers):
            raise ApiError(421, "this server answers to localhost only; ask it by that name", "wrong_host")
        if path.startswith(KEPT_BY_KEY) and scope["method"] != "OPTIONS":
            self._check_key(headers)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._settings.max_body:
            raise self._too_large()
        admitted = scope["method"] == "POST" and path in ASKS
        async with contextlib.AsyncExitStack() as stack:
            if admitted:
                stack.enter_context(self._service.admitted())
            counted = stack.enter_context(contextlib.closing(_CountedBody(self, receive)))
            await self._app(scope, counted.receive, send)

    def _is_meant(self, headers: dict[bytes, bytes]) -> bool:
        """Whether the client asked for this server: a page elsewhere may let its own name lead to a local address."""
        if not self._settings.is_loopback or self._key:
            return True
        host = headers.get(b"host", b"localhost").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        return name in (*LOCAL_HOSTS, self._settings.host.lower())

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        """Raises ApiError where a key is asked for and not given."""
        if not self._key:
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            message = "no API key, or a wrong one; give it as 'Authorization: Bearer KEY'"
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _too_large(self) -> ApiError:
        limit = self._settings.max_body
        return ApiError(413, f"the request has more than {limit:,} bytes; send a smaller clip", "too_large")

    def count(self, size: int) -> None:
        """Add to the bytes of bodies under way. Raises ApiError where they are too many for this machine."""
        self._received += size
        if size > 0 and self._received > BODIES * self._settings.max_body:
            raise ApiError(429, "other clips are being sent; ask again later", "too_many_bytes", retry_after_s=2)


class _CountedBody:
    """A request's body, whose bytes and seconds are counted as it comes."""

    def __init__(self, guard: Guard, receive: Receive):
        self._guard, self._receive = guard, receive
        self._size, self._is_whole = 0, False
        self._end = time.monotonic() + BODY_SECONDS

    async def receive(self) -> Message:
        if self._is_whole:  # now it tells of the client's going
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._end - time.monotonic())):
                message = await self._receive()
        except TimeoutError as error:
            message = f"the request did not come within {BODY_SECONDS:g} s; send it faster"
            raise ApiError(408, message, "slow_body") from error
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._size += size
            self._guard.count(size)
            if self._size > self._guard._settings.max_body:
                raise self._guard._too_large()
            self._is_whole = not message.get("more_body", False)
        return message

    def close(self) -> None:
        self._guard.count(-self._size)


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return dict(scope["headers"])


def _route(scope: Scope) -> str:
    """The route's path as it was declared, so that clients cannot make up figures."""
    route = scope.get("route")
    return getattr(route, "path", None) or "other"
