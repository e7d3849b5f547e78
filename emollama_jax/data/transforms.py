"""From a clip record to what the model reads: the same for training, evaluation and prediction.

Axes: T tokens of the sample, F feature size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from emollama_jax.data.records import decode_frame
from emollama_jax.errors import UserError
from emollama_jax.text.prompts import (
    PromptConfig,
    Sample,
    Turn,
    draw_request,
    encode_turns,
    training_answer,
)
from emollama_jax.text.tokenizers import Tokenizer

ANSWERS = {"reason": "caption_coarse", "reason_v2": "caption_fine"}  # the emotion task's is the label


def answer_of(record: Mapping[str, Any], task: str, config: PromptConfig) -> str:
    """What is to be answered in a task, "" where the record does not say it, or nothing of it is left when it is
    normalised. A label that `config.labels` do not ask for is none.

    The record has the `labels` of its data set, of which `emotion` is the index.
    """
    if task != "emotion":
        return training_answer(record[ANSWERS[task]], config)
    label = record["labels"][record["emotion"]] if record["emotion"] >= 0 else ""
    return training_answer(label, config) if label in config.labels else ""


def tasks_of(record: Mapping[str, Any], config: PromptConfig) -> list[str]:
    """The tasks of `config` that the record has an answer for."""
    return [task for task in config.tasks if answer_of(record, task, config)]


@dataclasses.dataclass(frozen=True)
class ToSample(grain.transforms.RandomMap):
    """A record with a task and a question drawn for it (without an answer where it has none), as arrays:

    `tokens`, `soft`, `is_answer` [T] as in `Sample`; `clip` [1], its number; `cut` [1], whether its answer was
    cut; `features` [1, 3, F]; and the image as `frames` [1, I, I, 3] or `image_tokens` [1, ...].

    Attributes:
        sequence_length: tokens of a row; a longer sample is cut in its answer.
        image_tokens: soft tokens of an image.
    """

    tokenizer: Tokenizer
    prompt: PromptConfig
    sequence_length: int
    image_tokens: int

    def random_map(self, record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        possible = tasks_of(record, self.prompt)
        task, asked = draw_request(self.prompt, rng, possible or None)
        answer = answer_of(record, task, self.prompt)
        sample, was_cut = self._encode(record, Turn(asked, answer if possible else None))
        image = {"image_tokens": record["image_tokens"]} if "image_tokens" in record else {}
        image = image or {"frames": decode_frame(record["frame"])}
        return {
            "tokens": sample.tokens,
            "soft": sample.soft,
            "is_answer": sample.is_answer,
            "clip": np.array([record["number"]], np.int32),
            "cut": np.array([was_cut]),
            "features": record["features"][None],
            **{name: value[None] for name, value in image.items()},
        }

    def _encode(self, record: Mapping[str, Any], turn: Turn) -> tuple[Sample, bool]:
        def encode(turn: Turn, config: PromptConfig) -> Sample:
            has_feature = tuple(map(bool, record["has_feature"]))
            options = {"subtitle": record["subtitle"], "has_feature": has_feature, "image_tokens": self.image_tokens}
            return encode_turns(self.tokenizer, [turn], config, **options)

        sample = encode(turn, self.prompt)
        prompt_length = int((~sample.is_answer).sum())
        if len(sample.tokens) > self.sequence_length:
            room = self.sequence_length - prompt_length
            if room < 1:
                raise UserError(
                    f"clip {record['name']}: its prompt alone has {prompt_length} tokens, a row has "
                    f"{self.sequence_length}; raise data.sequence_length"
                )
            sample = encode(turn, dataclasses.replace(self.prompt, max_answer_tokens=room))
        was_cut = turn.answer is not None and sample.tokens[-1] != self.tokenizer.eos_id
        return sample, bool(was_cut)
