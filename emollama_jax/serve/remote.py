"""A server in place of an engine, for `emollama predict --server`: the same records, from another machine.

engine, source = RemoteEngine("http://gpu:8000", key), RemoteClips()
answer_all(engine, items, source, output)
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from emollama_jax.errors import UserError, first_line
from emollama_jax.infer.answer import ClipAnswer, ClipError, Query
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.infer.inputs import Item, ItemRead, fingerprint_of
from emollama_jax.io.checksums import file_digest

TIMEOUT_S = 300.0
ATTEMPTS = 60  # while a server is busy
PAUSE_S = 1.0  # where a busy server does not say for how long
STAGES = {"cannot_read": "read", "no_clip": "read", "too_large": "read", "empty_clip": "read"}
MINE = (400, 413, 415, 422)  # statuses that are about one clip


class RemoteClips:
    """Videos that are sent as they are: a `ClipSource`."""

    def fingerprint(self, item: Item) -> str:
        try:
            return fingerprint_of(item, file_digest(item.video))
        except OSError:
            return ""

    def read(self, items: Sequence[Item]) -> Iterator[ItemRead | UserError]:
        for item in items:
            if not item.video.is_file():
                yield UserError(f"no such file: {item.video}; check the path")
            else:
                yield ItemRead(item.subtitle, self.fingerprint(item))

    def encode(self, items: Sequence[Item], reads: Sequence[ItemRead]) -> list[ClipInput]:
        raise NotImplementedError("the server encodes")


class RemoteEngine:
    """Asks a server, several clips at a time.

    Args:
        options: `orders` and `modalities`, where they are not the server's own.
        connections: requests at a time.
    """

    def __init__(
        self,
        url: str,
        key: str = "",
        *,
        options: dict[str, Any] | None = None,
        connections: int = 8,
        transport: httpx.BaseTransport | None = None,
    ):
        """Raises UserError where the address is none."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S, transport=transport)
            if httpx.URL(url).scheme not in ("http", "https"):
                raise httpx.InvalidURL("neither http nor https")
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"--server {url}: no address ({error}); give one such as http://127.0.0.1:8000") from error
        self._url, self._options, self._connections = url, options or {}, connections

    def identity(self, **settings: Any) -> dict[str, Any]:
        """Return what answers depend on. Raises UserError where the server is not there."""
        (model,) = self._checked(self._send(lambda: self._client.get("/v1/models")))["data"]
        return {"weights": model["weights"], "labels": model["labels"], **self._options, **settings}

    def answer_batch(
        self,
        queries: Sequence[Query],
        clips: Sequence[tuple[Item, ItemRead]],
        encode: Callable[[Sequence[Item], Sequence[ItemRead]], list[ClipInput]],
    ) -> list[ClipAnswer | ClipError]:
        """Return the answers about clips, as `Engine.answer_batch`; it raises UserError where the server gives none."""
        with ThreadPoolExecutor(self._connections) as pool:
            return list(pool.map(self._answer, queries, clips))

    def _answer(self, query: Query, clip: tuple[Item, ItemRead]) -> ClipAnswer | ClipError:
        item, read = clip
        fields = {"subtitle": item.subtitle, "question": "".join(query.questions), **self._options}
        if item.peak_index is not None:
            fields["peak_index"] = item.peak_index
        form = {name: str(value) for name, value in fields.items() if value}

        def post() -> httpx.Response:
            with item.video.open("rb") as file:
                return self._client.post("/v1/emotions", data=form, files={"clip": (item.video.name, file)})

        response = self._send(post)
        if response.status_code in MINE:
            error = response.json()["error"]
            return ClipError(STAGES.get(error["code"], "prompt"), item.name, error["message"])
        record = self._checked(response)
        asked = bool(query.questions)
        return ClipAnswer(
            item.name,
            record["answer"],
            answers=(record["answer"],) if asked else (),
            label=None if asked else record["label"],
            probabilities={} if asked else record["probabilities"],
            label_by_order=() if asked else tuple(record["label_by_order"]),
            subtitle=record["subtitle"],
            clip_info=record["clip"],
            fingerprint=read.fingerprint,
            timings_s=record["timings_s"],
        )

    def _send(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        """The server's reply; while it is busy, it is asked again."""
        for attempt in range(ATTEMPTS):
            try:
                response = send()
            except httpx.HTTPError as error:
                raise UserError(f"{self._url}: no answer ({first_line(error)}); is the server running?") from error
            if response.status_code != 429 or attempt == ATTEMPTS - 1:
                return response
            given = response.headers.get("retry-after", "")
            time.sleep(float(given) if given.isdecimal() else PAUSE_S)
        raise AssertionError("the last attempt has returned")

    def _checked(self, response: httpx.Response) -> dict[str, Any]:
        if response.status_code == 200:
            return response.json()
        try:
            said = response.json()["error"]["message"]
        except (ValueError, LookupError, TypeError):
            said = first_line(Exception(response.text))
        raise UserError(f"{self._url}: HTTP {response.status_code}: {said}; check --server and --api-key")
