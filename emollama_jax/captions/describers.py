"""Who describes a clip in words: measurements of our own, or a model behind a chat endpoint, by one interface."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

from emollama_jax.captions.parts import Parts, clues
from emollama_jax.captions.picture import describe_picture, picture_identity
from emollama_jax.errors import UserError
from emollama_jax.io.chat import ChatClient, ChatConfig, ChatReply, image_part, text_part
from emollama_jax.io.json_files import read_json_object

PROMPTS: Mapping[str, str] = MappingProxyType(
    {
        "picture": "Describe this frame of a video in one or two plain sentences: the person, what they do, and the "
        "setting. Say only what can be seen. Name no emotion.",
        "fine": "These are clues about the person in a short video.\n\n{clues}\n\nIn three to five sentences, say how "
        "the face, the voice, the words and the setting together make clear that the person feels {label}. Use the "
        "clues alone, and where one of them does not fit, say so. Write plain prose without headings or lists.",
    }
)


@dataclass(frozen=True)
class Describer:
    """Makes a text about a clip."""

    identity: str
    """Everything that the text depends on beside the clip: the method or the model, and the prompt."""
    describe: Callable[[Path, Parts], ChatReply]
    """Is given the file of the peak frame and what is known of the clip so far. May be called from several threads."""
    name: str
    """As it is recorded beside each text."""
    concurrency: int = 1
    """Clips that are described at a time."""
    stop: Callable[[], None] = lambda: None
    """Ends what other threads ask."""


def measured_picture() -> Describer:
    """Makes the describer of pictures that needs no model."""

    def describe(frame: Path, parts: Parts) -> ChatReply:
        with Image.open(frame) as image:
            return ChatReply("answered", describe_picture(np.asarray(image.convert("RGB"))))

    return Describer(picture_identity(), describe, "measured")


def chat_describers(config: ChatConfig, kinds: tuple[str, ...], prompts: Mapping[str, str]) -> dict[str, Describer]:
    """Makes the describers of these kinds, `picture` and `fine`, that ask one model.

    Raises:
        UserError: the package openai is not installed.
    """
    client = ChatClient(config)

    def describe(frame: Path, parts: Parts, *, kind: str) -> ChatReply:
        content = [text_part(prompts[kind].replace("{clues}", clues(parts)).replace("{label}", parts.label))]
        if kind == "picture":
            content.append(image_part(frame.read_bytes(), "image/png"))
        reply = client.complete([{"role": "user", "content": content}])
        text = " ".join(reply.text.split())
        if reply.status == "answered" and not text:
            return ChatReply("failed", "an empty answer")
        return ChatReply(reply.status, text)

    return {
        kind: Describer(
            identity=f"{config.address.rstrip('/')} {config.model} {prompts[kind]}",
            describe=lambda frame, parts, kind=kind: describe(frame, parts, kind=kind),
            name=config.model,
            concurrency=config.concurrency,
            stop=client.stop,
        )
        for kind in kinds
    }


def read_prompts(path: Path | None) -> Mapping[str, str]:
    """Reads prompts from JSON, {"picture": "...", "fine": "..."}; what is not given is as in PROMPTS.

    `fine` may hold {clues} and {label}. Raises UserError for a file that is not of this form.
    """
    if path is None:
        return PROMPTS
    try:
        given = read_json_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: cannot be read as JSON ({error}); write {{"fine": "..."}}') from error
    if wrong := [
        key for key, text in given.items() if key not in PROMPTS or not isinstance(text, str) or not text.strip()
    ]:
        raise UserError(f"{path}: {wrong[0]!r} is no prompt; give texts for {', '.join(PROMPTS)}")
    return {**PROMPTS, **given}
