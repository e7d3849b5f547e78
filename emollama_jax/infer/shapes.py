"""The shapes that the programs of text generation are compiled for: as requests need them, or a few from the start.

Axes, as of the `SlotBatcher`: rows of its batch, slots of their caches.
"""

from dataclasses import dataclass
from typing import TypeVar

from emollama_jax.features.encode import SIZES, in_batches

MIN_BUCKET = 16
Things = TypeVar("Things")


def bucket(length: int) -> int:
    """The compiled length that serves `length`: a power of two, and from 256 on also the one halfway to the next, so
    that rows longer than 128 are multiples of 128, as flash kernels want them."""
    power = max(MIN_BUCKET, power_of_two(length))
    halfway = power * 3 // 4
    return halfway if halfway % 128 == 0 and length <= halfway else power


def power_of_two(count: int) -> int:
    """The least power of two that is not less than `count`."""
    return 1 << (count - 1).bit_length()


@dataclass(frozen=True)
class GrowingShapes:
    """Powers of two and buckets, no larger than the requests need: for a process that has time to compile.

    Attributes:
        max_length: the cache always has so many slots, rounded up to a bucket; None: as the longest request needs.
    """

    max_length: int | None = None

    def prefills(self, group: list[Things]) -> list[list[Things]]:
        """Return the requests of a group as they are prefilled together."""
        return [group]

    def prompt(self, length: int) -> int:
        """Return the padded length of a prompt."""
        return bucket(length)

    def prefilled(self, prompt: int) -> int:
        """Return the cache slots of a prompt of this padded length, until it is in the batch."""
        return prompt

    def cache(self, tokens: int) -> int:
        """Return the cache slots of a row of the batch."""
        return bucket(self.max_length or tokens)

    def rows(self, count: int) -> int:
        """Return the rows of a batch of so many requests."""
        return power_of_two(count)


@dataclass(frozen=True)
class FixedShapes:
    """A few, which can all be compiled before the first request: for a server. The methods are those above.

    One request alone runs in a batch of one row, several in one of all `slots`. Prompts are prefilled in full batches.

    Attributes:
        prompts, caches: the lengths there are, ascending.
    """

    slots: int
    prompts: tuple[int, ...]
    caches: tuple[int, ...]

    @classmethod
    def between(cls, slots: int, *, prompts: tuple[int, int], answers: tuple[int, int]) -> "FixedShapes":
        """Make those for prompts and answers from a usual number of tokens to the greatest, each twice the last."""
        lengths = zip(prompts, answers, strict=True)
        return cls(slots, _doubled(*prompts), _doubled(*(prompt + answer for prompt, answer in lengths)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the batches that are prefilled."""
        return tuple(size for size in SIZES if size <= self.slots)

    def prefills(self, group: list[Things]) -> list[list[Things]]:
        return in_batches(group, self.sizes)

    def prompt(self, length: int) -> int:
        return next(size for size in self.prompts if size >= length)

    def prefilled(self, prompt: int) -> int:
        return self.cache(prompt)

    def cache(self, tokens: int) -> int:
        return next(size for size in self.caches if size >= tokens)

    def rows(self, count: int) -> int:
        return 1 if count <= 1 else self.slots


Shapes = GrowingShapes | FixedShapes


def _doubled(usual: int, longest: int) -> tuple[int, ...]:
    sizes = [bucket(usual)]
    while sizes[-1] < longest:
        sizes.append(min(2 * sizes[-1], bucket(longest)))
    return tuple(sizes)
