"""A client of chat-completion servers: any that speak OpenAI's protocol. Needs the package openai (extra `judge`).

    client = ChatClient(ChatConfig.from_environment("judge"))
    reply = client.complete([{"role": "user", "content": [text_part("What is this?"), image_part(png, "image/png")]}])

The key is held in memory only: it is never written to disk, to a log or into an error.
"""

import base64
import dataclasses
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from absl import logging

from emollama_jax.errors import UserError, first_line

SHOWN = 300  # characters of what a server says about an error
HOPELESS = {
    401: "the key",
    402: "the account's credit",
    403: "the key",
    404: "the address and the model",
    405: "the address",
}
OUT_OF_MONEY = "insufficient_quota"  # as some say it with 429, which otherwise passes
FILTERED = re.compile(r"content[_ ](filter|management|policy)|inappropriate content|data_inspection_failed", re.I)

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig:
    """Which model is asked, and how patiently. A value out of range is a ValueError that begins with its name."""

    address: str
    """Where the protocol begins, as in https://api.openai.com/v1; /chat/completions is appended."""
    model: str
    """The model's name there."""
    key: str = dataclasses.field(default="", repr=False)
    """Sent as a bearer token; empty for servers that want none."""
    timeout_s: float = 60.0
    """Time-out of one request."""
    attempts: int = 6
    """Requests for one answer, at most."""
    concurrency: int = 8
    """Requests under way at the same time, for callers that send several."""

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"address={self.address!r}: give a web address such as https://api.openai.com/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("address: give the address alone, and the secret as the key")
        if not self.model:
            raise ValueError("model: give the name of a model")
        if not (self.key.isascii() and self.key.isprintable()) or " " in self.key:
            raise ValueError("key: holds white space or other characters that no key has; copy it again")
        for name in ("attempts", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s={self.timeout_s}: must be above 0")

    @classmethod
    def from_environment(cls, role: str, **settings: Any) -> "ChatConfig":
        """Makes the settings of a model's role, such as "judge": what `settings` leave out of address, model and key is
        read from EMOLLAMA_ROLE_ADDRESS, EMOLLAMA_ROLE_MODEL and EMOLLAMA_ROLE_KEY.

        Raises:
            UserError: there is no address or no model, or a value is out of range.
        """
        for name in ("address", "model", "key"):
            value = os.environ.get(variable := f"EMOLLAMA_{role}_{name}".upper(), "").strip()
            if not settings.setdefault(name, value) and name != "key":
                raise UserError(f"no {name} of a {role}; set {variable}, or do without a {role}")
        try:
            return cls(**settings)
        except ValueError as error:
            raise UserError(f"{role}.{error}") from error


@dataclass(frozen=True, slots=True)
class ChatReply:
    """What came of a request."""

    status: str
    """answered, refused (the model declined), or failed (no answer came)."""
    text: str
    """The answer; of a failure, its reason."""


def text_part(text: str) -> dict[str, Any]:
    """Returns text as a part of a message's content."""
    return {"type": "text", "text": text}


def image_part(data: bytes, kind: str = "image/png") -> dict[str, Any]:
    """Returns an image file of the MIME type `kind` as a part of a message's content."""
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def audio_part(data: bytes, format: str = "wav") -> dict[str, Any]:
    """Returns a sound file as a part of a message's content."""
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": format}}


class ChatClient:
    """Asks one model; several threads may share it.

    A request that fails is sent again after growing pauses, or after the pause that the server asks for.
    """

    def __init__(self, config: ChatConfig):
        """Raises UserError when the package openai is not installed."""
        try:
            import openai
        except ImportError as error:
            raise UserError("a chat model is asked through openai; pip install 'emollama_jax[judge]'") from error
        self.config, self._openai, self._stopped = config, openai, threading.Event()
        self._takes_temperature = True
        self._headers = {} if config.key else {"Authorization": openai.omit}
        # Redirects are not followed: they would carry the key to another server.
        http = openai.DefaultHttpxClient(follow_redirects=False, event_hooks={"request": [self._check_running]})
        self._client = openai.OpenAI(
            base_url=config.address,
            api_key=config.key or "none",
            # Of the variables that openai reads, none may reach the server.
            **{name: "" for name in ("admin_api_key", "organization", "project")},
            default_headers={"OpenAI-Organization": openai.omit, "OpenAI-Project": openai.omit},
            timeout=config.timeout_s,
            max_retries=config.attempts - 1,
            http_client=http,
        )

    def complete(self, messages: Sequence[Message], *, temperature: float | int = 0) -> ChatReply:
        """Asks for the model's next message.

        Args:
            messages: each with a `role` and a `content`: a text, or a list of parts as `text_part` makes them.
            temperature: left out for a model that refuses it.

        Raises:
            UserError: the server refuses the key, the address or the model, or the account has no credit.
        """
        openai, reason = self._openai, ""
        for _ in range(self.config.attempts):
            try:
                return _parse(self._send(messages, temperature))
            except openai.APIStatusError as error:
                code, reason = error.status_code, self._reason(error.response)
                if code in (400, 422) and FILTERED.search(error.response.text):
                    return ChatReply("refused", reason)
                doubt = HOPELESS.get(402 if OUT_OF_MONEY in error.response.text else code)
                if doubt or 300 <= code < 400:
                    raise UserError(f"{self.config.address}: {reason}; check {doubt or 'the address'}") from error
                return ChatReply("failed", reason)
            except openai.APIConnectionError as error:  # refused, reset, cut short, timed out
                return ChatReply("failed", first_line(error.__cause__ or error))
            except _NotACompletion as error:  # the server is asked again
                reason = str(error)
        return ChatReply("failed", reason)

    def _send(self, messages: Sequence[Message], temperature: float | int) -> bytes:
        """Returns the server's reply; asks again, and from then on, without a temperature where that is refused."""
        sent = self._takes_temperature
        try:
            return self._client.chat.completions.with_raw_response.create(
                model=self.config.model,
                messages=list(messages),
                temperature=temperature if sent else self._openai.omit,
                extra_headers=self._headers,
            ).content
        except self._openai.APIStatusError as error:
            if not sent or error.status_code not in (400, 422) or "temperature" not in error.response.text:
                raise
            logging.warning("%s is asked without a temperature: %s", self.config.model, self._reason(error.response))
            self._takes_temperature = False
        return self._send(messages, temperature)

    def stop(self) -> None:
        """Ends what other threads ask: requests under way still get their answer, and no other is sent."""
        self._stopped.set()

    def _check_running(self, request: object) -> None:
        if self._stopped.is_set():
            raise _Stopped

    def _reason(self, response: Any) -> str:
        """Returns what the server says, on one line, without the key should it repeat that."""
        said = f"HTTP {response.status_code} {response.reason_phrase} {response.text[:SHOWN]}"
        reason = " ".join(said.split())
        return reason.replace(self.config.key, "***") if self.config.key else reason


class _Stopped(BaseException):
    """Nothing more is asked. Not an Exception, which openai would take for a failed connection and try again."""


class _NotACompletion(Exception):
    """The server's reply has the status of success and another content."""


def _parse(content: bytes) -> ChatReply:
    try:
        choice = json.loads(content)["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content") or "", message.get("refusal")
        if isinstance(text, list):  # parts, as they are sent; thinking is none of text
            texts = (part for part in text if part.get("type", "text") in ("text", "output_text"))
            text = "".join(part["text"] for part in texts)
        if not isinstance(text, str):
            raise TypeError("the content is not a text")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _NotACompletion(f"not a chat completion ({type(error).__name__}: {error})") from error
    if refusal or choice.get("finish_reason") == "content_filter":
        return ChatReply("refused", str(refusal or text))
    return ChatReply("answered", text)
