"""A language model as the judge of free-form answers, behind any endpoint that speaks OpenAI's chat protocol.

    judge = Judge(JudgeConfig.from_environment(), cache="judge-cache")
    answers = judge.ask(["How alike are ...?", ...])

Every answer is kept on disk as soon as it is there, under a name made from what was asked, of whom, so that a run which
was stopped goes on where it was, and nothing is asked twice. The key is held in memory only: it is never written to
disk, to a log or into an error.
"""

import dataclasses
import email.utils
import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import logging

from emollama_jax.errors import UserError

RETRIED = {408, 409, 425, 429, *range(500, 600)}  # the server may answer yet
SHOWN_BYTES = 300  # of what a server says about an error
HOPELESS = {401: "the key", 403: "the key", 404: "the address and the model", 405: "the address"}


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """Who is asked, and how patiently."""

    address: str
    """Where the protocol begins, as in https://api.openai.com/v1; /chat/completions is appended."""
    model: str
    """The model's name there."""
    key: str = dataclasses.field(default="", repr=False)
    """Sent as a bearer token; empty for servers that want none."""
    timeout_s: float = 60.0
    """Patience with one request."""
    attempts: int = 6
    """Requests for one answer, at most."""
    backoff_s: float = 1.0
    """Pause after the first failed request; it doubles after each further one."""
    longest_pause_s: float = 120.0
    """The most that is waited between two requests, also where the server asks for more."""
    concurrency: int = 8
    """Requests under way at the same time."""

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"judge.address={self.address!r}: give a web address such as https://api.openai.com/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("judge.address: give the address alone, and the secret as the key")
        if not self.model:
            raise ValueError("judge.model: give the name of a model")
        if not (self.key.isascii() and self.key.isprintable()) or " " in self.key:
            raise ValueError("judge.key: holds white space or other characters that no key has; copy it again")
        for name in ("attempts", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"judge.{name}={getattr(self, name)}: must be at least 1")
        if self.timeout_s <= 0:
            raise ValueError(f"judge.timeout_s={self.timeout_s}: must be above 0")

    @classmethod
    def from_environment(cls, **settings: Any) -> "JudgeConfig":
        """With EMOLLAMA_JUDGE_ADDRESS, EMOLLAMA_JUDGE_MODEL and EMOLLAMA_JUDGE_KEY for what `settings` leave out.

        Raises:
            UserError: neither says the address or the model, or a value is out of range.
        """
        for name in ("address", "model", "key"):
            value = os.environ.get(variable := f"EMOLLAMA_JUDGE_{name.upper()}", "").strip()
            if not settings.setdefault(name, value) and name != "key":
                raise UserError(f"no {name} of a judge; set {variable}, or do without a judge")
        try:
            return cls(**settings)
        except ValueError as error:
            raise UserError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a question."""

    status: str
    """answered, refused (the judge declined), or failed (no answer was had; the next run asks again)."""
    text: str
    """The answer; of a failure, its reason."""


class Judge:
    """Asks one model at temperature 0, and remembers its answers in the folder `cache`, which is made if needed."""

    def __init__(self, config: JudgeConfig, cache: str | Path):
        self.config = config
        self._cache = Path(cache)
        self._stopped = threading.Event()
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot keep answers in {cache} ({error.strerror}); choose another folder") from error
        # Redirects are not followed: they would carry the key to another server.
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, questions: Sequence[str], progress: Callable[[int, int], None] | None = None) -> list[Answer]:
        """The answers, in order; equal questions are asked once.

        Args:
            progress: is told the numbers of different questions that are done and that there are.

        Raises:
            UserError: the server refuses the key, the address or the model; answers that came before are kept.
        """
        different = list(dict.fromkeys(questions))
        answers: dict[str, Answer] = {}
        self._stopped.clear()
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            asked = {pool.submit(self._answer, question): question for question in different}
            try:
                for future in as_completed(asked):
                    answers[asked[future]] = future.result()
                    if progress is not None:
                        progress(len(answers), len(different))
            except BaseException:  # an interruption, too: what is under way ends, and nothing new is begun
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [answers[question] for question in questions]

    def _answer(self, question: str) -> Answer:
        request = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
        }
        identity = json.dumps([self.config.address.rstrip("/"), request], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()
        file = self._cache / f"{digest}.json"
        if (known := _read(file)) is not None:
            return known
        answer = self._request(json.dumps(request).encode(), digest)
        if answer.status == "failed":
            logging.warning("no answer of the judge: %s", answer.text)
        else:
            _write(file, {"request": request, "status": answer.status, "text": answer.text})
        return answer

    def _request(self, body: bytes, digest: str) -> Answer:
        """Asks until there is an answer, or no hope or patience left."""
        config, reason = self.config, "stopped"
        for attempt in range(config.attempts):
            if self._stopped.is_set():
                break
            asked_to_wait = None
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                with error:
                    reason = self._reason(error)
                    if error.code in HOPELESS or 300 <= error.code < 400:
                        doubt = HOPELESS.get(error.code, "the address")
                        raise UserError(f"{config.address}: {reason}; check {doubt} of the judge") from error
                    if error.code not in RETRIED:
                        break
                    asked_to_wait = _retry_after(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:  # refused, reset, cut short, timed out
                reason = f"{type(error).__name__}: {error}"
            except _Garbage as error:
                reason = str(error)
            if attempt + 1 < config.attempts:
                pause = config.backoff_s * 2**attempt
                pause *= 1 + int(digest[attempt : attempt + 4], 16) / 0xFFFF  # so that not all come back at once
                self._stopped.wait(min(max(pause, asked_to_wait or 0), config.longest_pause_s))
        return Answer("failed", reason)

    def _reason(self, error: urllib.error.HTTPError) -> str:
        """What the server says, on one line, without the key should it repeat that."""
        try:
            said = error.read(SHOWN_BYTES).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            said = ""
        reason = " ".join(f"HTTP {error.code} {error.reason} {said}".split())
        return reason.replace(self.config.key, "***") if self.config.key else reason

    def _post(self, body: bytes) -> Answer:
        headers = {"Content-Type": "application/json"}
        if self.config.key:
            headers["Authorization"] = f"Bearer {self.config.key}"
        address = f"{self.config.address.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, body, headers)
        with self._opener.open(request, timeout=self.config.timeout_s) as response:
            content = response.read()
        try:
            choice = json.loads(content)["choices"][0]
            message = choice["message"]
            text, refusal = message.get("content") or "", message.get("refusal")
            if not isinstance(text, str):
                raise TypeError("the content is not a text")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _Garbage(f"not a chat completion ({type(error).__name__}: {error})") from error
        if refusal or choice.get("finish_reason") == "content_filter":
            return Answer("refused", str(refusal or text))
        return Answer("answered", text)


class _Garbage(Exception):
    """The server said yes and sent something else."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def _retry_after(value: str | None) -> float | None:
    """Seconds, from the header's number of seconds or its date."""
    if not value:
        return None
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return None


def _read(file: Path) -> Answer | None:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return Answer(known["status"], known["text"])
    except (OSError, ValueError, LookupError, TypeError):  # not there, or damaged: asked again
        return None


def _write(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)
