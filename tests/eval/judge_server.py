"""A judge on this machine that answers well, late, wrongly or not at all, and remembers what it was asked."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What the server sends; as an `answer` counts what the judge can use."""

    status: int
    body: bytes
    headers: dict[str, str] = {}
    delay_s: float = 0.0
    answers: bool = False


def said(text: str | list | None, *, finish_reason: str = "stop", **message: Any) -> Reply:
    """A chat completion."""
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}
    return Reply(200, json.dumps({"choices": [choice]}).encode(), answers=True)


class JudgeServer(ThreadingHTTPServer):
    """`reply(question, n)` is what the n-th request with this question gets, n from 0, if `accept(request)` is true."""

    daemon_threads = True

    def __init__(self, reply: Callable[[str, int], Reply]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.accept: Callable[[dict[str, Any]], bool] = lambda request: True
        self.refusal = Reply(400, b"")  # of what is not accepted
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.requests: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_):  # a client that has gone
        pass


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content, server = request["messages"][0]["content"], self.server
        question = content if isinstance(content, str) else content[0]["text"]
        with server.lock:
            reply = server.reply(question, server.asked[question]) if server.accept(request) else server.refusal
            server.asked[question] += 1
            server.answered[question] += reply.answers
            server.requests.append((request, {"path": self.path, **self.headers}))
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        threading.Event().wait(reply.delay_s)
        with server.lock:
            server.busy -= 1
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, *_):
        pass


@contextmanager
def serve(reply: Callable[[str, int], Reply]) -> Iterator[JudgeServer]:
    server = JudgeServer(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
