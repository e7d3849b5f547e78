"""The clips of the synthetic data set: the factors of each label, and how a clip is rendered from them.

Axes: H x W pixels, t frames, S samples.

Each clip has three factors, its face, its voice and its words, each of which has three levels. A label stands for one
level of each:

                  lively voice          hushed voice          firm voice
    smile         happy    outcome      neutral  news         contempt plan
    drawn face    worried  plan         sad      outcome      doubt    news
    wide eyes     surprise news         fear     plan         angry    outcome

The level of the words stands beside each label (a Latin square). So one factor leaves three labels, equally likely, and
any two determine the label. In one clip of ten one factor, chosen uniformly, is unclear: a mixture of its levels, which
carries no information; in the split `train` in one of four, from which all three are learnt to count. All three factors
still determine the label of every clip, since the two clear ones do; a classifier that uses a fixed pair of factors
fails in two thirds of these clips.

Everything else (identity and position of the face, strength and timing of its movement, the speaker, the sentence) is
drawn for each clip from the seed, the split and the clip's number, independently of the label.
"""

import zlib
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from emollama_jax.synthetic.face import EXPRESSIONS, Look, draw_face, motion, random_look
from emollama_jax.synthetic.voice import TONES, Tone, random_speaker, voice
from emollama_jax.synthetic.words import AU_WORDS, UNCLEAR, sentence
from emollama_jax.text.labels import MERR

VERSION = 5  # counted up when the same seed would give other clips or captions
FPS = Fraction(25, 2)
NUM_FRAMES = (22, 30)  # minimum and maximum of a clip
UNCLEAR_SHARE = 0.1  # of clips
UNCLEAR_SHARE_IN_TRAINING = 0.25
ASPECTS = ("look", "peak", "talk", "voice", "words", "speaker")
OF_PERSON = ("look", "speaker")  # aspects that all clips of a person share


class Factors(NamedTuple):
    """The levels of a clip's factors."""

    face: str
    """smile, drawn, wide or unclear."""
    voice: str
    """lively, hushed, firm or unclear."""
    words: str
    """outcome, news, plan or unclear."""


LABELS = {
    "happy": Factors("smile", "lively", "outcome"),
    "neutral": Factors("smile", "hushed", "news"),
    "contempt": Factors("smile", "firm", "plan"),
    "worried": Factors("drawn", "lively", "plan"),
    "sad": Factors("drawn", "hushed", "outcome"),
    "doubt": Factors("drawn", "firm", "news"),
    "surprise": Factors("wide", "lively", "news"),
    "fear": Factors("wide", "hushed", "plan"),
    "angry": Factors("wide", "firm", "outcome"),
}


@dataclass(frozen=True, slots=True)
class ClipSpec:
    """Everything that determines a clip."""

    name: str
    label: str
    split: str
    factors: Factors
    """As rendered: one may be unclear."""
    num_frames: int
    peak_index: int
    """The frame in which the expression is strongest."""
    seed: int
    """Of everything that is neither label nor factor."""
    look: int
    """The seed of the face's identity and position."""


def clip_spec(split: str, index: int, seed: int = 0, people: int | None = None) -> ClipSpec:
    """The `index`-th clip of a split; the other clips and how many there are do not matter.

    Labels come in blocks of nine, each a permutation of all labels. `people` is how many different people there are in
    all splits, each always in the same position; None draws a new one for every clip.
    """
    source = (seed, zlib.crc32(split.encode()))
    label = MERR[np.random.default_rng((*source, 0, index // len(MERR))).permutation(len(MERR))[index % len(MERR)]]
    rng = np.random.default_rng((*source, 1, index))
    factors = LABELS[label]
    if rng.uniform() < (UNCLEAR_SHARE_IN_TRAINING if split == "train" else UNCLEAR_SHARE):
        factors = factors._replace(**{Factors._fields[rng.integers(len(factors))]: UNCLEAR})
    num_frames = int(rng.integers(NUM_FRAMES[0], NUM_FRAMES[1] + 1))
    peak_index = round(rng.uniform(0.4, 0.7) * num_frames)
    clip_seed = int(rng.integers(2**32))
    look = clip_seed
    if people is not None:
        look = int(np.random.default_rng((seed, rng.integers(people))).integers(2**32))
    return ClipSpec(
        name=f"{split}_{index:06d}",
        label=label,
        split=split,
        factors=factors,
        num_frames=num_frames,
        peak_index=peak_index,
        seed=clip_seed,
        look=look,
    )


def clip_rng(spec: ClipSpec, aspect: str) -> np.random.Generator:
    """The random generator of one of ASPECTS: a stream of its own, so that no aspect depends on another's draws."""
    return np.random.default_rng((spec.look if aspect in OF_PERSON else spec.seed, ASPECTS.index(aspect)))


def clip_look(spec: ClipSpec) -> Look:
    """The identity and position of the face."""
    return random_look(clip_rng(spec, "look"))


def peak_aus(spec: ClipSpec) -> dict[str, float]:
    """The action units at the peak, from 0 to 1, by name in order; all of `AU_WORDS`."""
    rng = clip_rng(spec, "peak")
    strength = rng.uniform(0.75, 1) * rng.uniform(0.85, 1, len(AU_WORDS))
    levels = list(EXPRESSIONS.values()) if spec.factors.face == UNCLEAR else [EXPRESSIONS[spec.factors.face]]
    most = [np.mean([level.get(au, 0.0) for level in levels]) for au in AU_WORDS]
    return {au: float(value) for au, value in zip(AU_WORDS, strength * most, strict=True)}


def clip_aus(spec: ClipSpec) -> list[dict[str, float]]:
    """The action units of every frame: up to the peak and back, with small lip movements as in speech."""
    frame, come = np.arange(spec.num_frames), motion(spec.peak_index, spec.num_frames)
    pace = clip_rng(spec, "talk").uniform(0.8, 1.4)  # not the voice's, which the lips would reveal
    talk = 0.12 * np.abs(np.sin(pace * frame)) * np.minimum(1, frame / 3) * (1 - come)
    aus = [{au: float(part * value) for au, value in peak_aus(spec).items()} for part in come]
    for values, lips in zip(aus, talk, strict=True):
        for au in ("AU25", "AU26"):
            values[au] += float(lips)
    return aus


def clip_voice(spec: ClipSpec) -> Float[np.ndarray, " S"]:
    """The sound, float32, 16 kHz, as long as the video."""
    if spec.factors.voice == UNCLEAR:
        tone = Tone(*(float(np.mean([getattr(t, f.name) for t in TONES.values()])) for f in fields(Tone)))
    else:
        tone = TONES[spec.factors.voice]
    speaker = random_speaker(clip_rng(spec, "speaker"))
    return voice(speaker, tone, float(spec.num_frames / FPS), clip_rng(spec, "voice"))


def clip_sentence(spec: ClipSpec) -> str:
    """The spoken sentence, which is the subtitle."""
    return sentence(spec.factors.words, clip_rng(spec, "words"))


def render_clip(spec: ClipSpec) -> tuple[UInt8[np.ndarray, "t H W 3"], Float[np.ndarray, " S"]]:
    """(frames, samples): `FPS` frames a second, RGB, and the sound that goes with them."""
    look = clip_look(spec)
    return np.stack([draw_face(aus, look) for aus in clip_aus(spec)]), clip_voice(spec)
