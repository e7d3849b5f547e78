"""The encoders against Hugging Face's torch classes with the same random parameters: every block, and whole."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.bench.encode import load_peer
from emollama_jax.bench.peer import as_source, torch_encoder
from emollama_jax.config import Config, load_config
from emollama_jax.sharding import abstract
from emollama_jax.weights.encoders import ENCODERS
from emollama_jax.weights.engine import param_values
from emollama_jax.weights.eva_vit import load_eva_vit
from tests.models.tiny import close

torch = pytest.importorskip("torch")

PER_LAYER, WHOLE_MODEL = 1e-5, 1e-4
TINY = load_config("tiny")
BASE_FORM = {"conv_norm": "group", "conv_bias": False, "norm_first": False}
VARIANTS = {
    "eva_vit": TINY.eva_vit,
    "mae": TINY.mae,
    "videomae": TINY.videomae,
    "videomae fine-tuned": dataclasses.replace(TINY.videomae, final_norm=False),
    "hubert": TINY.hubert,
    "hubert base": dataclasses.replace(TINY.hubert, **BASE_FORM),
    "hubert without feature norm": dataclasses.replace(TINY.hubert, feature_norm=False, position_kernel=7),
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    """(configuration, torch's model, ours)."""
    config = VARIANTS[request.param]
    theirs = torch_encoder(config)
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # every parameter matters: attention far from uniform, norms far from 1, biases far from 0
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim < 2 or "weight" not in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * math.prod(parameter.shape[1:]) ** -0.5)
    return config, theirs, load_peer(config, theirs)


def inputs_of(config, random) -> np.ndarray:
    """Channels last, as ours."""
    if hasattr(config, "conv_kernels"):
        return random.normal(size=(2, 9000)).astype(np.float32)
    frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
    return random.normal(size=(2, *frames, config.image_size, config.image_size, 3)).astype(np.float32)


def run_torch(model, x: np.ndarray):
    """(what goes into the blocks and comes out of each of them; the last hidden state)."""
    kept = []
    blocks = model.encoder.layer if hasattr(model.encoder, "layer") else model.encoder.layers
    first = lambda output: output[0] if isinstance(output, tuple) else output
    hooks = [blocks[0].register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0].clone()))]
    hooks += [
        block.register_forward_hook(lambda module, inputs, output: kept.append(first(output))) for block in blocks
    ]
    further = {}
    if model.config.model_type == "vit_mae":  # equal noise leaves the patches in their order
        further["noise"] = torch.zeros(len(x), (x.shape[1] // model.config.patch_size) ** 2)
    with torch.no_grad():
        last = model(torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, -3) if x.ndim > 2 else x)), **further)
    for hook in hooks:
        hook.remove()
    return [x.numpy() for x in kept], last.last_hidden_state.numpy()


def test_every_block_and_the_whole_model(pair):
    config, theirs, ours = pair
    x = inputs_of(config, np.random.default_rng(2))
    kept, last = run_torch(theirs, x)
    graphdef, stacked = nnx.split(ours.layers)
    run_block = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
    for i, (before, after) in enumerate(zip(kept[:-1], kept[1:], strict=True)):
        close(run_block(jax.tree.map(lambda a: a[i], stacked), before), after, PER_LAYER, f"block {i}")  # noqa: B023
    lengths = (jnp.full(2, x.shape[1]),) if x.ndim == 2 else ()
    close(jax.jit(ours.__call__)(jnp.asarray(x), *lengths), last, WHOLE_MODEL, "last hidden state")


@pytest.mark.parametrize("name", ["hubert", "hubert base"])
def test_a_padded_row_is_what_torch_gives_for_the_clip_alone(name):
    """Also in the base form, where torch's own result depends on the padding."""
    config = VARIANTS[name]
    theirs = torch_encoder(config)
    ours = load_peer(config, theirs)
    random = np.random.default_rng(3)
    lengths = np.array([9000, 4321, 400])
    x = random.normal(size=(3, 9000)).astype(np.float32)
    hidden = jax.jit(ours.__call__)(jnp.asarray(x), jnp.asarray(lengths))  # noise behind the rows' ends, not zeros
    encoded = jax.jit(ours.encode)(jnp.asarray(x), jnp.asarray(lengths))
    for row, length in enumerate(lengths):
        with torch.no_grad():
            alone = theirs(torch.tensor(x[row : row + 1, :length])).last_hidden_state[0].numpy()
        assert len(alone) == config.num_frames(int(length))
        close(hidden[row, : len(alone)], alone, WHOLE_MODEL, f"row of {length} samples")
        close(encoded[row], alone.mean(axis=0), WHOLE_MODEL, "its mean")


@pytest.mark.parametrize("name", ["hubert", "hubert base"])
def test_hubert_after_a_layer_of_choice(name):
    theirs = torch_encoder(VARIANTS[name])
    x = np.random.default_rng(6).normal(size=(2, 5000)).astype(np.float32)
    with torch.no_grad():
        hidden = theirs(torch.tensor(x), output_hidden_states=True).hidden_states
    for layer in range(-len(hidden), len(hidden)):
        ours = load_peer(dataclasses.replace(VARIANTS[name], layer=layer), theirs)
        found = jax.jit(ours.__call__)(jnp.asarray(x), jnp.full(2, x.shape[1]))
        close(found, hidden[layer], WHOLE_MODEL, f"layer {layer}")


def test_eva_vit_at_another_grid_interpolates_as_torch():
    config = TINY.eva_vit
    theirs = torch_encoder(dataclasses.replace(config, image_size=42))  # 3 x 3 patches
    with torch.no_grad():
        theirs.embeddings.position_embedding.normal_(generator=torch.Generator().manual_seed(4))
    ours, _ = load_eva_vit(as_source(theirs), config)
    x = np.random.default_rng(5).normal(size=(2, 56, 56, 3)).astype(np.float32)
    with torch.no_grad():
        tokens = theirs(torch.tensor(np.moveaxis(x, -1, 1).copy()), interpolate_pos_encoding=True).last_hidden_state
    close(ours(jnp.asarray(x)), tokens, WHOLE_MODEL, "tokens")


# What torch's classes have beside the encoder: EVA's key biases, which have no effect; what stands for masked frames,
# and the magnitudes of a weight norm.
BESIDE = {"eva_vit": 39 * 1408, "mae": 0, "videomae": 0, "hubert": 1024 + 128}
FULL_SIZE = {"eva_vit": 986_978_688, "mae": 303_301_632, "videomae": 303_860_736, "hubert": 315_437_568}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_full_size_parameter_counts(name):
    config = getattr(Config(), name)
    with torch.device("meta"):
        theirs = sum(p.numel() for p in torch_encoder(config).parameters())
    _, state = abstract(lambda: ENCODERS[name](config, rngs=nnx.Rngs(0)))
    ours = sum(math.prod(value.shape) for value in param_values(state).values())
    assert (ours, theirs - ours) == (FULL_SIZE[name], BESIDE[name])
