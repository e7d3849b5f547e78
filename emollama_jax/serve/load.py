"""Puts a load on a running server: many clients at once, beside one that asks one thing after another.

Clips and questions are mixed: labels, short and long answers, whole and streamed, with and without words, and follow-up
questions. Each is asked alone first; under load its answer has to be the very same, and its probabilities up to
rounding. A refusal (429) is counted, and asked again as the server says.
"""

import asyncio
import base64
import dataclasses
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np

from emollama_jax.errors import UserError, first_line
from emollama_jax.io.atomic import write_json
from emollama_jax.io.text_table import align
from emollama_jax.synthetic.dataset import make_dataset

CLIPS = 8
SAME = 2e-5  # of probabilities, which are rounded to 6 digits and computed in batches of different sizes
QUESTIONS = ("[reason] Why?", "[reason] What do the face and the voice tell?", "[reason_v2] How does this person feel?")
LENGTHS = (8, 24, 64)


@dataclass(frozen=True)
class Ask:
    """A request: about which clip, and what; `question` "" asks for the label."""

    clip: Path
    subtitle: str = ""
    question: str = ""
    tokens: int = 0
    streams: bool = False


@dataclass
class Outcome:
    """Figures of one way of asking.

    Attributes:
        seconds: in all.
        latencies, first_tokens: seconds of each request.
        differ: answers that are not those given alone.
        lost: requests without an answer, by what came in its place.
    """

    who: str
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    tokens: int = 0
    refused: int = 0
    differ: int = 0
    lost: dict[str, int] = field(default_factory=dict)

    def lose(self, why: str) -> None:
        self.lost[why] = self.lost.get(why, 0) + 1

    def row(self) -> list[str]:
        at = lambda values, percent: f"{np.percentile(values, percent):.2f}" if values else ""
        rates = (len(self.latencies) / self.seconds, self.tokens / self.seconds)
        figures = [str(len(self.latencies)), *(f"{rate:.1f}" for rate in rates)]
        times = [at(self.latencies, 50), at(self.latencies, 95), at(self.first_tokens, 50)]
        return [self.who, *figures, *times, str(self.refused), str(sum(self.lost.values())), str(self.differ)]


@dataclass
class LoadReport:
    """What `bench_load` found."""

    server: str
    settings: dict[str, Any]
    outcomes: list[Outcome]
    memory_mib: list[float]
    """Of the server process, from the beginning to the end of the load."""

    def __str__(self) -> str:
        heads = ["", "requests", "requests/s", "tokens/s", "p50 s", "p95 s", "first token p50 s"]
        alone, load = self.outcomes
        speed_up = (len(load.latencies) / load.seconds) / (len(alone.latencies) / alone.seconds)
        memory = [f"{self.memory_mib[i]:.0f}" for i in (0, len(self.memory_mib) // 2, -1)] if self.memory_mib else []
        return "\n".join(
            [
                f"Load on {self.server}",
                ", ".join(f"{name} {value}" for name, value in self.settings.items()),
                "",
                *align([[*heads, "refused", "lost", "differ"], *(outcome.row() for outcome in self.outcomes)]),
                "",
                f"- {speed_up:.2f} times the requests a second of one after another",
                *([f"- memory of the server, MiB: {', '.join(memory)} (start, middle, end)"] if memory else []),
                *(f"- lost: {count} x {why}" for why, count in load.lost.items()),
            ]
        )

    def save(self, file: Path) -> None:
        write_json(file, dataclasses.asdict(self))


def bench_load(
    server: str,
    *,
    clients: int = 64,
    seconds: float = 120.0,
    videos: Sequence[Path] = (),
    key: str = "",
    seed: int = 0,
) -> LoadReport:
    """Ask each thing alone, then put the load on.

    Args:
        videos: clips to ask about; default: synthetic ones.
        seconds: of the load; requests under way then are waited for.

    Raises:
        UserError: the server is not there, or does not answer alone.
    """
    with TemporaryDirectory() as folder:
        if not videos:
            made = make_dataset(Path(folder) / "clips", clips={"train": CLIPS}, seed=seed, workers=1)
            videos = [made.video(clip) for clip in made.clips]
        return asyncio.run(_Load(server, key, list(_mix(videos))).run(clients, seconds, seed))


def _mix(videos: Sequence[Path]) -> Iterator[Ask]:
    for i, video in enumerate(videos):
        yield Ask(video)
        yield Ask(video, subtitle="I never thought that they would come.")
        question = QUESTIONS[i % len(QUESTIONS)]
        for j, tokens in enumerate(LENGTHS):
            yield Ask(video, "" if j else "Oh no.", question, tokens, streams=(i + j) % 2 == 0)


class _Load:
    def __init__(self, server: str, key: str, asks: Sequence[Ask]):
        self._server, self._asks = server, asks
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        options = {"base_url": server, "headers": headers, "timeout": 600, "limits": limits, "trust_env": False}
        self._client = httpx.AsyncClient(**options)
        self._files = {ask.clip: ask.clip.read_bytes() for ask in asks}
        self._alone: dict[Ask, Any] = {}
        self._memory: list[float] = []

    async def run(self, clients: int, seconds: float, seed: int) -> LoadReport:
        async with self._client:
            try:
                await self._client.get("/health")
            except httpx.HTTPError as error:
                raise UserError(f"--server {self._server}: no answer ({first_line(error)}); is it running?") from error
            for ask in self._asks:  # compiles, and fills the cache of clips as the load finds it
                await self._ask(ask, Outcome("first"))
            alone = Outcome("one after another")
            start = time.perf_counter()
            for ask in self._asks:
                self._alone[ask] = await self._ask(ask, alone)
            alone.seconds = time.perf_counter() - start
            if alone.lost:
                raise UserError(f"--server {self._server}: no answer alone: {next(iter(alone.lost))}; see its log")
            load = Outcome(f"{clients} clients")
            start = time.perf_counter()
            watching = asyncio.ensure_future(self._watch_memory())
            await asyncio.gather(*(self._be_client(i + seed, start + seconds, load) for i in range(clients)))
            load.seconds = time.perf_counter() - start
            watching.cancel()
        settings = {"clients": clients, "seconds": seconds, "clips": len(self._files), "kinds": len(self._asks)}
        return LoadReport(self._server, settings, [alone, load], self._memory)

    async def _be_client(self, seed: int, end: float, outcome: Outcome) -> None:
        rng = random.Random(seed)
        while time.perf_counter() < end:
            ask = rng.choice(self._asks)
            found = await self._ask(ask, outcome)
            if found is not None and not _same(found, self._alone[ask]):
                outcome.differ += 1

    async def _ask(self, ask: Ask, outcome: Outcome) -> Any:
        """The answer; None where there is none, which is noted."""
        start = time.perf_counter()
        while True:
            try:
                reply = await (self._label(ask) if not ask.question else self._chat(ask, outcome, start))
            except httpx.HTTPError as error:
                outcome.lose(type(error).__name__)
                return None
            if isinstance(reply, httpx.Response) and reply.status_code == 429:
                outcome.refused += 1
                await asyncio.sleep(float(reply.headers.get("retry-after", 1)))
                continue
            break
        if isinstance(reply, httpx.Response):
            outcome.lose(f"HTTP {reply.status_code} {reply.text[:200]}")
            return None
        outcome.latencies.append(time.perf_counter() - start)
        return reply

    async def _label(self, ask: Ask) -> dict[str, float] | httpx.Response:
        files = {"clip": (ask.clip.name, self._files[ask.clip])}
        response = await self._client.post("/v1/emotions", data={"subtitle": ask.subtitle}, files=files)
        return response.json()["probabilities"] if response.status_code == 200 else response

    async def _chat(self, ask: Ask, outcome: Outcome, start: float) -> str | httpx.Response:
        url = f"data:video/mp4;base64,{base64.b64encode(self._files[ask.clip]).decode()}"
        parts = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": ask.question}]
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": ask.tokens, "subtitle": ask.subtitle}
        if not ask.streams:
            response = await self._client.post("/v1/chat/completions", json=body)
            if response.status_code != 200:
                return response
            outcome.tokens += response.json()["usage"]["completion_tokens"]
            return response.json()["choices"][0]["message"]["content"]
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        text, is_whole = "", False
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return response
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    is_whole = True
                elif line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    piece = "".join(choice["delta"].get("content") or "" for choice in chunk.get("choices", ()))
                    if piece and not text:
                        outcome.first_tokens.append(time.perf_counter() - start)
                    text += piece
                    outcome.tokens += (chunk.get("usage") or {}).get("completion_tokens", 0)
        if not is_whole:
            raise httpx.RemoteProtocolError("the stream did not end whole")
        return text

    async def _watch_memory(self) -> None:
        while True:
            response = await self._client.get("/metrics")
            if found := re.search(r"^process_resident_memory_bytes (\S+)", response.text, re.M):
                self._memory.append(float(found[1]) / 2**20)
            await asyncio.sleep(2)


def _same(found: Any, alone: Any) -> bool:
    if isinstance(found, str):
        return found == alone
    return found.keys() == alone.keys() and all(abs(found[label] - alone[label]) <= SAME for label in found)
