"""What the page's buttons do, over the service of the server."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from emollama_jax.infer.predictor import task_questions
from emollama_jax.media.kinds import HEAD, kind_of
from emollama_jax.serve.answer_text import AnswerText
from emollama_jax.serve.demo import figures
from emollama_jax.serve.errors import ApiError, bad_request
from emollama_jax.serve.jobs import Encoded, Finished, Generation, Scored, Started, Tokens
from emollama_jax.serve.requests import deadline
from emollama_jax.serve.service import AskSettings, Service
from emollama_jax.serve.uploads import MediaFile, readable
from emollama_jax.text.prompts import Turn

EMOTION, REASON = "emotion", "reason"


@dataclass(frozen=True)
class Asked:
    """What stands in the page's fields.

    Attributes:
        task: emotion or reason; "" asks the question.
        labels: separated by commas; "" are the model's own.
    """

    video: str
    subtitle: str = ""
    labels: str = ""
    orders: int = 1
    temperature: float = 0.0
    task: str = ""
    question: str = ""


@dataclass(frozen=True)
class Talk:
    """The conversation about one clip.

    Attributes:
        key: of the clip and its words: another one begins anew.
        found: the words that were found in the clip, which the page shows as if they were typed.
        said: what the page shows, (who, text).
        turns: what the model is told of it.
    """

    key: str = ""
    found: str = ""
    said: tuple[tuple[str, str], ...] = ()
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Shown:
    """What the page shows; None leaves a part as it is."""

    talk: Talk
    bars: str | None = None
    seen: str | None = None
    subtitle: str | None = None


async def ask(service: Service, asked: Asked, talk: Talk) -> AsyncIterator[Shown]:
    """Answer, and yield what is to be shown as it comes. Raises ApiError."""
    if not asked.video:
        raise bad_request("no clip yet: choose a video, record one, or take an example")
    config = service.engine.config.prompt
    labels = tuple(label.strip() for label in asked.labels.split(",") if label.strip()) or None
    orders = max(1, min(asked.orders, len(labels or config.labels)))
    engine = service.engine_for(AskSettings(labels, orders=orders))
    # Typed words that are those found are left to be found again: the clip is the same then.
    given = "" if asked.subtitle.strip() == talk.found else asked.subtitle.strip()
    key = f"{asked.video} {given}"
    talk = talk if talk.key == key else Talk(key, talk.found if not given else "")
    tagged = task_questions(engine.config.prompt, asked.task) if asked.task else (asked.question.strip(),)
    if not tagged[0]:
        raise bad_request("no question yet: type one, or press a button above")
    spoken = asked.question.strip() if not asked.task else {EMOTION: "Which emotion?", REASON: "Why?"}[asked.task]
    said = (*talk.said, ("user", spoken))
    yield Shown(Talk(key, talk.found, (*said, ("assistant", "…")), talk.turns))
    with service.admitted():
        async with deadline(service.settings.request_timeout):
            path = Path(asked.video)
            clip = await service.open_clip(await asyncio.to_thread(_media_file, path), subtitle=given)
        generation = None
        if asked.task != EMOTION:
            generate = service.generate_config(temperature=asked.temperature)
            generation = Generation(question=tagged[0], generate=generate)
        scores = generation is None or not talk.turns
        text, answer = AnswerText(engine.tokenizer), ""
        asking = service.asked(clip, engine, scores_labels=scores, history=talk.turns, generation=generation)
        async with asking as events:
            async for event in events:
                match event:
                    case Encoded():
                        subtitle = clip.item.subtitle or event.encoded.clip.subtitle
                        talk = Talk(key, "" if given else subtitle, talk.said, talk.turns)
                        waiting = Talk(key, talk.found, (*said, ("assistant", "…")), talk.turns)
                        yield Shown(waiting, seen=figures.seen(event.encoded, subtitle), subtitle=subtitle)
                    case Scored():
                        bars = figures.bars(event.fields["probabilities"], event.spread, orders)
                        if generation is None:
                            best = event.fields["label"]
                            answer = best
                            said = (*said, ("assistant", f"{best} ({event.fields['probabilities'][best]:.0%})"))
                            yield Shown(Talk(key, talk.found, said, talk.turns), bars)
                        else:
                            yield Shown(Talk(key, talk.found, (*said, ("assistant", "…")), talk.turns), bars)
                    case Tokens():
                        answer += text.push(event.tokens)
                        yield Shown(Talk(key, talk.found, (*said, ("assistant", answer or "…")), talk.turns))
                    case Finished() if generation is not None:
                        answer += text.finish()
                        said = (*said, ("assistant", answer or "(nothing)"))
                    case Started() | Finished():
                        pass
    yield Shown(Talk(key, talk.found, said, (*talk.turns, Turn(tagged[0], answer))))


def _media_file(path: Path) -> MediaFile:
    """The uploaded file. Raises ApiError for what is no clip."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            digest.update(head)
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise bad_request("the clip is no longer there; choose it again") from error
    if kind_of(head) not in ("video", "image"):
        raise ApiError(415, "that is no video; choose another file", "no_clip")
    return MediaFile(path, "video", digest.hexdigest(), readable(path.name) or "clip")
