"""A describer without any endpoint: MiniGPT-v2, which Emotion-LLaMA is trained from, in this process.

Its adapters and image projector over the same LLaMA and EVA-ViT caption the peak frame, by a task that it was trained
on. The fine caption is inferred by the language model alone, without adapters: these know pictures, not reasons.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from emollama_jax.captions.describers import Describer, Scene, fill
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.infer.engine import Engine
from emollama_jax.infer.shared_batcher import SharedBatcher
from emollama_jax.infer.slots import GenerationRequest
from emollama_jax.io.chat import ChatReply
from emollama_jax.media.images import eva_vit_frame
from emollama_jax.models.emotion_llama import num_image_tokens
from emollama_jax.text.prompts import FEATURES, Sample
from emollama_jax.text.tokenizers import Tokenizer

KINDS = ("picture", "fine")  # it hears nothing
CAPTION = "[caption] {prompt}"
CHAT_MARK = "<|im_start|>"  # of vocabularies whose chats are marked so; LLaMA-2's have [INST]
TOGETHER = 8  # clips whose texts are generated at the same time; none depends on the others
VERSION = 1  # counted up when the same model would be asked in other words


def model_describers(
    engine: Engine, kinds: Sequence[str], prompts: Mapping[str, str], *, name: str
) -> dict[str, Describer]:
    """Makes the describers of these kinds, of KINDS.

    Args:
        engine: loaded with `inputs="frames"` for pictures.
        name: of the language model.
    """
    identity = hashlib.sha256(json.dumps(engine.identity(), sort_keys=True, default=str).encode()).hexdigest()[:32]
    model = _OwnModel(engine)
    describe = {"picture": model.caption, "fine": model.infer}
    return {
        kind: Describer(
            identity=f"{VERSION} {identity} {prompts[kind]}",
            describe=lambda scene, kind=kind: describe[kind](scene, prompts[kind]),
            name=f"MiniGPT-v2 over {name}" if kind == "picture" else name,
            concurrency=TOGETHER,
        )
        for kind in kinds
    }


class _OwnModel:
    def __init__(self, engine: Engine):
        self._engine, self._config = engine, engine.config
        self._with_adapters = SharedBatcher(engine.make_slot_batcher(TOGETHER))
        self._alone = SharedBatcher(engine.make_slot_batcher(TOGETHER, adapters=False))

    def caption(self, scene: Scene, prompt: str) -> ChatReply:
        config = self._config
        with Image.open(scene.frame) as image:
            frame = eva_vit_frame(image.convert("RGB"), config.eva_vit.image_size)
        features = np.zeros((len(FEATURES), config.projectors.feature_size), np.float32)
        clip = ClipInput(scene.frame.stem, "", features, np.zeros(len(FEATURES), bool), frame=frame)
        with self._engine.on_mesh():
            (soft,) = self._engine.predictor.soft_tokens([clip])
            asked = caption_prompt(self._engine.tokenizer, prompt, num_image_tokens(config.eva_vit, config.projectors))
            return self._reply(self._with_adapters, GenerationRequest(asked, config.generate, config.seed, soft))

    def infer(self, scene: Scene, prompt: str) -> ChatReply:
        asked = chat_prompt(self._engine.tokenizer, fill(prompt, scene.parts))
        with self._engine.on_mesh():
            return self._reply(self._alone, GenerationRequest(asked, self._config.generate, self._config.seed))

    def _reply(self, batcher: SharedBatcher, request: GenerationRequest) -> ChatReply:
        *_, last = batcher.stream(request)
        text = " ".join(self._engine.tokenizer.decode(last.completion.tokens).split())
        text = text if last.completion.ended else whole_sentences(text)
        return ChatReply("answered", text) if text else ChatReply("failed", "an empty answer")


def whole_sentences(text: str) -> str:
    """Leaves out a last sentence that is cut off; a text without the end of any stays."""
    return text[: max(map(text.rfind, ".!?")) + 1] or text


def caption_prompt(tokenizer: Tokenizer, prompt: str, image_tokens: int) -> Sample:
    """Encodes the task of captioning as MiniGPT-v2 was trained on it.

    Example, for one image token: <s> [INST] <Img> (0) </Img> [caption] Describe it. [/INST]
    """
    before = tokenizer.encode("[INST] <Img>", specials=False)
    after = tokenizer.encode(f"</Img> {CAPTION.replace('{prompt}', prompt)} [/INST]", specials=False)
    if tokenizer.bos_id is not None:
        before = [tokenizer.bos_id, *before]
    tokens = np.array([*before, *[0] * image_tokens, *after], np.int32)
    soft = np.full(len(tokens), -1, np.int32)
    soft[len(before) : len(before) + image_tokens] = np.arange(image_tokens)
    return Sample(tokens, soft, np.zeros(len(tokens), bool))


def chat_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes a request as the chat model expects it. What the text says is plain text, whatever it looks like."""
    plain = lambda part: tokenizer.encode(part, specials=False)
    if CHAT_MARK in (tokenizer.chat_template or ""):
        marked = lambda part: tokenizer.encode(part, specials=True)
        begin, end = f"{CHAT_MARK}user\n", f"<|im_end|>\n{CHAT_MARK}assistant\n"
        return [*marked(begin), *plain(text), *marked(end)]
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*first, *plain(f"[INST] {text} [/INST]")]
