"""The text of an answer while its tokens come, up to a stop string."""

from collections.abc import Sequence

from emollama_jax.infer.slots import Logprob
from emollama_jax.text.stream_decoder import StreamDecoder
from emollama_jax.text.tokenizers import Tokenizer


class AnswerText:
    """What is shown of an answer: its text without white space at both ends, up to the first stop string.

    Attributes:
        tokens: how many have come, without those behind a stop string.
        stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._decoder, self._stop = StreamDecoder(tokenizer), tuple(stop)
        self._held, self._begun = "", False
        self.tokens, self.stopped = 0, False

    def push(self, tokens: Sequence[int]) -> str:
        """Return the text that further tokens complete."""
        if not self._stop:
            self.tokens += len(tokens)
            return self._show(self._decoder.push(tokens))
        shown = ""
        for token in tokens:
            if not self.stopped:
                self.tokens += 1
                shown += self._show(self._decoder.push([token]))
        return shown

    def finish(self) -> str:
        """Return what is left of the text."""
        if self.stopped:
            return ""
        return self._show(self._decoder.finish(), is_last=True)

    def _show(self, piece: str, *, is_last: bool = False) -> str:
        text = self._held + piece
        if not self._begun:
            text = text.lstrip()
        if found := [at for stop in self._stop if (at := text.find(stop)) >= 0]:
            text, self.stopped, is_last = text[: min(found)], True, True
        ready = text.rstrip()  # white space waits for what follows, as may the beginning of a stop string
        if not is_last:
            ready = ready[: len(text) - self._longest_begin(text)]
        self._held = text[len(ready) :]
        self._begun = self._begun or bool(ready)
        return ready

    def _longest_begin(self, text: str) -> int:
        """How many letters at the end of a text may begin a stop string."""
        return max(
            (n for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
            default=0,
        )


class TokenTexts:
    """The text of single tokens, with the space before it that SentencePiece drops at the start of a text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a", specials=False)[-1:]
        self._skip = len(tokenizer.decode(self._before))

    def text(self, token: int) -> str:
        return self._tokenizer.decode([*self._before, token], skip_specials=False)[self._skip :]

    def entry(self, token: int, logprob: Logprob, alternatives: int) -> dict:
        """Return a token's entry in OpenAI's `logprobs.content`."""
        one = lambda token, value: {"token": (text := self.text(token)), "logprob": value, "bytes": list(text.encode())}
        top = [one(*pair) for pair in logprob.top[:alternatives]]
        return {**one(token, logprob.logprob), "top_logprobs": top}
