"""What the engine thread is given, and what it tells of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from emollama_jax.config import GenerateConfig
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.infer.engine import Engine
from emollama_jax.infer.inputs import Item, ItemRead
from emollama_jax.infer.slots import Logprob
from emollama_jax.serve.cache import EncodedClip
from emollama_jax.serve.errors import ApiError
from emollama_jax.text.prompts import Turn


@dataclass(frozen=True)
class OpenClip:
    """A clip that was read, or is known.

    Attributes:
        key: of its content, for the cache.
        read: None where it is known.
        encoded: None where it is still to be encoded.
    """

    key: str
    item: Item
    fingerprint: str
    read: ItemRead | None
    encoded: EncodedClip | None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """An answer that is to be generated: see `Predictor.request`."""

    question: str
    generate: GenerateConfig | None = None
    seed: int | None = None
    logprobs: bool = False


@dataclass(frozen=True)
class Encoded:
    """The clip is encoded."""

    encoded: EncodedClip


@dataclass(frozen=True)
class Scored:
    """The labels are scored.

    Attributes:
        fields: of a `ClipAnswer` about them.
        spread: the least and the greatest probability of each label over the orders.
        prompt_tokens: of the question, under its first order.
    """

    fields: dict[str, Any]
    spread: dict[str, tuple[float, float]]
    prompt_tokens: int


@dataclass(frozen=True)
class Started:
    """The prompt is queued for generation."""

    prompt_tokens: int


@dataclass(frozen=True)
class Tokens:
    """New tokens of the answer."""

    tokens: tuple[int, ...]
    logprobs: tuple[Logprob, ...]


@dataclass(frozen=True)
class Finished:
    """All that was asked is answered.

    Attributes:
        ended: whether the model ended the answer, rather than its longest length.
        timings_s: by kind of work, as in `ClipAnswer`.
    """

    ended: bool
    timings_s: dict[str, float]


@dataclass(frozen=True)
class Failed:
    error: ApiError


Event = Encoded | Scored | Started | Tokens | Finished | Failed


@dataclass(eq=False)
class Job:
    """A request, as the engine thread sees it: labels, an answer, or both, of one clip.

    Attributes:
        engine: with the request's labels, orders and modalities.
        emit: is told of every event, in the engine thread; it does not wait.
        prompt_tokens: of the question for a label, or else of the question.
        is_over: nothing more is done then: it is answered, has failed, or was cancelled.
    """

    clip: OpenClip
    engine: Engine
    emit: Callable[[Event], None]
    scores_labels: bool = True
    history: tuple[Turn, ...] = ()
    generation: Generation | None = None
    is_over: bool = False
    timings_s: dict[str, float] = field(default_factory=dict)
    encoded: EncodedClip | None = None
    soft: np.ndarray | None = None
    prompt_tokens: int = 0
    started_s: float = 0.0
    has_tokens: bool = False

    @property
    def clip_input(self) -> ClipInput:
        """The encoded clip, with the request's own name and words."""
        clip, item = self.encoded.clip, self.clip.item
        subtitle = item.subtitle or clip.subtitle
        return ClipInput(item.name, subtitle, clip.features, clip.has_feature, frame=clip.frame)
