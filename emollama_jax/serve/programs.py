"""The programs that requests need, so that all are compiled before the first one comes.

Clips are encoded, and labels scored, in batches of the sizes `SIZES`; prompts and answers have the lengths of
`FixedShapes`. Only other labels, or more orders of them than the server's, compile once more.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from emollama_jax.features.encode import BUCKETS, ENCODED, SIZES
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.infer.engine import Engine
from emollama_jax.infer.inputs import Item, ItemRead, VideoClips
from emollama_jax.infer.predictor import task_questions
from emollama_jax.infer.shapes import FixedShapes
from emollama_jax.infer.slots import SlotBatcher
from emollama_jax.media.audio import SAMPLE_RATE
from emollama_jax.media.clip import SOUND_SLACK, ClipMedia
from emollama_jax.text.prompts import Turn

WORDS = 32  # tokens of a usual subtitle


def serving_shapes(engine: Engine, slots: int) -> FixedShapes:
    """Return those for the experiment's prompts and answers."""
    config, turns = engine.config, [Turn(task_questions(engine.config.prompt)[0])]
    longest, answer = config.data.sequence_length, config.generate.max_new_tokens
    usual = min(longest, len(engine.predictor.prompt(blank_clip(engine), turns).tokens) + WORDS)
    return FixedShapes.between(slots, prompts=(usual, longest), answers=(answer, max(answer, longest)))


def programs(
    engine: Engine, videos: VideoClips, batcher: SlotBatcher, shapes: FixedShapes, label_engines: Sequence[Engine]
) -> Iterator[Callable[[], Any]]:
    """Yield calls that compile the programs, a few each; to be called `on_mesh`, in turn with requests.

    Args:
        label_engines: with the labels and the orders that are asked for.
    """
    yield from _encoders(videos, engine.config.clip.max_seconds)
    clip, modalities = blank_clip(engine), engine.predictor.modalities
    engines = [engine, *(engine.replace(modalities=left) for left in {modalities.replace("V", "")} - {modalities, ""})]
    for asked, size in itertools.product(engines, SIZES):
        yield functools.partial(asked.predictor.soft_tokens, [clip] * size)
    soft = np.asarray(engine.predictor.soft_tokens([clip]))
    for asked, size, length in itertools.product(label_engines, SIZES, shapes.prompts):
        many = jax.device_put(np.repeat(soft, size, axis=0))
        yield functools.partial(asked.predictor.compile_labels, many, length=length)
    yield from batcher.programs(jax.device_put(soft[0]))


def blank_clip(engine: Engine) -> ClipInput:
    """Return a clip that shows and says nothing."""
    config = engine.config
    frame = np.zeros((config.eva_vit.image_size, config.eva_vit.image_size, 3), np.uint8)
    features = np.zeros((3, config.projectors.feature_size), np.float32)
    return ClipInput("blank", "", features, np.ones(3, bool), frame=frame)


def _encoders(videos: VideoClips, max_seconds: float) -> Iterator[Callable[[], Any]]:
    spec = videos.spec

    def encode(count: int, **media: np.ndarray) -> None:
        parts = {"frame": None, "faces": None, "motion": None, "waveform": None} | media
        videos.encode([Item("blank")] * count, [ItemRead("", "", None, ClipMedia(**parts))] * count)

    if spec.face is not None:
        for size in ENCODED:
            yield functools.partial(encode, 1, faces=np.zeros((size, spec.face, spec.face, 3), np.uint8))
    for size in SIZES:
        if spec.motion is not None:
            frames, side = spec.motion
            yield functools.partial(encode, size, motion=np.zeros((frames, side, side, 3), np.uint8))
        longest = next(seconds for seconds in BUCKETS if seconds >= min(max_seconds + SOUND_SLACK, BUCKETS[-1]))
        for seconds in (seconds for seconds in BUCKETS if spec.sound and seconds <= longest):
            yield functools.partial(encode, size, waveform=np.zeros(int(seconds * SAMPLE_RATE), np.float32))
