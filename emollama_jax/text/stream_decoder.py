"""Text of an answer while its tokens come."""

from collections.abc import Iterable

from emollama_jax.text.tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
UNFINISHED = 3  # most bytes of a UTF-8 character whose last is missing, each decoded to REPLACEMENT
SHORT, LONG = 12, 48  # the tail is cut to SHORT tokens whenever it has LONG


class StreamDecoder:
    """Decodes tokens a few at a time: what `push` and `finish` return, joined, is `tokenizer.decode` of all of them.

    A tokenizer cannot decode the tokens one by one: a character may be spread over several, and SentencePiece drops the
    space before the first token of a text. So a short tail of the tokens is decoded again with the new ones, and the
    text that is new in it is returned, without the bytes of a character that may still be unfinished.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tail: list[int] = []
        self._shown = 0  # characters of the tail's text that have been returned
        self._limit = LONG

    def push(self, ids: Iterable[int]) -> str:
        """The text that these further tokens complete; empty while a character is unfinished.

        Raises ValueError for an id outside the vocabulary.
        """
        new = list(ids)
        text = self._tokenizer.decode(self._tail + new)
        self._tail += new
        unfinished = min(UNFINISHED, len(text) - len(text.rstrip(REPLACEMENT)))
        return self._show(text, len(text) - unfinished)

    def finish(self) -> str:
        """What is left of the text; the decoder is ready for another one."""
        text = self._tokenizer.decode(self._tail)[self._shown :]
        self._tail, self._shown, self._limit = [], 0, LONG
        return text

    def _show(self, text: str, end: int) -> str:
        new = text[self._shown : end]
        self._shown = max(self._shown, end)
        if len(self._tail) >= self._limit:
            self._cut(text)
        return new

    def _cut(self, text: str) -> None:
        """Forget all but the last tokens, where those left decode to the same end of the text."""
        left = len(text) - self._shown
        for count in range(SHORT, len(self._tail)):
            shorter = self._tokenizer.decode(self._tail[-count:])
            if len(shorter) > left and text.endswith(shorter):
                self._tail, self._shown = self._tail[-count:], len(shorter) - left
                break
            if count >= 2 * SHORT:  # as in a long run of special tokens: try again when it is twice as long
                break
        self._limit = max(LONG, 2 * len(self._tail))
