"""What the model says about clips: their labels' probabilities, and answers to questions.

    predictor = Predictor(model, tokenizer, config, modalities="AV")
    soft = predictor.soft_tokens(clips)
    scores = predictor.labels(clips, soft)
    answers = predictor.answers(clips, soft, [requests_of(config.prompt, "reason")] * len(clips))

    predicted = predict_labels(model, tokenizer, config, Records("data/clips/frame/1.0.0", "test"))

Clips become prompts and soft tokens by the transforms of training. A clip's results depend on the clip alone, up to
rounding: not on those beside it.

A modality that is left out is what a clip without it would be: no subtitle (T), no HuBERT feature (A), and for the
video (V) neither MAE's nor VideoMAE's and zeros for EVA-ViT's tokens. A zero is projected, as in training, or, of a
feature, its token is left out where `prompt.missing` says so.

Axes: N clips, F feature size, I x I pixels, P image tokens, W their width, S soft tokens, D model width.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from emollama_jax.config import Config
from emollama_jax.data.records import Records, decode_frame
from emollama_jax.errors import UserError
from emollama_jax.infer.score import LabelScorer, LabelScores
from emollama_jax.infer.slots import GenerationRequest, SlotBatcher
from emollama_jax.models.emotion_llama import EmotionLlama, num_image_tokens
from emollama_jax.text.prompts import (
    QUESTION_SETS,
    PromptConfig,
    Sample,
    Turn,
    emotion_question,
    encode_turns,
    request,
)
from emollama_jax.text.tokenizers import Tokenizer

MODALITIES = {"A": (2,), "V": (0, 1), "T": ()}  # audio, video, text -> those of a clip's features
ALL = "AVT"


@dataclass(frozen=True)
class ClipInput:
    """A clip as the model takes it; its image is a frame or EVA-ViT's tokens of one."""

    name: str
    subtitle: str
    features: Float[np.ndarray, "3 F"]
    """MAE, VideoMAE, HuBERT; zeros for what is missing."""
    has_feature: Bool[np.ndarray, " 3"]
    frame: UInt8[np.ndarray, "I I 3"] | None = None
    image_tokens: Float[np.ndarray, "P W"] | None = None

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "ClipInput":
        """The clip in a record."""
        return cls(
            name=record["name"],
            subtitle=record["subtitle"],
            features=np.asarray(record["features"], np.float32),
            has_feature=np.asarray(record["has_feature"], bool),
            frame=decode_frame(record["frame"]) if "frame" in record else None,
            image_tokens=record.get("image_tokens"),
        )

    def restricted(self, modalities: str, config: Config) -> "ClipInput":
        """The clip as if only these modalities of it were there."""
        has = self.has_feature.copy()
        for modality, features in MODALITIES.items():
            if modality not in modalities:
                has[list(features)] = False
        changes: dict[str, Any] = {"has_feature": has, "features": np.where(has[:, None], self.features, 0)}
        if "T" not in modalities:
            changes["subtitle"] = ""
        if "V" not in modalities:
            shape = (1 + config.eva_vit.grid**2, config.eva_vit.hidden_size)
            changes |= {"frame": None, "image_tokens": np.zeros(shape, np.float16)}
        return dataclasses.replace(self, **changes)


class Predictor:
    """Asks one model about clips.

    Args:
        model: with its encoder where clips have frames; its parameters stay where they are placed.
        config: the experiment: `prompt`, `generate`, `data.sequence_length` (the longest prompt) and `seed`.
        modalities: those that are used, any of A (audio), V (video) and T (text).
        orders: see `LabelScorer`.

    Raises:
        UserError: no or unknown modalities, or labels that cannot be chosen from.
    """

    def __init__(
        self, model: EmotionLlama, tokenizer: Tokenizer, config: Config, *, modalities: str = ALL, orders: int = 1
    ):
        self.modalities = check_modalities(modalities)
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._image_tokens = num_image_tokens(config.eva_vit, config.projectors)
        self._scorer = LabelScorer(model.llama, tokenizer, config.prompt, orders=orders)
        self._batcher = SlotBatcher(model.llama, [tokenizer.eos_id])

    def soft_tokens(self, clips: Sequence[ClipInput]) -> Float[Array, "N S D"]:
        """The clips' soft tokens, for the methods below."""
        clips = [clip.restricted(self.modalities, self._config) for clip in clips]
        images = "frame" if clips[0].image_tokens is None else "image_tokens"
        rows = 1 << (len(clips) - 1).bit_length()  # few programs compile
        pad = lambda x: np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])[:, None]
        features, image = (pad(np.stack([getattr(clip, name) for clip in clips])) for name in ("features", images))
        arrays = {"frames" if images == "frame" else images: image}
        return _soft_tokens(*nnx.split(self._model), features, arrays)[: len(clips)]

    def labels(self, clips: Sequence[ClipInput], soft: Float[Array, "N S D"]) -> LabelScores:
        """How likely each label of `prompt.labels` is for each clip."""
        clips = [clip.restricted(self.modalities, self._config) for clip in clips]
        has_feature = [tuple(map(bool, clip.has_feature)) for clip in clips]
        return self._scorer.score([clip.subtitle for clip in clips], soft, has_feature)

    def answers(
        self, clips: Sequence[ClipInput], soft: Float[Array, "N S D"], requests: Sequence[Sequence[str]]
    ) -> list[list[str]]:
        """What the model answers to each clip's requests (see `requests_of`), which it is asked one after another, each
        with those before and their answers in sight.

        What is drawn, at a temperature above 0, depends on `seed` and the clip's name.
        """
        turns: list[list[Turn]] = [[] for _ in clips]
        for number in range(max(map(len, requests), default=0)):
            asked = [i for i, of_clip in enumerate(requests) if number < len(of_clip)]
            prompts = [self.prompt(clips[i], [*turns[i], Turn(requests[i][number])]) for i in asked]
            seeds = [self._seed(clips[i].name, number) for i in asked]
            of_clips = (soft[i] for i in asked)
            rows = zip(prompts, [self._config.generate] * len(asked), seeds, of_clips, strict=True)
            completions = self._batcher.run(GenerationRequest(*row) for row in rows)
            for i, completion in zip(asked, completions, strict=True):
                turns[i].append(Turn(requests[i][number], self._tokenizer.decode(completion.tokens).strip()))
        return [[turn.answer or "" for turn in of_clip] for of_clip in turns]

    def prompt(self, clip: ClipInput, turns: Sequence[Turn]) -> Sample:
        """A conversation about the clip as the model reads it."""
        clip = clip.restricted(self.modalities, self._config)
        return encode_turns(
            self._tokenizer,
            turns,
            self._config.prompt,
            subtitle=clip.subtitle,
            has_feature=tuple(map(bool, clip.has_feature)),
            image_tokens=self._image_tokens,
        )

    def check(self, clip: ClipInput, requests: Sequence[str] = ()) -> None:
        """Raises UserError where a request, or that for a label, makes a prompt longer than a row of training."""
        longest = self._config.data.sequence_length
        for asked in (*requests[:1], *requests_of(self._config.prompt)):
            if (tokens := len(self.prompt(clip, [Turn(asked)]).tokens)) > longest:
                raise UserError(
                    f"clip {clip.name}: its prompt has {tokens} tokens, a row {longest}; shorten the subtitle or the "
                    "question, or give data.sequence_length more"
                )

    def _seed(self, name: str, number: int) -> int:
        digest = hashlib.sha256(f"{self._config.seed} {number} {name}".encode()).digest()
        return int.from_bytes(digest[:4], "little")


@functools.partial(jax.jit, static_argnames="graphdef")
def _soft_tokens(graphdef, state, features, images):
    return nnx.merge(graphdef, state).soft_tokens(features, **images)


def check_modalities(text: str) -> str:
    """The modalities in the order A, V, T. Raises UserError for none, unknown or repeated ones."""
    if not text or set(text) - set(MODALITIES) or len(set(text)) < len(text):
        raise UserError(f"modalities {text!r}: give any of A (audio), V (video) and T (text), as in AV")
    return "".join(modality for modality in MODALITIES if modality in text)


def requests_of(config: PromptConfig, task: str = "emotion", questions: Sequence[str] = ()) -> tuple[str, ...]:
    """What a clip is asked: the questions as they are, each a turn, or the task's own one.

    Of a reason task it is the first of those that training draws from, so that runs can be compared.
    """
    if questions:
        return tuple(questions)
    if task == "emotion":
        return (request(task, emotion_question(config.labels)),)
    return (request(task, (config.questions or QUESTION_SETS[config.question_set])[0]),)


@dataclass(frozen=True)
class LabelPredictions:
    """Labels predicted for the clips of a data set."""

    names: list[str]
    truth: list[str | None]
    """The clips' own labels; None where they have none."""
    scores: LabelScores


def predict_labels(
    model: EmotionLlama,
    tokenizer: Tokenizer,
    config: Config,
    records: Records,
    *,
    modalities: str = ALL,
    orders: int = 1,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda count: None,
) -> LabelPredictions:
    """The probabilities of `config.prompt.labels` for every clip of a split.

    Args:
        progress: is told how many more clips are done.

    Raises:
        UserError: as `Predictor`, or records that cannot be read.
    """
    predictor = Predictor(model, tokenizer, config, modalities=modalities, orders=orders)
    names, truth, found = [], [], []
    for clips, labels in batches_of(records, batch_size):
        for clip in clips:
            predictor.check(clip)
        found.append(predictor.labels(clips, predictor.soft_tokens(clips)))
        names += [clip.name for clip in clips]
        truth += labels
        progress(len(clips))
    return LabelPredictions(names, truth, join_scores(found))


def batches_of(records: Records, batch_size: int) -> Iterator[tuple[list[ClipInput], list[str | None]]]:
    """The clips of a split in their order, with their labels. Raises UserError where there are none."""
    if not len(records):
        raise UserError(f"no clips in {records.path}:{records.split}; give a split that has some")
    labels = records.metadata["labels"]
    for start in range(0, len(records), batch_size):
        batch = [records[i] for i in range(start, min(start + batch_size, len(records)))]
        truth = [labels[record["emotion"]] if record["emotion"] >= 0 else None for record in batch]
        yield [ClipInput.of_record(record) for record in batch], truth


def join_scores(parts: Sequence[LabelScores]) -> LabelScores:
    """The scores of all clips, from those of parts of them."""
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("log_likelihoods", "by_order")}
    return dataclasses.replace(parts[0], **joined)
