"""Who describes a clip in words: measurements of our own, or a model behind a chat endpoint, by one interface."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

from emollama_jax.captions.parts import Parts, clues
from emollama_jax.captions.picture import describe_picture, picture_identity
from emollama_jax.errors import UserError
from emollama_jax.io.chat import ChatClient, ChatConfig, ChatReply, audio_part, image_part, text_part
from emollama_jax.io.json_files import read_json_object
from emollama_jax.io.worker_pool import WorkerDied, run_apart
from emollama_jax.media.audio import read_sound, wav_bytes
from emollama_jax.media.face_mesh import load_mesh

PROMPTS: Mapping[str, str] = MappingProxyType(
    {
        "picture": "Describe this frame of a video in one or two plain sentences: the person, what they do, and the "
        "setting. Say only what can be seen. Name no emotion.",
        "voice": "Listen to the person in this recording. In one plain sentence, say how the voice sounds: its pitch, "
        "loudness, pace and pauses, and what else colours it. Repeat no words and name no emotion.",
        "fine": "These are clues about the person in a short video.\n\n{clues}\n\nIn three to five sentences, say how "
        "the face, the voice, the words and the setting together make clear that the person feels {label}. Use the "
        "clues alone, and where one of them does not fit, say so. Write plain prose without headings or lists.",
    }
)


@dataclass(frozen=True, slots=True)
class Scene:
    """A clip as it is described."""

    frame: Path
    """The picture of the peak."""
    video: Path
    parts: Parts
    """What is known of it so far."""


@dataclass(frozen=True)
class Describer:
    """Makes a text about a clip."""

    identity: str
    """Everything that the text depends on beside the clip: the method or the model, and the prompt."""
    describe: Callable[[Scene], ChatReply]
    """May be called from several threads."""
    name: str
    """As it is recorded beside each text."""
    concurrency: int = 1
    """Clips that are described at a time."""
    stop: Callable[[], None] = lambda: None
    """Ends what other threads ask."""


def measured_picture(bundle: str = "") -> Describer:
    """Makes the describer of pictures that needs no model.

    Args:
        bundle: of a mesh, which finds faces where there is no detector; "" for none.
    """
    mesh = load_mesh(bundle) if bundle else None

    def describe(scene: Scene) -> ChatReply:
        with Image.open(scene.frame) as image:
            return ChatReply("answered", describe_picture(np.asarray(image.convert("RGB")), mesh))

    return Describer(picture_identity(bundle), describe, "measured")


def chat_describers(config: ChatConfig, kinds: Sequence[str], prompts: Mapping[str, str]) -> dict[str, Describer]:
    """Makes the describers of these kinds, `picture`, `voice` and `fine`, that ask one model behind an endpoint.

    Raises:
        UserError: the package openai is not installed.
    """
    client, decoding = ChatClient(config), threading.Lock()  # by one child process, which is kept

    def describe(scene: Scene, *, kind: str) -> ChatReply:
        content = [text_part(fill(prompts[kind], scene.parts))]
        if kind == "picture":
            content.append(image_part(scene.frame.read_bytes(), "image/png"))
        if kind == "voice":
            try:
                with decoding:
                    sound = run_apart(read_sound, scene.video)
                content.append(audio_part(wav_bytes(sound)))
            except (UserError, WorkerDied) as error:
                return ChatReply("failed", f"its sound cannot be decoded ({error})")
        reply = client.complete([{"role": "user", "content": content}])
        text = " ".join(reply.text.split())
        if reply.status == "answered" and not text:
            return ChatReply("failed", "an empty answer")
        return ChatReply(reply.status, text)

    return {
        kind: Describer(
            identity=f"{config.address.rstrip('/')} {config.model} {prompts[kind]}",
            describe=lambda scene, kind=kind: describe(scene, kind=kind),
            name=config.model,
            concurrency=config.concurrency,
            stop=client.stop,
        )
        for kind in kinds
    }


def fill(prompt: str, parts: Parts) -> str:
    """Puts what is known of a clip in the place of {clues} and {label}."""
    return prompt.replace("{clues}", clues(parts)).replace("{label}", parts.label)


def read_prompts(path: Path | None) -> Mapping[str, str]:
    """Reads prompts from JSON, {"picture": "...", "voice": "...", "fine": "..."}; what is not given is as in PROMPTS.

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
