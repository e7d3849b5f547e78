"""The model's results for batches of clips given as arrays: label probabilities, and answers to questions.

    predictor = Predictor(model, tokenizer, config, modalities="AV")
    results = predictor.answer([Query(clip, ("[reason] Why?",)) for clip in clips])

Clips become prompts and soft tokens by the transforms of training. This is what computes an `Engine`'s answers, which
says what they depend on.

A modality that is left out is as in a clip without it: no subtitle (T), no HuBERT feature (A), and for the video (V)
neither the MAE nor the VideoMAE feature and zeros for EVA-ViT's tokens. A zero is projected, as in training; the token
of a missing feature is left out where `prompt.missing` is "omit".

Axes: N clips, S soft tokens, D model width.
"""

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from emollama_jax.config import Config, GenerateConfig
from emollama_jax.data.modalities import ALL, check_modalities
from emollama_jax.errors import UserError
from emollama_jax.infer.answer import ClipAnswer, ClipError, Query
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.infer.score import LabelScorer, LabelScores
from emollama_jax.infer.shapes import power_of_two
from emollama_jax.infer.shared_batcher import Conversation, SharedBatcher
from emollama_jax.infer.slots import GenerationRequest, SlotBatcher
from emollama_jax.infer.views import score_views
from emollama_jax.io.stopwatch import Stopwatch
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
from emollama_jax.text.stream_decoder import StreamDecoder
from emollama_jax.text.tokenizers import Tokenizer


class Predictor:
    """Batched inference with one model.

    Args:
        model: with EVA-ViT where clips have frames; its parameters stay where they are placed.
        config: the experiment: `prompt`, `generate`, `data.sequence_length` (the longest prompt) and `seed`.
        modalities, orders: as those of `Engine`.
        batcher: of this model's answers, where several predictors share one; default: one of its own.

    Raises:
        UserError: no or unknown modalities, or labels that cannot be chosen from.
    """

    def __init__(
        self,
        model: EmotionLlama,
        tokenizer: Tokenizer,
        config: Config,
        *,
        modalities: str = ALL,
        orders: int = 1,
        batcher: SharedBatcher | None = None,
    ):
        self.modalities = check_modalities(modalities)
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._image_tokens = num_image_tokens(config.eva_vit, config.projectors)
        self._scorer = LabelScorer(model.llama, tokenizer, config.prompt, orders=orders)
        self._batcher = batcher or SharedBatcher(SlotBatcher(model.llama, tokenizer.end_ids))

    def answer(self, queries: Sequence[Query]) -> list[ClipAnswer | ClipError]:
        """Answer queries about `ClipInput`s together: labels are scored, and answers generated, for those that ask."""
        errors = {i: error for i, query in enumerate(queries) if (error := self._fault(query)) is not None}
        good = [query for i, query in enumerate(queries) if i not in errors]
        results = iter(self._compute(good) if good else [])
        return [errors[i] if i in errors else next(results) for i in range(len(queries))]

    def answer_views(self, clips: Sequence[ClipInput], views: Sequence[str]) -> list[dict[str, ClipAnswer] | ClipError]:
        """Score the labels of clips under several sets of modalities together, for a predictor of all modalities."""
        faults = [self._fault(Query(clip)) for clip in clips]
        good = [clip for clip, fault in zip(clips, faults, strict=True) if fault is None]
        found = iter(self._view_answers(good, views) if good else [])
        return [next(found) if fault is None else fault for fault in faults]

    def _view_answers(
        self, clips: Sequence[ClipInput], views: Sequence[str]
    ) -> list[dict[str, ClipAnswer] | ClipError]:
        clock = Stopwatch()
        with clock("label"):
            scores = self.view_labels(clips, views)
        timings = {"label": clock.seconds["label"] / len(clips) / len(views)}
        results: list[dict[str, ClipAnswer] | ClipError] = []
        for row, clip in enumerate(clips):
            fields = {view: label_fields(scores[view], row) for view in views}
            said = {"subtitle": clip.subtitle, "timings_s": timings}
            error = next((error for found in fields.values() if (error := _not_finite(clip, found))), None)
            of_view = lambda found: ClipAnswer(clip.name, found["label"], **said, **found)  # noqa: B023
            results.append(error or {view: of_view(found) for view, found in fields.items()})
        return results

    def _fault(self, query: Query) -> ClipError | None:
        """Return why a query cannot be answered, if it cannot."""
        try:
            if query.clip.image_tokens is None and self._model.eva_vit is None and "V" in self.modalities:
                raise UserError(f"clip {query.clip.name}: a frame needs EVA-ViT; load the engine with inputs='frames'")
            if query.scores_labels:
                self.check(query.clip)
            if query.questions and not query.history:
                self.check(query.clip, query.questions[0])
        except UserError as error:
            return ClipError("prompt", query.clip.name, str(error))

    def _compute(self, queries: Sequence[Query]) -> list[ClipAnswer | ClipError]:
        clock = Stopwatch()
        clips = [query.clip for query in queries]
        with clock("encode"):
            soft = jax.block_until_ready(self.soft_tokens(clips))
        labelled, fields = [i for i, query in enumerate(queries) if query.scores_labels], {}
        if labelled:
            with clock("label"):
                scores = self.labels([clips[i] for i in labelled], soft[np.array(labelled)])
            fields = {i: label_fields(scores, row) for row, i in enumerate(labelled)}
        answers: list[list[str]] = [[] for _ in clips]
        if any(query.questions for query in queries):
            with clock("generate"):
                questions, history = [query.questions for query in queries], [query.history for query in queries]
                answers = self.answers(clips, soft, questions, history)
        timings = {kind: s / len(clips) for kind, s in clock.seconds.items()}
        results: list[ClipAnswer | ClipError] = []
        for i, (clip, of_clip) in enumerate(zip(clips, answers, strict=True)):
            scored = fields.get(i, {})
            if error := _not_finite(clip, scored):
                results.append(error)
                continue
            answer = of_clip[-1] if of_clip else scored.get("label", "")
            said = {"answers": tuple(of_clip), "subtitle": clip.subtitle, "timings_s": timings}
            results.append(ClipAnswer(clip.name, answer, **said, **scored))
        return results

    def soft_tokens(self, clips: Sequence[ClipInput]) -> Float[Array, "N S D"]:
        """Return the soft tokens of the clips, for the methods below."""
        return self._soft_tokens([clip.restricted(self.modalities, self._config) for clip in clips])

    def _soft_tokens(self, clips: Sequence[ClipInput]) -> Float[Array, "N S D"]:
        kinds = [[i for i, clip in enumerate(clips) if (clip.frame is None) == stored] for stored in (False, True)]
        if all(kinds):
            soft = jnp.concatenate([self._soft_tokens([clips[i] for i in kind]) for kind in kinds])
            return soft[np.argsort(np.concatenate(kinds))]
        images = "frame" if clips[0].image_tokens is None else "image_tokens"
        rows = power_of_two(len(clips))  # few programs compile
        pad = lambda x: np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])[:, None]
        features, image = (pad(np.stack([getattr(clip, name) for clip in clips])) for name in ("features", images))
        arrays = {"frames" if images == "frame" else images: image}
        soft = _soft_tokens(*nnx.split(self._model), features, arrays)
        return soft if rows == len(clips) else soft[: len(clips)]

    def labels(
        self,
        clips: Sequence[ClipInput],
        soft: Float[Array, "N S D"],
        history: Sequence[Sequence[Turn]] | None = None,
        *,
        length: int | None = None,
    ) -> LabelScores:
        """Score the labels of `prompt.labels` for each clip, after its earlier turns where there are any.

        Args:
            length: see `LabelScorer.score`.
        """
        clips = [clip.restricted(self.modalities, self._config) for clip in clips]
        has_feature = [tuple(map(bool, clip.has_feature)) for clip in clips]
        return self._scorer.score([clip.subtitle for clip in clips], soft, has_feature, history, length=length)

    def compile_labels(self, soft: Float[Array, "N S D"], *, length: int) -> None:
        """Compile what `labels` runs for so many clips: see `LabelScorer.compile`."""
        self._scorer.compile(soft, length=length)

    def view_labels(self, clips: Sequence[ClipInput], views: Sequence[str]) -> dict[str, LabelScores]:
        """Score the labels for each clip under several sets of modalities, whatever those of this predictor are, for
        little more than the price of two (`infer/views.py`)."""
        soft = self._soft_tokens([clip.restricted(ALL, self._config) for clip in clips])
        (first, *_) = clips
        blank = self._soft_tokens([first.restricted("T", self._config)])
        return score_views(self._scorer, clips, views, soft, blank, self._config)

    def answers(
        self,
        clips: Sequence[ClipInput],
        soft: Float[Array, "N S D"],
        questions: Sequence[Sequence[str]],
        history: Sequence[Sequence[Turn]] | None = None,
    ) -> list[list[str]]:
        """Generate the answers to each clip's questions, asked one after another, each with those before in sight.

        Sampling, at a temperature above 0, depends on `seed`, the clip's name and the number of the question.

        Args:
            questions: of each clip; see `task_questions`.
            history: earlier turns of each clip's conversation, with their answers.
        """
        history = history or [()] * len(clips)
        rows = zip(clips, (soft[i] for i in range(len(clips))), questions, history, strict=True)
        return self._batcher.run([self._converse(*row) for row in rows])

    def _converse(
        self, clip: ClipInput, soft: Float[Array, "S D"], questions: Sequence[str], history: Sequence[Turn]
    ) -> Conversation:
        """Ask about one clip: yields requests, is sent their completions, and returns the answers."""
        turns = list(history)
        for question in questions:
            completion = yield self.request(clip, soft, [*turns, Turn(question)])
            turns.append(Turn(question, self._tokenizer.decode(completion.tokens).strip()))
        return [turn.answer for turn in turns[len(history) :]]

    def request(
        self,
        clip: ClipInput,
        soft: Float[Array, "S D"],
        turns: Sequence[Turn],
        *,
        generate: GenerateConfig | None = None,
        seed: int | None = None,
        logprobs: bool = False,
    ) -> GenerationRequest:
        """Return what is generated for the last turn of a conversation, which has no answer yet.

        Args:
            generate, seed: default: the experiment's, and one from the clip's name and the number of the turn.
            logprobs: whether the answer's tokens come with their log-probabilities.
        """
        if seed is None:
            digest = hashlib.sha256(f"{self._config.seed} {len(turns) - 1} {clip.name}".encode()).digest()
            seed = int.from_bytes(digest[:4], "little")
        return GenerationRequest(self.prompt(clip, turns), generate or self._config.generate, seed, soft, logprobs)

    def stream(self, query: Query) -> Iterator[str]:
        """Yield the answer to a query's one question in pieces, as it is generated; joined they are that of `answer`.

        Raises:
            ClipError: the prompt is too long.
        """
        if error := self._fault(query):
            raise error
        (soft,), decoder = self.soft_tokens([query.clip]), StreamDecoder(self._tokenizer)
        events = self._batcher.stream(self.request(query.clip, soft, [*query.history, Turn(*query.questions)]))
        with contextlib.closing(events):
            pieces = itertools.chain((decoder.push(event.tokens) for event in events), (decoder.finish() for _ in [0]))
            yield from _stripped(pieces)

    def prompt(self, clip: ClipInput, turns: Sequence[Turn]) -> Sample:
        """Encode a conversation about the clip as the model reads it."""
        clip = clip.restricted(self.modalities, self._config)
        return encode_turns(
            self._tokenizer,
            turns,
            self._config.prompt,
            subtitle=clip.subtitle,
            has_feature=tuple(map(bool, clip.has_feature)),
            image_tokens=self._image_tokens,
        )

    def check(self, clip: ClipInput, question: str | None = None) -> None:
        """Raise UserError where a question, by default that for a label, makes a prompt longer than a row of training
        (`data.sequence_length`)."""
        question = task_questions(self._config.prompt)[0] if question is None else question
        longest, tokens = self._config.data.sequence_length, len(self.prompt(clip, [Turn(question)]).tokens)
        if tokens > longest:
            raise UserError(
                f"clip {clip.name}: its prompt has {tokens} tokens, a row {longest}; shorten the subtitle or the "
                "question, or give data.sequence_length more"
            )


@functools.partial(jax.jit, static_argnames="graphdef")
def _soft_tokens(graphdef, state, features, images):
    return nnx.merge(graphdef, state).soft_tokens(features, **images)


def task_questions(config: PromptConfig, task: str = "emotion", questions: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the questions given, or else the one of the task.

    Of a reason task it is the first of the questions that training draws from, so that runs can be compared.
    """
    if questions:
        return tuple(questions)
    if task == "emotion":
        return (request(task, emotion_question(config.labels, config.emotion_question)),)
    return (request(task, (config.questions or QUESTION_SETS[config.question_set])[0]),)


def _stripped(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the pieces of a text without the white space at both of its ends."""
    held, begun = "", False
    for piece in pieces:
        held = held + piece if begun else (held + piece).lstrip()
        if text := held.rstrip():  # white space waits for what follows
            held, begun = held[len(text) :], True
            yield text


def _not_finite(clip: ClipInput, fields: Mapping[str, Any]) -> ClipError | None:
    """Return the error of a clip whose probabilities, where it has any, are not finite."""
    if np.isfinite([*fields.get("probabilities", {}).values()]).all():
        return None
    message = "the labels' probabilities are not finite; compute in float32 (config.llama.compute_dtype)"
    return ClipError("model", clip.name, message)


def label_fields(scores: LabelScores, row: int) -> dict[str, Any]:
    """Return the fields of a `ClipAnswer` about the labels of the clip in a row."""
    probabilities = dict(zip(scores.labels, map(float, scores.probabilities[row]), strict=True))
    best_first = sorted(scores.labels, key=lambda label: -probabilities[label])
    return {
        "label": best_first[0],
        "probabilities": {label: probabilities[label] for label in best_first},
        "label_by_order": tuple(of_order[row] for of_order in scores.best_by_order),
        "label_tokens": float(scores.tokens[row]),
    }
