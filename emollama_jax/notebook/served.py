"""A model behind a server of its own: `emollama serve`, started by a notebook and asked like an `Engine`.

    with notebook.serve("runs/stage2") as engine:
        engine.label("clip.mp4").probabilities
        for piece in engine.stream("clip.mp4", "[reason] Why does she smile?"):
            print(piece, end="", flush=True)
"""

import atexit
import base64
import json
import subprocess
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emollama_jax.errors import UserError
from emollama_jax.notebook.display import mime_type
from emollama_jax.notebook.shell import find_python

LISTENING, WARM = "emollama: listening on ", "emollama: warm after "
TIMEOUT_S = 600.0  # of a request; the server's own limit is shorter
KEPT = 20  # lines of the server that an error may show


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


def serve(trained: str | Path | None, *arguments: str, show_log: bool = True) -> "ServedEngine":
    """Start `emollama serve` and return it once it is warm.

    Args:
        trained: a run, a .pth or a PEFT folder; None where the arguments name none.
        arguments: further ones of the command, as in `"--config", "colab_t4"`.
        show_log: whether its lines are printed meanwhile.

    Raises:
        UserError: it could not start; the message is the command's own.
    """
    command = [find_python(), "-m", "emollama_jax", "serve", "--port", "0", "--no-demo"]
    command += [*(["--trained", str(trained)] if trained else []), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    atexit.register(process.terminate)
    url, lines = "", deque[str](maxlen=KEPT)
    try:
        for line in process.stdout:
            line = line.rstrip()
            lines.append(line)
            if show_log:
                print(line)
            if line.startswith(LISTENING):
                url = line.removeprefix(LISTENING)
            if line.startswith(WARM):
                threading.Thread(target=_drain, args=(process.stdout, lines), daemon=True).start()
                return ServedEngine(url, process)
    except BaseException:  # the notebook's stop button among them
        process.terminate()
        process.wait()
        raise
    code = process.wait()
    said = [line for line in lines if ": error: " in line] or list(lines) or [f"it ended with exit code {code}"]
    raise UserError(f"the server did not start: {said[-1]}")


def _drain(stream: Any, lines: deque[str]) -> None:
    """Keep the server's pipe from filling up."""
    for line in stream:
        lines.append(line.rstrip())


class ServedEngine:
    """Asks a server on this machine; a context manager that ends it.

    Args:
        url: where it listens.
        process: to be ended by `stop`; None where it is somebody else's.
    """

    def __init__(self, url: str, process: subprocess.Popen | None = None):
        self.url, self._process = url, process

    def __enter__(self) -> "ServedEngine":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server, and free the memory of its device."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

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
        video = {"type": "video_url", "video_url": {"url": _data_url(clip)}}
        messages: list[dict[str, Any]] = []
        for asked, answered in history:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": question})
        first = messages[0]["content"]
        messages[0] = {"role": "user", "content": [video, {"type": "text", "text": first}]}
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
