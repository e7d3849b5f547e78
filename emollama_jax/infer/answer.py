"""What the engine is asked about a clip, and its answer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emollama_jax.errors import UserError
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.text.prompts import Turn

Clip = str | Path | bytes | Mapping[str, Any] | ClipInput
"""A video's path or its bytes, a record of a prepared data set, or arrays."""


@dataclass(frozen=True)
class Query:
    """A clip, and what is asked about it.

    Query("clip.mp4")                                                       # the labels' probabilities
    Query("clip.mp4", ("[reason] Why?", "Are you sure?"), subtitle="Oh.")   # a conversation
    """

    clip: Clip
    questions: tuple[str, ...] = ()
    """Asked one after another, each with those before and their answers in sight; a task's tag is part of the text."""
    label: bool | None = None
    """Whether the labels are scored; default: where there are no questions."""
    history: tuple[Turn, ...] = ()
    """Earlier questions with their answers."""
    name: str = ""
    """What the clip is called; default: a video's file name, or a record's own name."""
    subtitle: str = ""
    """What the person says, in place of what the clip's file or record says."""
    peak_index: int | None = None
    """The number of the peak frame, for the frame rule `peak`; default: it is looked for."""

    @property
    def scores_labels(self) -> bool:
        return not self.questions if self.label is None else self.label


@dataclass(frozen=True)
class ClipAnswer:
    """What the model says about a clip."""

    name: str
    answer: str
    """The answer to the last question; without questions the label."""
    answers: tuple[str, ...] = ()
    """The answers to all questions."""
    label: str | None = None
    """The most likely label; None where labels were not scored."""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """Of each label, the most likely first; empty where labels were not scored."""
    label_by_order: tuple[str, ...] = ()
    """The most likely label under each order of the labels in the question."""
    label_tokens: float = 0.0
    """Tokens that the model read to score the labels, without padding."""
    subtitle: str = ""
    """What the person says, as the model was told."""
    clip_info: Mapping[str, Any] = field(default_factory=dict)
    """What was seen and heard, in JSON's types: see `media.clip.ClipMedia`."""
    fingerprint: str = ""
    """SHA-256 over all that was read of a video; "" for other clips."""
    timings_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds by kind of work. What clips of a batch took together is divided by their number."""


class ClipError(UserError):
    """A clip without an answer.

    Attributes:
        stage: `read` (its file), `prompt` (too long) or `model` (a result that is not finite).
        name: of the clip.
    """

    def __init__(self, stage: str, name: str, message: str):
        super().__init__(message)
        self.stage, self.name = stage, name
