"""One batch for everything that is asked at the same time: conversations about many clips, and several threads.

batcher = SharedBatcher(SlotBatcher(model.llama, tokenizer.end_ids, slots=8))
answers = batcher.run([conversation(clip) for clip in clips])
"""

import contextlib
import threading
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Any

from emollama_jax.infer.slots import Completion, GenerationRequest, SlotBatcher, TokenEvent

Conversation = Generator[GenerationRequest, Completion, Any]
"""Yields its requests one after another, is sent the answer to each, and returns a result."""


class SharedBatcher:
    """A `SlotBatcher` for several threads. It has no thread of its own: whoever waits for tokens decodes for all."""

    def __init__(self, batcher: SlotBatcher):
        self._batcher = batcher
        self._lock = threading.Lock()
        self._events: dict[int, deque[TokenEvent]] = {}  # of the requests that are not finished

    def run(self, conversations: Sequence[Conversation]) -> list[Any]:
        """Hold conversations at the same time, and return their results."""
        results: list[Any] = [None] * len(conversations)
        waiting: dict[int, int] = {}  # the number of a request -> that of its conversation

        def send(index: int, completion: Completion | None) -> None:
            try:
                waiting[self._submit(conversations[index].send(completion))] = index
            except StopIteration as end:
                results[index] = end.value

        with self._cancelled_at_the_end(waiting):
            for index in range(len(conversations)):
                send(index, None)
            while waiting:
                for event in self._next_events(waiting):
                    if event.completion is not None:
                        send(waiting.pop(event.request), event.completion)
        return results

    def stream(self, request: GenerationRequest) -> Iterator[TokenEvent]:
        """Yield a request's tokens as they come. A stream that is closed early frees its slot."""
        numbers = [self._submit(request)]
        with self._cancelled_at_the_end(numbers):
            while True:
                for event in self._next_events(numbers):
                    yield event
                    if event.completion is not None:
                        return

    def _submit(self, request: GenerationRequest) -> int:
        with self._lock:
            number = self._batcher.submit(request)
            self._events[number] = deque()
        return number

    def _next_events(self, numbers: Collection[int]) -> list[TokenEvent]:
        """Return the next events of any of these requests, decoding as long as there are none."""
        while True:
            with self._lock:
                found = [event for number in numbers for event in self._events[number]]
                for event in found:
                    self._events[event.request].clear()
                    if event.completion is not None:
                        del self._events[event.request]
                if found:
                    return found
                for event in self._batcher.step():
                    self._events[event.request].append(event)

    @contextlib.contextmanager
    def _cancelled_at_the_end(self, numbers: Collection[int]) -> Iterator[None]:
        """Forget requests when the block ends; unfinished ones are cancelled."""
        try:
            yield
        finally:
            with self._lock:
                for number in numbers:
                    self._batcher.cancel(number)
                    self._events.pop(number, None)
