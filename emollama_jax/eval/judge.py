"""A language model as the judge of free-form answers, asked through `io.chat`.

    judge = Judge(ChatConfig.from_environment("judge"), cache="judge-cache")
    replies = judge.ask(["How alike are ...?", ...])

Every reply is kept on disk as soon as it is there, under a name made from what was asked, of whom, so that a run which
was stopped goes on where it was, and nothing is asked twice.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from absl import logging
from etils import epath

from emollama_jax.errors import UserError
from emollama_jax.io.atomic import write_json
from emollama_jax.io.chat import ChatClient, ChatConfig, ChatReply
from emollama_jax.io.paths import PathLike, as_path

PATIENCE = 16  # questions without a single answer, until the others are not asked


class Judge:
    """Asks one model at temperature 0, and keeps its replies in the folder `cache`, which is made if needed."""

    def __init__(self, config: ChatConfig, cache: PathLike):
        """Raises UserError when the folder cannot be made, or the package openai is not installed."""
        self.config, self._client, self._cache = config, ChatClient(config), as_path(cache)
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot keep answers in {cache} ({error.strerror}); choose another folder") from error

    def ask(self, questions: Sequence[str], progress: Callable[[int, int], None] | None = None) -> list[ChatReply]:
        """Returns the replies, in order; equal questions are asked once.

        Args:
            progress: is told the numbers of different questions that are done and that there are.

        Raises:
            UserError: the server refuses the key, the address or the model, the account has no credit, or none of the
                first questions gets an answer; replies that came before are kept.
        """
        different = list(dict.fromkeys(questions))
        replies: dict[str, ChatReply] = {}
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            asked = {pool.submit(self._ask, question): question for question in different}
            try:
                for future in as_completed(asked):
                    replies[asked[future]] = reply = future.result()
                    if len(replies) == PATIENCE and all(reply.status == "failed" for reply in replies.values()):
                        raise UserError(
                            f"{self.config.address}: none of {PATIENCE} questions got an answer: {reply.text}"
                        )
                    if progress is not None:
                        progress(len(replies), len(different))
            except BaseException:  # an interruption, too
                self._client.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [replies[question] for question in questions]

    def _ask(self, question: str) -> ChatReply:
        messages = [{"role": "user", "content": question}]
        request = {"model": self.config.model, "messages": messages, "temperature": 0}
        identity = json.dumps([self.config.address.rstrip("/"), request], sort_keys=True)
        file = self._cache / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"
        if (known := _read(file)) is not None:
            return known
        reply = self._client.complete(messages, temperature=0)
        if reply.status == "failed":
            logging.warning("no answer of the judge: %s", reply.text)
        else:
            write_json(file, {"request": request, "status": reply.status, "text": reply.text})
        return reply


def _read(file: epath.Path) -> ChatReply | None:
    try:
        known = json.loads(file.read_text())
        return ChatReply(known["status"], known["text"])
    except (OSError, ValueError, LookupError, TypeError):  # not there, or damaged: asked again
        return None
