"""The messages of a chat as what the model knows: one clip, earlier turns, and a question."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from emollama_jax.serve.errors import bad_request
from emollama_jax.serve.protocol import AudioUrlPart, ImagePart, InputAudioPart, Message, TextPart, VideoPart
from emollama_jax.serve.uploads import MediaFile, Uploads
from emollama_jax.text.prompts import TASKS, Turn

MediaPart = VideoPart | ImagePart | AudioUrlPart | InputAudioPart
TAG = re.compile(rf"\s*\[({'|'.join(TASKS)})\]\s*")


class Conversation(NamedTuple):
    """A chat.

    Attributes:
        media: the clip's parts with where they stand: a video or a picture, a sound, or a picture and a sound.
        question: the last one; what a system message says stands before the first.
    """

    media: tuple[tuple[MediaPart, str], ...]
    history: tuple[Turn, ...]
    question: str


def parse_messages(messages: Sequence[Message]) -> Conversation:
    """Raises ApiError for a chat that the model cannot follow."""
    media: list[tuple[MediaPart, str]] = []
    system: list[str] = []
    turns: list[tuple[str, list[str]]] = []  # role and texts; messages of one role in a row are one
    for i, message in enumerate(messages):
        role, where = message.role, f"messages.{i}"
        texts, found = _content(message, where)
        media += found
        if role in ("system", "developer"):
            if turns:
                raise bad_request("a system message stands before all others", where)
            system += texts
            continue
        if found and role != "user":
            raise bad_request(f"a clip is part of a message of the user, not of the {role}", where)
        if turns and turns[-1][0] == role:
            turns[-1][1].extend(texts)
        elif not turns and role != "user":
            raise bad_request("the first message after the system's is the user's", where)
        else:
            turns.append((role, texts))
    if not turns or turns[-1][0] != "user":
        raise bad_request("the last message is the user's question", "messages")
    joined = ["\n".join(filter(None, (text.strip() for text in texts))) for _, texts in turns]
    joined[0] = " ".join(filter(None, [*(text.strip() for text in system), joined[0]]))
    pairs = zip(joined[:-1:2], joined[1::2], strict=True)
    return Conversation(_checked(media), tuple(Turn(*pair) for pair in pairs), joined[-1])


def _content(message: Message, where: str) -> tuple[list[str], list[tuple[MediaPart, str]]]:
    if isinstance(message.content, str):
        return [message.content], []
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    others = [
        (part, f"{where}.content.{i}") for i, part in enumerate(message.content) if not isinstance(part, TextPart)
    ]
    return texts, others


def _checked(media: list[tuple[MediaPart, str]]) -> tuple[tuple[MediaPart, str], ...]:
    kinds = sorted(part.type.replace("input_audio", "audio_url") for part, _ in media)
    if not kinds:
        raise bad_request("no clip: send a video_url, image_url, audio_url or input_audio part", "messages", "no_clip")
    if kinds not in (["video_url"], ["image_url"], ["audio_url"], ["audio_url", "image_url"]):
        what = "one clip a request: a video, a picture, a sound, or a picture and a sound"
        raise bad_request(f"{what}, not {', '.join(kinds)}", media[-1][1], "several_clips")
    return tuple(media)


async def take_media(uploads: Uploads, conversation: Conversation) -> tuple[MediaFile | None, MediaFile | None]:
    """Return the file of a chat's pictures and that of its sound. Raises ApiError."""
    picture = sound = None
    for part, where in conversation.media:
        if isinstance(part, InputAudioPart):
            sent = part.input_audio.data.removeprefix("data:;base64,")
            name = f"clip.{part.input_audio.format}"
            file = await uploads.from_base64(sent, f"{where}.input_audio.data", name=name, says_audio=True)
        else:
            url = getattr(part, part.type).url
            file = await uploads.from_url(url, f"{where}.{part.type}.url", says_audio=part.type == "audio_url")
        is_sound = part.type in ("audio_url", "input_audio")
        if is_sound != (file.kind == "audio"):
            raise bad_request(f"the part is {part.type}, and its content of the kind {file.kind}", where, "wrong_kind")
        picture, sound = (picture, file) if is_sound else (file, sound)
    return picture, sound


def emotion_question_of(question: str) -> str | None:
    """Return the question of a choice among labels without its tag; None for none, which takes the model's own.

    A choice is asked under [emotion], the task whose answer is a label. Raises ApiError for another tag.
    """
    if (tag := TAG.match(question)) is not None:
        if tag[1] != "emotion":
            raise bad_request(f"a choice is asked under [emotion], not [{tag[1]}]", "messages")
        question = question[tag.end() :]
    return question.strip() or None
