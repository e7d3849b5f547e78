"""Two photos and a real language model: adapters and projectors learn which emotion belongs to which, and say so."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from emollama_jax import cli
from emollama_jax.config import GenerateConfig, load_config
from emollama_jax.data.packing import pack_rows
from emollama_jax.infer.slots import GenerationRequest, SlotBatcher
from emollama_jax.media.images import eva_vit_frame
from emollama_jax.models.emotion_llama import EmotionLlama, num_image_tokens
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.projectors import NUM_FEATURE_TOKENS
from emollama_jax.text.labels import MER2023
from emollama_jax.text.prompts import Turn, emotion_question, encode_turns, request
from emollama_jax.train.step import init_state, make_step, multimodal_loss
from emollama_jax.weights.emotion_llama import load_emotion_llama
from emollama_jax.weights.pretrained import load_base_tokenizer
from emollama_jax.weights.trained import open_trained
from emollama_jax.weights.trained_export import write_folder
from tests.weights.exported import trained_tensors

LABELS = ("angry", "happy")
SMOLLM2 = load_config("smollm2_135m")
CONFIG = dataclasses.replace(
    SMOLLM2, llama=dataclasses.replace(SMOLLM2.llama, remat="none"), eva_vit=load_config("tiny").eva_vit
)
ASK = request("emotion", emotion_question(MER2023))


@pytest.fixture(scope="module")
def base(smollm2_gguf, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "smollm2"
    assert cli.main(["convert", str(smollm2_gguf), str(path), "--dtype", "float32"]) == 0
    return path


@pytest.mark.slow
def test_learning_clips(base, real_media, tmp_path):
    tokenizer = load_base_tokenizer(base, CONFIG.llama.vocab_size)
    encoder = EvaVit(CONFIG.eva_vit, rngs=nnx.Rngs(0))  # its weights cannot be had here
    loaded, _ = load_emotion_llama(base, CONFIG)
    model = EmotionLlama(loaded.llama, loaded.projectors, encoder)
    images = num_image_tokens(CONFIG.eva_vit, CONFIG.projectors)
    samples = [encode_turns(tokenizer, [Turn(ASK, label)], image_tokens=images) for label in LABELS]
    length = sum(len(sample.tokens) for sample in samples)
    batch = pack_rows([samples], length=length, clips_per_row=2, soft_per_clip=images + NUM_FEATURE_TOKENS)
    frames = np.stack([eva_vit_frame(photo, CONFIG.eva_vit.image_size) for photo in real_media.stills])
    batch = dataclasses.replace(batch, frames=frames[None], features=np.zeros((1, 2, 3, 1024), np.float32))

    optimizer = optax.adamw(1e-3)
    graphdef, frozen, state = init_state(model, optimizer)
    step = make_step(graphdef, optimizer, multimodal_loss)
    for number in range(60):
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        print(f"step {number}: loss {float(metrics['loss']):.4f}")
        if metrics["loss"] < 0.02:
            break
    trained = nnx.merge(graphdef, state.trainable, frozen)

    def answers(model: EmotionLlama) -> list[str]:
        encode = nnx.jit(lambda model, frames: model.soft_tokens(jnp.zeros((2, 1, 3, 1024)), frames=frames))
        prompt = encode_turns(tokenizer, [Turn(ASK)], image_tokens=images)  # the same for both
        limit = GenerateConfig(max_new_tokens=8)
        soft = encode(model, jnp.asarray(frames[:, None]))
        batcher = SlotBatcher(model.llama, [tokenizer.eos_id])
        found = batcher.run(GenerationRequest(prompt, limit, soft=of_clip) for of_clip in soft)
        return [tokenizer.decode(answer.tokens).strip() for answer in found]

    assert answers(trained) == list(LABELS)

    folder = tmp_path / "adapter"
    folder.mkdir()
    write_folder(folder, trained_tensors(trained), CONFIG.lora)
    assert open_trained(folder).lora.targets == ("q_proj", "v_proj")
    again, _ = load_emotion_llama(base, CONFIG, trained=folder)
    assert answers(EmotionLlama(again.llama, again.projectors, encoder)) == list(LABELS)
