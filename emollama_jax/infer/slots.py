"""Continuous batching: requests join a running batch as others finish.

    batcher = SlotBatcher(model, eos_ids=[2], slots=8)
    completions = batcher.run([GenerationRequest(prompt), ...])

    request = batcher.submit(GenerationRequest(prompt))   # or step by step, with requests added in between
    while batcher.busy:
        for event in batcher.step():
            ...                                           # event.request, event.tokens, event.completion

A request's answer depends on its prompt, its settings and its seed: not on the requests beside it, on the order in
which they arrive, or on the number of slots.

The batch has as many rows as requests run at once, and its cache as many slots as the longest of them needs, both
rounded up (infer/shapes.py). So few programs compile, and one request alone decodes as fast as without a batch. Prompts
are prefilled with those of their padded length.
"""

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from emollama_jax.config import GenerateConfig
from emollama_jax.errors import UserError
from emollama_jax.infer import generate
from emollama_jax.infer.generate import DecodeState
from emollama_jax.infer.sampling import Sampling, TokenLogprobs
from emollama_jax.infer.shapes import GrowingShapes, Shapes, power_of_two
from emollama_jax.models.llama import Llama
from emollama_jax.text.prompts import Sample


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One text to continue.

    Attributes:
        prompt: token ids, BOS included where the model wants one, or a sample about a clip.
        config: sampling settings and the longest answer.
        seed: the request's own randomness, at least 0 and below 2**32.
        soft: the soft tokens of the sample's clip (`EmotionLlama.soft_tokens`).
        logprobs: whether the events tell how likely the tokens were.
    """

    prompt: Sequence[int] | Sample
    config: GenerateConfig = GenerateConfig()
    seed: int = 0
    soft: Float[Array, "S D"] | None = None
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer: its tokens without the end-of-sequence id, and whether that id (rather than the limit) ended it."""

    tokens: tuple[int, ...]
    ended: bool


class Logprob(NamedTuple):
    """The log-probability of a token, and those of the most likely ones in its place, (id, log-probability)."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of a request, without the end-of-sequence id, and the whole answer once it is finished."""

    request: int
    tokens: tuple[int, ...]
    completion: Completion | None = None
    logprobs: tuple[Logprob, ...] = ()
    """Of the tokens, where the request asks for them."""


@dataclass(eq=False)
class _Job:
    """A request that waits or runs."""

    number: int
    sample: Sample
    config: GenerateConfig
    seed: int
    soft: Float[Array, "S D"] | None
    logprobs: bool
    tokens: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Cache slots that the prompt and the answer fill; the last token is never read."""
        return len(self.sample.tokens) + self.config.max_new_tokens - 1


class SlotBatcher:
    """Generates answers with one model, as many requests at once as there are slots. Not for several threads at once.

    Args:
        model: the decoder; its parameters stay where they are placed.
        eos_ids: token ids that end an answer.
        slots: most requests that run at once.
        chunk: tokens decoded on the device between two looks from the host: smaller streams more smoothly and refills
            slots sooner.
        max_length: tokens of prompt and answer that a request may have. The cache then always has so many slots a row,
            rounded up to a bucket; by default it grows as requests need it.
        shapes: of the batch and of prefills; default: growing ones.
    """

    def __init__(
        self,
        model: Llama,
        eos_ids: Sequence[int],
        *,
        slots: int = 8,
        chunk: int = 8,
        max_length: int | None = None,
        shapes: Shapes | None = None,
    ):
        self._model = model
        self._eos_ids = jax.device_put(np.asarray(eos_ids, np.int32))
        self._eos = frozenset(int(i) for i in eos_ids)
        self._slots, self._chunk, self._max_length = slots, chunk, max_length
        self._shapes = shapes or GrowingShapes(max_length)
        self._waiting: deque[_Job] = deque()
        self._rows: list[_Job | None] = []  # who sits in each row of the batch
        self._batch: DecodeState | None = None
        self._next_number = 0

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting) or any(self._rows)

    def submit(self, request: GenerationRequest) -> int:
        """Queue a request; returns its number, which its events carry.

        Raises:
            ValueError: an empty prompt, ids outside the vocabulary, soft tokens that are not given, or a bad seed.
            UserError: prompt and answer may be longer than `max_length`.
        """
        sample, config = _as_sample(request.prompt), request.config
        self._check(sample, request)
        job = _Job(self._next_number, sample, config, request.seed, request.soft, request.logprobs)
        self._next_number += 1
        self._waiting.append(job)
        return job.number

    def cancel(self, number: int) -> None:
        """Drop a request, which gets no further events; its slot is free at once. Unknown numbers are ignored, so that
        a request which has just finished can be cancelled."""
        self._waiting = deque(job for job in self._waiting if job.number != number)
        for row, job in enumerate(self._rows):
            if job is not None and job.number == number:
                self._rows[row] = None
                self._batch = generate.stop(self._batch, row)
        if not any(self._rows):
            self._rows, self._batch = [], None

    def step(self) -> list[TokenEvent]:
        """Give free slots to waiting requests, decode a chunk, and return the new tokens of every request."""
        new_tokens: dict[int, tuple[_Job, list[int], list[Logprob]]] = {}
        finished: set[int] = set()
        model = nnx.split(self._model)  # only now: adapters may have been merged since the last call

        def collect(
            rows: Iterable[tuple[int, _Job]], tokens: np.ndarray, done: np.ndarray, logprobs: TokenLogprobs
        ) -> None:
            for i, job in rows:
                _, new, likely = new_tokens.setdefault(job.number, (job, [], []))
                found = [token for token in tokens[i].tolist() if token >= 0]
                new.extend(found)
                if job.logprobs:
                    likely += _logprobs(logprobs, i, len(found))
                if done[i]:
                    finished.add(job.number)

        for group in self._next_groups():
            first = self._prefill(model, group)
            collect(enumerate(group), np.asarray(first.token)[:, None], np.asarray(first.done), first.logprobs)
            self._seat(group, dataclasses.replace(first, logprobs=None), finished)
        self._compact()
        running = [(row, job) for row, job in enumerate(self._rows) if job is not None]
        if running:
            batch, out = generate.decode_chunk(*model, self._batch, self._eos_ids, length=self._chunk)
            collect(running, np.asarray(out), np.asarray(batch.done), batch.logprobs)
            self._batch = dataclasses.replace(batch, logprobs=None)
        self._rows = [None if job is None or job.number in finished else job for job in self._rows]
        if not any(self._rows):
            self._rows, self._batch = [], None
        return [self._event(*new, new[0].number in finished) for new in new_tokens.values()]

    def run(self, requests: Iterable[GenerationRequest]) -> list[Completion]:
        """Submit requests and return their answers, in their order. Events of requests that were submitted before are
        dropped."""
        numbers = [self.submit(request) for request in requests]
        completions: dict[int, Completion] = {}
        while not completions.keys() >= set(numbers):
            for event in self.step():
                if event.completion is not None:
                    completions[event.request] = event.completion
        return [completions[number] for number in numbers]

    def programs(self, soft: Float[Array, "S D"]) -> Iterator[Callable[[], Any]]:
        """Yield calls that compile the programs of `FixedShapes` for prompts about clips, the usual ones first. They
        leave the requests alone that run.

        Args:
            soft: of any clip.
        """
        shapes, last, sizes = self._shapes, self._shapes.slots, self._shapes.caches

        def prefill(width: int, count: int) -> DecodeState:
            job = _Job(-1, _as_sample([0] * width), GenerateConfig(), 0, soft, False)
            return dataclasses.replace(self._prefill(nnx.split(self._model), [job] * count), logprobs=None)

        @functools.cache
        def shortest(count: int) -> DecodeState:
            return prefill(shapes.prompts[0], count)

        def arranged(decode: DecodeState, rows: int, size: int) -> DecodeState:
            return generate.rearrange(decode, np.full(rows, -1, np.int32), cache_size=size)

        def first(count: int, size: int) -> DecodeState:
            return shortest(count) if size == sizes[0] else arranged(shortest(count), count, size)

        def batch(rows: int, size: int) -> DecodeState:
            one = arranged(shortest(1), 1, size)
            return one if rows == 1 else arranged(one, rows, size)

        def decode(rows: int, size: int) -> None:
            generate.decode_chunk(*nnx.split(self._model), batch(rows, size), self._eos_ids, length=self._chunk)
            generate.stop(batch(rows, size), 0)

        def seat(count: int, prefilled: int, size: int) -> None:
            for rows in {1, shapes.rows(count)}:
                arranged(first(count, prefilled), rows, size)
            if last > 1:
                generate.insert(batch(last, size), first(count, prefilled), np.full(count, last, np.int32))

        def change(rows: int, size: int, other_rows: int, other_size: int) -> None:
            arranged(batch(rows, size), other_rows, other_size)

        for size in sizes:
            new = [width for width in shapes.prompts if shapes.prefilled(width) == size]
            smaller = [other for other in sizes if other <= size]
            yield from (functools.partial(prefill, *of) for of in itertools.product(new, shapes.sizes))
            yield from (functools.partial(decode, rows, size) for rows in sorted({1, last}))
            yield from (functools.partial(seat, *of, size) for of in itertools.product(shapes.sizes, smaller))
            yield from (functools.partial(change, *of, last, size) for of in itertools.product({1, last}, smaller))
            yield functools.partial(change, last, size, 1, size)

    def _next_groups(self) -> list[list[_Job]]:
        """The waiting requests that free slots can take, in the groups that are prefilled together."""
        free = self._slots - sum(job is not None for job in self._rows)
        groups: dict[object, list[_Job]] = {}
        for _ in range(min(free, len(self._waiting))):
            job = self._waiting.popleft()
            width, soft = self._shapes.prompt(len(job.sample.tokens)), None if job.soft is None else job.soft.shape
            groups.setdefault((width, soft), []).append(job)
        return [batch for group in groups.values() for batch in self._shapes.prefills(group)]

    def _prefill(self, model: tuple[nnx.GraphDef, nnx.State], group: Sequence[_Job]) -> DecodeState:
        """The group's first tokens, its rows padded to a power of two."""
        width = self._shapes.prompt(max(len(job.sample.tokens) for job in group))
        count = power_of_two(len(group))
        tokens, soft_index = np.zeros((count, width), np.int32), np.full((count, width), -1, np.int32)
        lengths = np.zeros(count, np.int32)
        for row, job in enumerate(group):
            lengths[row] = len(job.sample.tokens)
            tokens[row, : lengths[row]], soft_index[row, : lengths[row]] = job.sample.tokens, job.sample.soft
        idle = count - len(group)
        soft = None if group[0].soft is None else [job.soft for job in group] + [group[0].soft] * idle
        sampling = Sampling.of(
            [job.config for job in group] + [GenerateConfig(temperature=0.0)] * idle,
            [job.seed for job in group] + [0] * idle,
            [job.logprobs for job in group] + [False] * idle,
        )
        size = self._shapes.prefilled(width)
        return generate.prefill(*model, tokens, lengths, soft_index, soft, sampling, self._eos_ids, cache_size=size)

    def _seat(self, group: Sequence[_Job], first: DecodeState, finished: set[int]) -> None:
        """Give the group's unfinished requests a row each, in a larger batch where they need one."""
        seated = {i: job for i, job in enumerate(group) if job.number not in finished}
        if not seated:
            return
        running = sum(job is not None for job in self._rows)
        count = max(self._shapes.rows(running + len(seated)), len(self._rows))
        needed = max(job.length for job in seated.values())
        size = max(self._shapes.cache(needed), first.cache.k.shape[2])
        if self._batch is None:
            idle = count - len(seated)
            self._rows = [*seated.values(), *[None] * idle]
            self._batch = generate.rearrange(first, np.array([*seated, *[-1] * idle], np.int32), cache_size=size)
            return
        self._arrange(count, max(size, self._batch.cache.k.shape[2]))
        free = [row for row, job in enumerate(self._rows) if job is None]
        rows = np.full(len(first.done), count, np.int32)  # beyond the last: dropped
        for (i, job), row in zip(seated.items(), free, strict=False):
            rows[i], self._rows[row] = row, job
        self._batch = generate.insert(self._batch, first, rows)

    def _compact(self) -> None:
        """Halve the batch, as often as its requests leave half of it empty."""
        if self._batch is not None and not self._waiting:
            running = sum(job is not None for job in self._rows)
            self._arrange(min(len(self._rows), self._shapes.rows(max(running, 1))), self._batch.cache.k.shape[2])

    def _arrange(self, count: int, cache_size: int) -> None:
        """Make the batch one of `count` rows and `cache_size` slots, with the running requests first."""
        if (count, cache_size) == (len(self._rows), self._batch.cache.k.shape[2]):
            return
        rows = [row for row, job in enumerate(self._rows) if job is not None]
        self._rows = [self._rows[row] for row in rows] + [None] * (count - len(rows))
        rows = np.array(rows + [-1] * (count - len(rows)), np.int32)
        self._batch = generate.rearrange(self._batch, rows, cache_size=cache_size)

    def _event(self, job: _Job, new: list[int], logprobs: list[Logprob], finished: bool) -> TokenEvent:
        ended = finished and bool(new) and new[-1] in self._eos
        new = new[:-1] if ended else new
        job.tokens += new
        completion = Completion(tuple(job.tokens), ended) if finished else None
        return TokenEvent(job.number, tuple(new), completion, tuple(logprobs[: len(new)]))

    def _check(self, prompt: Sample, request: GenerationRequest) -> None:
        vocab_size, max_new_tokens = self._model.config.vocab_size, request.config.max_new_tokens
        if not 0 <= request.seed < 2**32:
            raise ValueError(f"seed {request.seed} must be at least 0 and below 2**32")
        if not len(prompt.tokens):
            raise ValueError("the prompt is empty; begin it with the BOS id")
        if prompt.tokens.min() < 0 or prompt.tokens.max() >= vocab_size:
            raise ValueError(f"the prompt holds a token id outside the vocabulary of {vocab_size}")
        if prompt.soft.max() >= (0 if request.soft is None else len(request.soft)):
            raise ValueError(f"the prompt asks for soft token {prompt.soft.max()}; give the clip's soft tokens")
        if self._max_length and len(prompt.tokens) + max_new_tokens > self._max_length:
            raise UserError(
                f"a prompt of {len(prompt.tokens)} tokens and an answer of {max_new_tokens} are longer than "
                f"max_length={self._max_length}; shorten one of them, or raise max_length"
            )


def _logprobs(logprobs: TokenLogprobs, row: int, count: int) -> list[Logprob]:
    """Those of a row's first `count` tokens."""
    fields = (logprobs.chosen, logprobs.top_ids, logprobs.top)
    chosen, *of_top = (np.asarray(field)[row, :count].tolist() for field in fields)
    pairs = (tuple(zip(*pair, strict=True)) for pair in zip(*of_top, strict=True))
    return [Logprob(*one) for one in zip(chosen, pairs, strict=True)]


def _as_sample(prompt: Sequence[int] | Sample) -> Sample:
    if isinstance(prompt, Sample):
        return prompt
    tokens = np.array(prompt, np.int32)
    return Sample(tokens, np.full(len(tokens), -1, np.int32), np.zeros(len(tokens), bool))
