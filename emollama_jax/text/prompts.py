"""What the model is asked about a clip, as token ids and places for soft tokens.

Axes: T tokens. A clip has S soft tokens, in this order: its image tokens, then MAE (face), VideoMAE (motion), HuBERT
(voice) and the image's class token (`models/projectors.py`).

Two layouts, the second for comparison with published numbers:

    trained     <s> "[INST] <video>" IMAGE "</video> <feature>" MAE VIDEOMAE HUBERT CLS
                "</feature> ... [/INST]" answer </s>
    reference   <s> <s> "[INST] <video>" IMAGE MAE VIDEOMAE HUBERT CLS
                "</video> <feature><FeatureHere></feature> ... [/INST]"

`trained` is how training rows look. `reference` is how the original generates: everything at the first place, the
second one left in the text. Every quoted text is encoded by itself, with the tokenizer's own leading space.

Whatever users type (subtitles, questions, answers) is plain text: `</s>` or `<VideoHere>` in it become ordinary pieces.
Special ids and soft tokens come from the layout alone, so that no subtitle can forge them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from emollama_jax.fields import check_fields, field
from emollama_jax.text.answers import MAX_WORDS, normalize_answer
from emollama_jax.text.labels import MERR, check_labels
from emollama_jax.text.tokenizers import Tokenizer

LAYOUTS = ("trained", "reference")
MISSING = ("zeros", "omit")
TASKS = ("emotion", "reason", "reason_v2")  # a label, the coarse caption, the fine caption
FEATURES = ("mae", "videomae", "hubert")

EMOTION_QUESTION = "Please determine which emotion label in the video represents: {labels}."

# What the reason tasks ask, one drawn for each sample.
QUESTION_SETS = {
    "released": (
        "Please analyze all the clues in the video and reason out the emotional label of the person in the video.",
        "What is the emotional state of the person in the video? Please tell me the reason.",
        "What are the facial expressions and vocal tone used in the video? What is the intended meaning behind his "
        "words? Which emotion does this reflect?",
        "Please integrate information from various modalities to infer the emotional category of the person in the "
        "video.",
        "Could you describe the emotion-related features of the individual in the video? What emotional category do "
        "they fall into?",
    ),
    "varied": (
        "How does this person feel, and what in the face, the voice and the words tells you so?",
        "Name the emotion of the speaker and explain which signs led you to it.",
        "Look at the face, listen to the voice and read the words: what emotion do they add up to, and why?",
        "Do face, voice and words agree? Describe each and say which emotion they express together.",
        "Describe what you see and hear of the person in this clip, then conclude how they feel.",
        "Which emotion would you ascribe to this person? Give the evidence first.",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """What is asked, and how it is laid out; the defaults are those of the released model's training."""

    layout: str = field("trained", choices=LAYOUTS)
    """Where the soft tokens stand: trained (as in training) or reference (as the original generates)."""
    labels: tuple[str, ...] = MERR
    """The emotions to choose from, in the order of the question."""
    tasks: tuple[str, ...] = field(("emotion",), choices=TASKS)
    """What is asked, one drawn for each sample: emotion (answered by a label), reason (the coarse caption) or reason_v2
    (the fine one)."""
    task_weights: tuple[float, ...] = field((), gt=0)
    """How often each task is drawn, relative to the others; none given is equally often."""
    emotion_question: str = EMOTION_QUESTION
    """The question of the emotion task; {labels} in it stands for the labels."""
    question_set: str = field("released", choices=tuple(QUESTION_SETS))
    """The questions of the reason tasks, one drawn for each sample: released or varied."""
    questions: tuple[str, ...] = ()
    """Questions of your own, in place of the set's."""
    missing: str = field("zeros", choices=MISSING)
    """What stands for a face, motion or voice that a clip does not have: zeros (a zero vector, projected) or omit
    (nothing: its token is left out)."""
    max_answer_words: int = field(MAX_WORDS, ge=1)
    """Words of an answer that are kept for training."""
    max_answer_tokens: int = field(1024, ge=1)
    """Tokens of an answer, with its end, that are kept for training; a longer one loses its end."""

    def __post_init__(self):
        check_fields(self)
        check_labels(self.labels)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks={self.tasks}: give one or more, each once")
        if self.task_weights and len(self.task_weights) != len(self.tasks):
            raise ValueError(f"task_weights={self.task_weights}: give one number above 0 for each of prompt.tasks")


class Turn(NamedTuple):
    """A request, and its answer unless it is the one to be generated."""

    request: str
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A clip's conversation as the model reads it."""

    tokens: Int[np.ndarray, " T"]
    """Ids; 0 where a soft token stands."""
    soft: Int[np.ndarray, " T"]
    """Which of the clip's soft tokens stands here; -1 where there is text."""
    is_answer: Bool[np.ndarray, " T"]
    """Which tokens are to be predicted: the answers and their ends."""


def emotion_question(labels: Sequence[str], question: str = EMOTION_QUESTION) -> str:
    """The question of the emotion task (`PromptConfig.emotion_question`), with these labels."""
    return question.replace("{labels}", ", ".join(labels))


def request(task: str, question: str) -> str:
    """A question behind its task's tag."""
    return f"[{task}] {question}"


def draw_request(config: PromptConfig, rng: np.random.Generator, tasks: Sequence[str] | None = None) -> tuple[str, str]:
    """(task, request) for one sample: a task by its weight, and any question of a reason task.

    `tasks`: those of `config.tasks` that the sample has an answer for; default: all.
    """
    tasks = config.tasks if tasks is None else tasks
    weights = dict(zip(config.tasks, config.task_weights or (1.0,) * len(config.tasks), strict=True))
    total = sum(weights[task] for task in tasks)
    task = tasks[rng.choice(len(tasks), p=[weights[task] / total for task in tasks])]
    if task == "emotion":
        return task, request(task, emotion_question(config.labels, config.emotion_question))
    pool = config.questions or QUESTION_SETS[config.question_set]
    return task, request(task, pool[rng.integers(len(pool))])


def training_answer(text: str, config: PromptConfig) -> str:
    """A label or caption as the answer of a training sample."""
    return normalize_answer(text, config.max_answer_words)


def encode_turns(
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    config: PromptConfig = PromptConfig(),
    *,
    subtitle: str = "",
    has_feature: Sequence[bool] = (True, True, True),
    image_tokens: int = 256,
) -> Sample:
    """A conversation about one clip; only the last turn may lack its answer.

    Example, in the trained layout, for one image token (soft tokens are written as their numbers in parentheses):

        encode_turns(tokenizer, [Turn("[emotion] How?", "sad")], subtitle="Oh", image_tokens=1)
        <s> [INST] <video> (0) </video> <feature> (1) (2) (3) (4)
            </feature> The person in video says: Oh.  [emotion] How?  [/INST] sad </s>      answer: the last two

    Args:
        subtitle: what the person says; the sentence about it is left out where there is nothing but white space.
        has_feature: of MAE, VideoMAE and HuBERT, for `config.missing="omit"`.
    """
    if not turns or any(turn.answer is None for turn in turns[:-1]):
        raise ValueError("give one turn or more, each but the last with its answer")
    writer = _Writer(tokenizer)
    features = [
        image_tokens + i for i, has in enumerate((*has_feature, True)) if has or config.missing == "zeros"
    ]  # and the class token, which every clip has
    said = f"The person in video says: {subtitle}. " if subtitle.strip() else ""
    first = f"</feature> {said} {turns[0].request}  [/INST]"  # two spaces before the request, with nothing said too
    writer.bos()
    if config.layout == "reference":
        writer.bos()
        writer.text("[INST] <video>")
        writer.soft_tokens([*range(image_tokens), *features])
        first = f"</video> <feature><FeatureHere>{first}"
    else:
        writer.text("[INST] <video>")
        writer.soft_tokens(range(image_tokens))
        writer.text("</video> <feature>")
        writer.soft_tokens(features)
    for i, turn in enumerate(turns):
        asked = f"[INST] {turn.request} [/INST]" if i else first
        if i:
            writer.bos()
        if config.layout == "reference":  # the original joins the texts and never ends an answer
            writer.text(asked + (turn.answer or ""))
            continue
        writer.text(asked)
        if turn.answer is not None:
            answer = [*tokenizer.encode(turn.answer, specials=False), tokenizer.eos_id]
            writer.ids(answer[: config.max_answer_tokens], is_answer=True)
    return writer.sample()


def encode_text(tokenizer: Tokenizer, request: str) -> Sample:
    """A request about no clip, as in "[INST] ... [/INST]", whose answer is to come."""
    writer = _Writer(tokenizer)
    writer.bos()
    writer.text(f"[INST] {request} [/INST]")
    return writer.sample()


class _Writer:
    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._columns: list[tuple[int, int, bool]] = []

    def ids(self, ids: Sequence[int], is_answer: bool = False) -> None:
        self._columns += [(token, -1, is_answer) for token in ids]

    def bos(self) -> None:
        if self._tokenizer.bos_id is not None:
            self.ids([self._tokenizer.bos_id])

    def text(self, text: str) -> None:
        self.ids(self._tokenizer.encode(text, specials=False))

    def soft_tokens(self, which: Sequence[int]) -> None:
        self._columns += [(0, index, False) for index in which]

    def sample(self) -> Sample:
        tokens, soft, is_answer = zip(*self._columns, strict=True)
        return Sample(np.array(tokens, np.int32), np.array(soft, np.int32), np.array(is_answer, bool))
