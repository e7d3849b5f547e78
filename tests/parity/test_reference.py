"""The whole model against numbers of the reference's own code, at tiny sizes (tests/data/reference_tiny).

The files hold what the reference computed in float32: encoder outputs, soft tokens, embeddings of the training layout,
losses, logits, gradients of all that is trained, and greedy generation in its own layout.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from emollama_jax.config import DEFAULT_SHARDING, GenerateConfig, load_config
from emollama_jax.data.packing import pack_rows
from emollama_jax.infer.slots import GenerationRequest, SlotBatcher
from emollama_jax.models.emotion_llama import EmotionLlama, insert_soft_tokens, is_trainable
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.sharding import make_mesh, use_mesh
from emollama_jax.text.prompts import PromptConfig, Turn, encode_turns
from emollama_jax.text.tokenizers import load_tokenizer
from emollama_jax.train.step import init_state, make_step, multimodal_loss
from emollama_jax.weights.emotion_llama import load_emotion_llama
from tests.weights.exported import trained_tensors

pytest.importorskip("torch")  # the reference's files are torch's

DATA = Path(__file__).parents[1] / "data/reference_tiny"
IO = json.loads((DATA / "io.json").read_text())
CONFIG = dataclasses.replace(load_config("tiny"), lora=LoRAConfig(rank=8, alpha=16.0, dropout=0.0))
PROMPT = PromptConfig(max_answer_tokens=IO["max_txt_len"])
IMAGE_TOKENS, SOFT = 4, 8
LENGTH = 192  # both samples fit into a row


@pytest.fixture(scope="module")
def expected():
    with np.load(DATA / "io.npz") as file:
        return dict(file)


def load_model(mesh=None):
    return load_emotion_llama(
        DATA / "llama",
        CONFIG,
        trained=DATA / "checkpoint_0.pth",
        eva_vit=DATA / "eva_vit_tiny.pth",
        ln_vision=DATA / "ln_vision.pth",
        mesh=mesh,
    )[0]


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module", params=[1, 8])
def placed(request):
    """(devices, a mesh of them, the model loaded onto it, its loss as a function of a batch)."""
    side = round(request.param ** (1 / 3))
    mesh = make_mesh(dict.fromkeys(("data", "fsdp", "tensor"), side), jax.devices()[: request.param])
    model = load_model(mesh)
    graphdef, state = nnx.split(model)
    compiled = jax.jit(lambda state, batch: multimodal_loss(nnx.merge(graphdef, state), batch, None)[0])
    return request.param, mesh, model, lambda batch: compiled(state, batch)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DATA / "llama")


@pytest.fixture(scope="module")
def samples(tokenizer):
    return [encoded(tokenizer, i, PROMPT, answered=True) for i in range(2)]


def encoded(tokenizer, i, config, *, answered):
    """The i-th instruction, taken apart at its known places, through our own prompt."""
    instruction = IO["instructions"][i]
    said, request = instruction.removeprefix(
        "<video><VideoHere></video> <feature><FeatureHere></feature> The person in video says: "
    ).split(".  [")
    turn = Turn("[" + request.removesuffix(" "), IO["answers"][i] if answered else None)
    return encode_turns(tokenizer, [turn], config, subtitle=said, image_tokens=IMAGE_TOKENS)


def batch_of(rows, expected, *, loss_average="token", clips_per_row=2):
    """Packed rows of (clip, sample) pairs, with the clips' image tokens and features."""
    batch = pack_rows(
        [[sample for _, sample in row] for row in rows],
        length=LENGTH,
        clips_per_row=clips_per_row,
        soft_per_clip=SOFT,
        loss_average=loss_average,
    )
    clips = {}
    for name, values in (("image_tokens", expected["vit"]), ("features", expected["features"])):
        clips[name] = np.zeros((len(rows), clips_per_row, *values.shape[1:]), np.float32)
        for b, row in enumerate(rows):
            for k, (clip, _) in enumerate(row):
                clips[name][b, k] = values[clip]
    return jax.tree.map(jnp.asarray, dataclasses.replace(batch, **clips))


@pytest.fixture(scope="module")
def batch(samples, expected):
    """A sample a row, and every target of the same weight, as in the reference's batch of both."""
    return batch_of([[(0, samples[0])], [(1, samples[1])]], expected)


@nnx.jit
def loss_and_weight(model, batch, key=None):
    return multimodal_loss(model, batch, key)


@nnx.jit
def logits_of(model, batch):
    soft = soft_tokens_of(model, batch)
    return model.llama.logits(model(batch.tokens, soft, batch.soft_index, batch.positions, batch.segment_ids))


def soft_tokens_of(model, batch):
    return model.soft_tokens(batch.features, frames=batch.frames, image_tokens=batch.image_tokens)


def close(ours, theirs, tolerance, what):
    error = np.abs(np.asarray(ours, np.float64) - theirs).max()
    print(f"{what}: max error {error:.1e} of values up to {np.abs(theirs).max():.2f}")
    assert np.shape(ours) == np.shape(theirs) and error <= tolerance, what


def test_the_encoder(model, expected):
    pixels = np.moveaxis(expected["images"], 1, -1)
    close(nnx.jit(lambda model, x: model(x))(model.eva_vit, pixels), expected["vit"], 1e-4, "vit")


def test_the_soft_tokens(model, expected):
    found = model.projectors(jnp.asarray(expected["vit"]), jnp.asarray(expected["features"]))
    close(found, expected["encoded"], 1e-4, "soft tokens")


def test_every_token_is_in_its_place(model, batch, expected):
    x = insert_soft_tokens(model.llama.embed_tokens(batch.tokens), soft_tokens_of(model, batch), batch.soft_index)
    for row, length in enumerate(expected["mask"].sum(1)):
        close(x[row, :length], expected["embeds"][row, :length], 1e-5, f"embeddings of sample {row}")
        targets = np.flatnonzero(batch.loss_weights[row]) + 1
        assert np.array_equal(targets, np.flatnonzero(expected["labels"][row] >= 0))
        assert np.array_equal(batch.tokens[row, targets], expected["labels"][row, targets])
        assert batch.segment_ids[row].sum() == length


def test_the_losses(model, batch, expected):
    loss, weight = loss_and_weight(model, batch)
    close(loss, expected["loss"], 1e-4, "loss")
    assert weight == len(expected["target_positions"])
    for row, theirs in enumerate(expected["per_sample_loss"]):
        close(
            loss_and_weight(model, jax.tree.map(lambda x: x[row : row + 1], batch))[0],  # noqa: B023
            theirs,
            1e-4,
            "sample's loss",
        )


def test_the_logits(model, batch, expected):
    logits = np.asarray(logits_of(model, batch))
    rows, columns = expected["target_positions"].T
    close(logits[rows, columns - 1], expected["target_logits"], 1e-3, "logits")
    for row, length in enumerate(expected["mask"].sum(1)):
        here = np.s_[row, :length]
        assert np.array_equal(logits[here].argmax(-1), expected["argmax"][here])
        close(jax.nn.logsumexp(logits[here], axis=-1), expected["logsumexp"][here], 1e-3, "logsumexp")


@pytest.mark.slow
def test_every_gradient(model, batch, expected):
    graphdef, trainable, frozen = nnx.split(model, is_trainable, ...)
    grads = jax.grad(lambda t: multimodal_loss(nnx.merge(graphdef, t, frozen), batch, None)[0])(trainable)
    like = nnx.merge(graphdef, grads, frozen)
    found = trained_tensors(like)
    theirs = {name.removeprefix("grad:"): value for name, value in expected.items() if name.startswith("grad:")}
    assert set(found) == set(theirs)
    for name, value in theirs.items():
        error = np.linalg.norm(found[name] - value) / np.linalg.norm(value)
        print(f"{name}: relative error {error:.1e}")
        assert error <= 1e-3, name


@pytest.mark.parametrize("together", [True, False], ids=["batched", "single"])
def test_greedy_generation_in_the_references_layout(model, tokenizer, expected, together):
    prompt = dataclasses.replace(PROMPT, layout="reference")
    prompts = [encoded(tokenizer, i, prompt, answered=False) for i in range(2)]
    assert [len(p.tokens) for p in prompts] == expected["gen_mask"].sum(1).tolist()
    soft = jnp.asarray(expected["encoded"])
    for row, p in enumerate(prompts):
        tokens, soft_index = jnp.asarray(p.tokens[None]), jnp.asarray(p.soft[None])
        x = insert_soft_tokens(model.llama.embed_tokens(tokens), soft[row : row + 1], soft_index)
        close(x[0], expected["gen_embs"][row, -len(p.tokens) :], 1e-5, "prompt embeddings")
    batcher, config = SlotBatcher(model.llama, [tokenizer.eos_id]), GenerateConfig(max_new_tokens=24)
    requests = [GenerationRequest(p, config, soft=soft[i]) for i, p in enumerate(prompts)]
    answers = batcher.run(requests) if together else [batcher.run([request])[0] for request in requests]
    theirs = expected["gen_tokens" if together else "gen_tokens_single"]
    assert [list(answer.tokens) for answer in answers] == theirs[:, 1:].tolist()
    assert [tokenizer.decode(a.tokens) for a in answers] == IO["generated" if together else "generated_single"]


@pytest.fixture(scope="module")
def average_losses(expected):
    """The loss by its average: of both samples' targets, and of both samples' own losses."""
    losses = {"token": expected["loss"], "clip": expected["per_sample_loss"].mean()}
    assert abs(losses["token"] - losses["clip"]) > 1e-3
    return losses


@pytest.mark.parametrize("order", [[(0, 1)], [(1, 0)], [(0,), (1,)], [(1,), (0,)]], ids=str)
def test_packing_and_devices_change_nothing(placed, samples, expected, average_losses, order):
    devices, mesh, _, loss_of = placed
    rows = [[(clip, samples[clip]) for clip in row] for row in order]
    rows *= devices // len(rows) or 1  # the same rows again leave the mean as it is
    for average, theirs in average_losses.items():
        with use_mesh(mesh, DEFAULT_SHARDING):
            loss = loss_of(batch_of(rows, expected, loss_average=average))
        close(loss, theirs, 1e-5, f"loss by {average}")


@pytest.mark.slow
def test_parts_of_a_batch_change_nothing(placed, samples, expected, average_losses):
    """Two parts, of one row each on one device and of four on eight."""
    devices, mesh, model, _ = placed
    rows = [[(clip, samples[clip]) for clip in row] for row in ([(0,), (1,)] if devices == 1 else [(0, 1), (1, 0)] * 4)]
    optimizer = optax.sgd(0.0)
    with use_mesh(mesh, DEFAULT_SHARDING):
        graphdef, frozen, state = init_state(model, optimizer)
        state = jax.tree.map(jnp.copy, state)  # a step takes its state's memory, and others use the model
        step = make_step(graphdef, optimizer, multimodal_loss, grad_accum_steps=2)
        for average, theirs in average_losses.items():
            state, metrics = step(state, frozen, batch_of(rows, expected, loss_average=average))
            close(metrics["loss"], theirs, 1e-5, f"loss by {average}")


def test_frames_go_through_the_encoder(model, batch):
    """With frames in the batch the soft tokens are those of the encoder's tokens."""
    frames = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 2, 56, 56, 3), dtype=np.uint8))
    tokens = model.eva_vit.encode(frames.reshape(4, 56, 56, 3)).reshape(2, 2, 17, 48)
    from_frames = model.soft_tokens(batch.features, frames=frames)
    close(from_frames, np.asarray(model.soft_tokens(batch.features, image_tokens=tokens)), 1e-6, "soft tokens")
    without = EmotionLlama(model.llama, model.projectors)
    with pytest.raises(ValueError, match="make the model with its encoder"):
        without.soft_tokens(batch.features, frames=frames)
    with pytest.raises(ValueError, match="no clips; give frames or image_tokens"):
        model.soft_tokens(batch.features)


def test_features_a_clip_lacks_change_only_their_own_soft_token(model, expected):
    features = expected["features"].copy()
    features[:, 1] = 0
    image = jnp.asarray(expected["vit"])
    found = np.asarray(model.projectors(image, jnp.asarray(features)))
    changed = np.abs(found - np.asarray(model.projectors(image, jnp.asarray(expected["features"])))).max((0, 2)) > 0
    assert np.flatnonzero(changed).tolist() == [IMAGE_TOKENS + 1]
    bias = np.asarray(model.projectors.videomae_proj.bias[...])
    close(found[:, IMAGE_TOKENS + 1], np.broadcast_to(bias, found[:, 0].shape), 1e-6, "projected zeros")


def test_dropout_needs_its_key(model, batch):
    dropped = load_emotion_llama(
        DATA / "llama",
        dataclasses.replace(CONFIG, lora=dataclasses.replace(CONFIG.lora, dropout=0.5)),
        trained=DATA / "checkpoint_0.pth",
    )[0]
    loss = lambda key: float(loss_and_weight(dropped, batch, key)[0])
    assert loss(None) == float(loss_and_weight(dropped, batch)[0])
    assert loss(jax.random.key(0)) != loss(None)
    assert loss(jax.random.key(0)) == loss(jax.random.key(0))
