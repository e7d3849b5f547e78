"""A model behind a server of its own: `emollama serve`, started by a notebook and asked like an `Engine`.

with notebook.serve("--trained", "runs/stage2") as engine:
    engine.label("clip.mp4").probabilities
    for piece in engine.stream("clip.mp4", "[reason] Why does she smile?"):
        print(piece, end="", flush=True)
"""

import base64
import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emollama_jax.errors import UserError
from emollama_jax.notebook.display import mime_type
from emollama_jax.notebook.shell import Command, Log

LISTENING, WARM, PUBLIC = "emollama: listening on ", "emollama: warm after ", "emollama: and at "
TIMEOUT_S = 600.0  # of a request; the server's own limit is shorter
# For one person who asks a few questions: nothing is compiled that is not needed, but with the first answers.
ALONE = ("--slots", "1", "--no-warmup", "--request-timeout", "540")


@dataclass(frozen=True)
class ServedAnswer:
    """What the model says about a clip, as `infer.answer.ClipAnswer` has it."""

    answer: str
    """The answer to the question; without one the label."""
    label: str = ""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    subtitle: str = ""
    """What the person says, as the model was told."""
    clip_info: Mapping[str, Any] = field(default_factory=dict)
    """What was seen and heard: see `media.clip.ClipMedia`."""


def serve(*arguments: str, log: Log = print) -> "ServedEngine":
    """Start `emollama serve` for one person, and return it once the model is loaded; the first answers compile.

    Args:
        arguments: of the command, as in `"--trained", "runs/stage2"`; those of `ALONE` may be among them.
        log: is told what it says.

    Raises:
        UserError: it could not start; the message is the command's own.
    """
    command, url = _start(["serve", "--port", "0", "--no-demo", *ALONE, *arguments], LISTENING, log)
    return ServedEngine(url, command)


def share_demo(*arguments: str, log: Log = print) -> Command:
    """Start `emollama demo --share` with a new password, and return the command once the page is warm; `stop` ends it.

    Args:
        arguments, log: as those of `serve`.

    Raises:
        UserError: it could not start, or has no public address; the message is the command's own.
    """
    password = secrets.token_urlsafe(9)
    command, address = _start(["demo", "--share", "--auth", f"clip:{password}", *arguments], PUBLIC, log, ready=WARM)
    if "://" not in address:
        command.stop()
        raise UserError(f"{address}; run the cell again, or without SHARE")
    log(f"the page is at {address}; user clip, password {password}")
    return command


def _start(arguments: Sequence[str], address: str, log: Log, *, ready: str = "") -> tuple[Command, str]:
    """Start a verb; return it once it has said `address` and `ready`, and what it said behind `address`."""
    command = Command(["-m", "emollama_jax", *arguments], log=log)
    try:
        found = command.wait_for(address)
        if found is None or command.wait_for(ready) is None:
            command.wait()
            raise command.error(f"emollama {arguments[0]} did not start")
    except BaseException:  # the notebook's stop button among them
        command.stop()
        raise
    return command, found


class ServedEngine:
    """Asks a server on this machine; a context manager that ends it.

    Args:
        url: where it listens.
        command: to be ended by `stop`; None where it is somebody else's.
    """

    def __init__(self, url: str, command: Command | None = None):
        self.url, self._command = url, command

    def __enter__(self) -> "ServedEngine":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server, and free the memory of its device."""
        if self._command is not None:
            self._command.stop()

    def label(self, clip: str | Path, *, subtitle: str = "") -> ServedAnswer:
        """Return the most likely label of a video, and the probabilities of all.

        Raises:
            UserError: the clip cannot be read, or the server gives no answer.
        """
        with self._post("/v1/emotions", {"clip": _data_url(clip), "subtitle": subtitle}) as reply:
            found = json.load(reply)
        names = ("answer", "label", "probabilities", "subtitle")
        return ServedAnswer(**{name: found[name] for name in names}, clip_info=found["clip"])

    def ask(
        self, clip: str | Path, question: str, *, subtitle: str = "", history: Sequence[tuple[str, str]] = ()
    ) -> ServedAnswer:
        """Return the answer to a question about a video. Raises UserError as `label`."""
        text = "".join(self.stream(clip, question, subtitle=subtitle, history=history))
        return ServedAnswer(answer=text, subtitle=subtitle)

    def stream(
        self, clip: str | Path, question: str, *, subtitle: str = "", history: Sequence[tuple[str, str]] = ()
    ) -> Iterator[str]:
        """Yield the answer to a question in pieces of text, as they are generated.

        Args:
            question: with a task's tag where it is to have one, as in "[reason] Why?".
            history: earlier questions with their answers.

        Raises:
            UserError: as `label`.
        """
        asked = [question for question, _ in history] + [question]
        contents: list[Any] = [[{"type": "video_url", "video_url": {"url": _data_url(clip)}}], *asked[1:]]
        contents[0].append({"type": "text", "text": asked[0]})
        messages = [{"role": "user", "content": content} for content in contents]
        for place, (_, answer) in enumerate(history):
            messages.insert(2 * place + 1, {"role": "assistant", "content": answer})
        body = {"messages": messages, "stream": True, "subtitle": subtitle}
        with self._post("/v1/chat/completions", body) as reply:
            for line in reply:
                data = line.decode().strip().removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if data and not data.startswith(":"):
                    yield _text_of(json.loads(data))

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        content = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), content)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
        try:
            return opener.open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                raise UserError(_error_text(error.read(), f"HTTP {error.code}")) from None
        except OSError as error:
            raise UserError(f"no answer from {self.url} ({error}); start the server again") from error


def _data_url(clip: str | Path) -> str:
    path = Path(clip)
    try:
        return f"data:{mime_type(path)};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}); check the path") from error


def _text_of(event: Mapping[str, Any]) -> str:
    """The piece of text in an event of a stream. Raises UserError for an error in its place."""
    if "error" in event:
        raise UserError(event["error"]["message"])
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def _error_text(body: bytes, otherwise: str) -> str:
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return otherwise
