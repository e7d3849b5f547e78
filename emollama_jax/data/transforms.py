"""From a clip record to a sample: the task and question drawn for it, its tokens, and the arrays of its clip.

Axes: T tokens of the sample, I x I pixels, N tokens of EVA-ViT, W their width, F feature size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from emollama_jax.data.modalities import draw_modalities, features_of
from emollama_jax.data.records import decode_frame
from emollama_jax.errors import UserError
from emollama_jax.text.labels import find_label
from emollama_jax.text.prompts import (
    PromptConfig,
    Sample,
    Turn,
    draw_request,
    encode_turns,
    training_answer,
)
from emollama_jax.text.tokenizers import Tokenizer

CAPTIONS = {"reason": "caption_coarse", "reason_v2": "caption_fine"}  # the emotion task is answered by the label


def find_answer(record: Mapping[str, Any], task: str, config: PromptConfig) -> str:
    """Find the answer to a task, normalised; "" where the record has none. A label outside `config.labels` is none.

    The record has the `labels` of its data set, of which `emotion` is the index.
    """
    if task != "emotion":
        return training_answer(record[CAPTIONS[task]], config)
    label = record["labels"][record["emotion"]] if record["emotion"] >= 0 else ""
    return training_answer(find_label(label, config.labels) or "", config)


def answerable_tasks(record: Mapping[str, Any], config: PromptConfig) -> list[str]:
    """List the tasks of `config` that the record has an answer for."""
    return [task for task in config.tasks if find_answer(record, task, config)]


@dataclasses.dataclass(frozen=True)
class SampleTransform(grain.transforms.RandomMap):
    """From a record to arrays, for a task and question drawn for it; without an answer where the record has none.

    The arrays are `tokens`, `soft` and `is_answer` [T] as in `Sample`; `clip` int32 [1], the record's number;
    `features` float32 [1, 3, F]; the image as `frames` uint8 [1, I, I, 3] or `image_tokens` float16 [1, N, W]; and with
    `modality_dropout` `has_image` bool [1].
    """

    tokenizer: Tokenizer
    prompt: PromptConfig
    sequence_length: int
    """Tokens of a row; a longer sample is truncated in its answer."""
    image_tokens: int
    """Soft tokens of an image."""
    modality_dropout: float = 0.0
    """Share of the samples without one or two of the clip's modalities."""
    dropout_view_weights: tuple[float, ...] = ()
    """How often each of `modalities.PARTS` is drawn for these; default: equally often."""

    def random_map(self, record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Make the arrays. Raises UserError when the prompt alone is longer than a row."""
        tasks = answerable_tasks(record, self.prompt)
        task, request = draw_request(self.prompt, rng, tasks or None)
        answer = find_answer(record, task, self.prompt) if tasks else None
        modalities = draw_modalities(rng, self.modality_dropout, self.dropout_view_weights)
        kept = features_of(modalities)
        record = {
            **record,
            "subtitle": record["subtitle"] if "T" in modalities else "",
            "features": np.where(kept[:, None], record["features"], 0),
            "has_feature": kept & record["has_feature"],
        }
        sample = self._encode(record, Turn(request, answer))
        if "image_tokens" in record:
            image = {"image_tokens": record["image_tokens"]}
        else:
            image = {"frames": decode_frame(record["frame"])}
        if self.modality_dropout:
            image["has_image"] = np.array("V" in modalities)
        return {
            "tokens": sample.tokens,
            "soft": sample.soft,
            "is_answer": sample.is_answer,
            "clip": np.array([record["number"]], np.int32),
            "features": record["features"][None],
            **{name: value[None] for name, value in image.items()},
        }

    def _encode(self, record: Mapping[str, Any], turn: Turn) -> Sample:
        def encode(config: PromptConfig) -> Sample:
            has_feature = tuple(map(bool, record["has_feature"]))
            options = {"subtitle": record["subtitle"], "has_feature": has_feature, "image_tokens": self.image_tokens}
            return encode_turns(self.tokenizer, [turn], config, **options)

        sample = encode(self.prompt)
        if len(sample.tokens) <= self.sequence_length:
            return sample
        prompt_length = int((~sample.is_answer).sum())
        room = self.sequence_length - prompt_length
        if room < 1:
            raise UserError(
                f"clip {record['name']}: its prompt alone has {prompt_length} tokens, a row has "
                f"{self.sequence_length}; raise data.sequence_length"
            )
        return encode(dataclasses.replace(self.prompt, max_answer_tokens=room))
