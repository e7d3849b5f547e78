"""EVA-ViT from the original's files and from BLIP-2: names, what is dropped, grids, errors, meshes, int8."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from emollama_jax.config import DEFAULT_SHARDING
from emollama_jax.models.eva_vit import EvaVitConfig
from emollama_jax.sharding import make_mesh
from emollama_jax.weights.eva_vit import load_eva_vit
from tests.weights.encoders import (
    OUR_SIZES,
    SIZES,
    MemorySource,
    assert_filled,
    eagerly,
    source_of,
    split_projections,
    torch_bicubic,
    torch_encoder,
    weights_of,
)
from tests.weights.tiny import (
    FLOAT32,
    REFERENCE,
    assert_bit_equal,
    assert_close,
    stored_values,
    user_error,
)

EVA_FILE, LN_FILE = REFERENCE.parent / "eva_vit_tiny.pth", REFERENCE.parent / "ln_vision.pth"
SETTINGS = {"hidden_size": 48, "num_layers": 3, "num_heads": 4, "intermediate_size": 209, "image_size": 56, **FLOAT32}
CONFIG = EvaVitConfig(**SETTINGS)
NAMES = {
    "embed.cls_token": "cls_token",
    "embed.positions": "pos_embed",
    "embed.patches.proj": "patch_embed.proj",
    "layers.attn_norm": "blocks.{layer}.norm1",
    "layers.mlp_norm": "blocks.{layer}.norm2",
    "layers.attn.q_proj.kernel": "blocks.{layer}.attn.qkv.weight[q]",
    "layers.attn.k_proj.kernel": "blocks.{layer}.attn.qkv.weight[k]",
    "layers.attn.v_proj.kernel": "blocks.{layer}.attn.qkv.weight[v]",
    "layers.attn.q_proj.bias": "blocks.{layer}.attn.q_bias",
    "layers.attn.v_proj.bias": "blocks.{layer}.attn.v_bias",
    "layers.attn.o_proj": "blocks.{layer}.attn.proj",
    "layers.mlp.up_proj": "blocks.{layer}.mlp.fc1",
    "layers.mlp.down_proj": "blocks.{layer}.mlp.fc2",
    "ln_vision": "ln_vision",
}
BLIP2_NAMES = {
    "embed.cls_token": "embeddings.class_embedding",
    "embed.positions": "embeddings.position_embedding",
    "embed.patches.proj": "embeddings.patch_embedding",
    "layers.attn_norm": "encoder.layers.{layer}.layer_norm1",
    "layers.mlp_norm": "encoder.layers.{layer}.layer_norm2",
    **{
        f"layers.attn.{part}_proj.{leaf}": f"encoder.layers.{{layer}}.self_attn.qkv.{theirs}[{part}]"
        for part in "qkv"
        for leaf, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
    "layers.attn.o_proj": "encoder.layers.{layer}.self_attn.projection",
    "layers.mlp.up_proj": "encoder.layers.{layer}.mlp.fc1",
    "layers.mlp.down_proj": "encoder.layers.{layer}.mlp.fc2",
    "ln_vision": "post_layernorm",
}
BLIP2_IMAGE = {"image_size": 28, "patch_size": 7}
BLIP2_CONFIG = EvaVitConfig(**OUR_SIZES, **BLIP2_IMAGE, **FLOAT32)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """The tensors of the reference's two files."""
    torch = pytest.importorskip("torch")
    tensors = torch.load(EVA_FILE, weights_only=True)
    tensors |= {f"ln_vision.{name}": tensor for name, tensor in torch.load(LN_FILE, weights_only=True).items()}
    return {name: tensor.numpy() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def reference(weights):
    """The loaded model, and the report."""
    return eagerly(load_eva_vit, EVA_FILE, CONFIG, ln_vision=LN_FILE)


def load(weights, config=CONFIG, **kwargs):
    return eagerly(load_eva_vit, MemorySource(weights), config, **kwargs)


@nnx.jit
def _tokens(model, images):
    return model(images)


def tokens_of(model) -> np.ndarray:
    """The tokens of the reference's images."""
    images = np.load(REFERENCE.parent / "io.npz")["images"]
    return np.asarray(_tokens(model, jnp.asarray(images.transpose(0, 2, 3, 1))))


# --- the original's files ---


def test_reference_model(weights, reference):
    """Every tensor in its place, and the tokens that the reference computed."""
    model, report = reference
    assert model.config == dataclasses.replace(CONFIG, attention="chunked")
    assert report.dropped == ()
    assert_filled(model, report, split_projections(weights), NAMES)
    assert_close(tokens_of(model), np.load(REFERENCE.parent / "io.npz")["vit"], 1e-5)


def test_ln_vision_is_plain_where_no_file_has_it(reference):
    model, report = load_eva_vit(EVA_FILE, CONFIG)
    assert sorted(report.initialised) == ["ln_vision.bias", "ln_vision.scale"]
    values = stored_values(model)
    np.testing.assert_array_equal(values.pop("ln_vision.scale"), np.ones(48))
    np.testing.assert_array_equal(values.pop("ln_vision.bias"), np.zeros(48))
    assert_bit_equal(values, {name: v for name, v in stored_values(reference[0]).items() if name in values})


@pytest.mark.parametrize("prefix", ["", "ln_vision."])
def test_ln_vision_of_another_file(tmp_path, weights, prefix):
    """Its names may have the prefix; the encoder's own is replaced."""
    file = tmp_path / "norm.safetensors"
    save_file({f"{prefix}{leaf}": np.full(48, i, np.float32) for i, leaf in enumerate(("weight", "bias"))}, file)
    model, report = load(weights, ln_vision=file)
    assert report.initialised == ()
    np.testing.assert_array_equal(model.ln_vision.scale[...], np.zeros(48))
    np.testing.assert_array_equal(model.ln_vision.bias[...], np.ones(48))


def test_ln_vision_file_of_something_else(tmp_path, weights):
    save_file({"weight": np.ones(40, np.float32), "gamma": np.ones(48, np.float32)}, tmp_path / "norm.safetensors")
    words = "1 unknown: ln_vision.gamma", "1 of the wrong shape: ln_vision.weight is [40], not [48]"
    with user_error(*words):
        load(weights, ln_vision=tmp_path / "norm.safetensors")


def test_what_is_not_used_is_dropped_and_named(weights):
    """Blocks beyond the config's, block 10 for its first digit's sake, and what the encoder was trained with."""
    extra = {
        "blocks.10.norm1.weight": np.ones(48, np.float32),
        "blocks.10.attn.qkv.weight": np.ones((144, 48), np.float32),
        "head.weight": np.ones((1000, 48), np.float32),
        "head.bias": np.ones(1000, np.float32),
        "norm.weight": np.ones(48, np.float32),
        "norm.bias": np.ones(48, np.float32),
        "fc_norm.weight": np.ones(48, np.float32),
        "mask_token": np.ones((1, 1, 48), np.float32),
    }
    model, report = load(weights | extra, EvaVitConfig(**SETTINGS | {"num_layers": 2}))
    everything = split_projections(weights | extra)
    unused = (*extra, *(f"blocks.10.attn.qkv.weight[{p}]" for p in "qkv"))
    fused = {name for name in everything if name.endswith("qkv.weight")}
    unused_blocks = {name for name in everything if name.startswith("blocks.2.")}
    assert report.dropped == tuple(sorted((set(unused) | unused_blocks) - fused))
    assert_filled(model, report, everything, NAMES)


def changed(weights, **changes):
    """The weights with some of them others, or gone where they are None."""
    return {name: value for name, value in (weights | changes).items() if value is not None}


FFN = "blocks.1.mlp.fc1"


@pytest.mark.parametrize(
    ("changes", "settings", "words"),
    [
        ({}, {"num_layers": 4}, ["15 missing: blocks.3.attn.proj.bias", "blocks.3.attn.qkv.weight[q]"]),
        ({"cls_token": None}, {}, ["1 missing: cls_token"]),
        ({f"{FFN}.bias": None, "visual.x": (3,)}, {}, [f"1 missing: {FFN}.bias", "1 unknown: visual.x"]),
        ({f"{FFN}.wight": (209, 48)}, {}, [f"1 unknown: {FFN}.wight"]),
        ({"blocks.2.attn.k_bias": (48,)}, {}, ["1 unknown: blocks.2.attn.k_bias"]),
        (
            {"blocks.0.attn.qkv.bias": (144,)},
            {},
            [f"3 unknown: {', '.join(f'blocks.0.attn.qkv.bias[{p}]' for p in 'kqv')}"],
        ),
        ({f"{FFN}.weight": (48, 209)}, {}, [f"1 of the wrong shape: {FFN}.weight is [48, 209], not [209, 48]"]),
        (
            {},
            {"intermediate_size": 192},
            ["9 of the wrong shape", "2.mlp.fc2.weight is [48, 209], not [48, 192]"],
        ),
        ({}, {"patch_size": 7}, ["patch_embed.proj.weight is [48, 3, 14, 14], not [48, 3, 7, 7]"]),
        ({"blocks.0.attn.qkv.weight": (120, 48)}, {}, ["3 of the wrong", "qkv.weight[v] is [40, 48], not [48, 48]"]),
        ({"blocks.0.attn.qkv.weight": (100, 48)}, {}, ["3 missing", "1 unknown: blocks.0.attn.qkv.weight"]),
        ({"blocks.0.attn.qkv.weight": ()}, {}, ["3 missing", "1 unknown: blocks.0.attn.qkv.weight"]),
        ({"pos_embed": (1, 16, 48)}, {}, ["1 of the wrong shape: pos_embed is [1, 16, 48], not [1, 17, 48]"]),
        ({"pos_embed": (17, 48)}, {}, ["1 of the wrong shape: pos_embed is [17, 48], not [1, 17, 48]"]),
        ({"pos_embed": None}, {"image_size": 84}, ["1 missing: pos_embed"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_files_that_do_not_fit(weights, changes, settings, words):
    """One error with all that is wrong, before anything is read."""
    zeros = {name: None if shape is None else np.zeros(shape, np.float32) for name, shape in changes.items()}
    source = MemorySource(changed(weights, **zeros))
    with user_error("in-memory.pth", *words):
        load_eva_vit(source, EvaVitConfig(**SETTINGS | settings))
    assert source.reads == []


@pytest.mark.parametrize("image_size", [84, 28])
def test_another_grid(weights, image_size):
    """The positions of 4 x 4 patches for 6 x 6 and 2 x 2; all else is the file's."""
    model, report = load(weights, EvaVitConfig(**SETTINGS | {"image_size": image_size}))
    grid = image_size // 14
    positions = weights["pos_embed"][0]
    expected = torch_bicubic(positions[1:].reshape(4, 4, 48), grid, grid).reshape(-1, 48)
    found = np.asarray(model.embed.positions[...])
    assert found.shape == (1 + grid**2, 48)
    np.testing.assert_array_equal(found[0], positions[0])
    assert np.max(np.abs(found[1:] - expected)) <= 1e-5
    resized = split_projections(weights) | {"pos_embed": found[None]}
    assert_filled(model, report, resized, NAMES)


# --- BLIP-2 ---


@pytest.fixture(scope="module")
def tower():
    """BLIP-2's vision model alone, of torch."""
    return torch_encoder("Blip2VisionModel", **SIZES, **BLIP2_IMAGE)


def key_biases(model):
    """The thirds of the fused biases that belong to the keys, as views."""
    return [layer.self_attn.qkv.bias.data[32:64] for layer in model.encoder.layers]


def test_blip2(tower):
    weights = weights_of(tower)
    model, report = load(weights, BLIP2_CONFIG)
    assert_filled(model, report, split_projections(weights), BLIP2_NAMES)
    assert report.dropped == tuple(f"encoder.layers.{i}.self_attn.qkv.bias[k]" for i in range(2))


def test_blip2_with_everything_around_its_vision_model(tower):
    """The names of the whole model; its vision model is what is loaded, and the rest is dropped."""
    whole = torch_encoder(
        "Blip2ForConditionalGeneration",
        vision_config={**SIZES, **BLIP2_IMAGE},
        qformer_config={**SIZES, "encoder_hidden_size": 32, "vocab_size": 9},
        text_config={"model_type": "opt", **SIZES, "ffn_dim": 12, "vocab_size": 60, "word_embed_proj_dim": 32},
        num_query_tokens=3,
    )
    whole.vision_model.load_state_dict(tower.state_dict())
    names = set(weights_of(whole))
    model, report = eagerly(load_eva_vit, source_of(whole), BLIP2_CONFIG)
    assert_bit_equal(stored_values(model), stored_values(load(weights_of(tower), BLIP2_CONFIG)[0]))
    around = {name for name in names if not name.startswith("vision_model.")}
    assert {name.split(".")[0] for name in around} == {
        "qformer", "query_tokens", "language_projection", "language_model"
    }  # fmt: skip
    assert set(report.dropped) == around | {f"encoder.layers.{i}.self_attn.qkv.bias[k]" for i in range(2)}


def test_key_biases_of_blip2_change_nothing(tower):
    """Neither in torch, where they add one number to all scores of a query, nor in what is loaded."""
    torch = pytest.importorskip("torch")
    images = torch.tensor(np.random.default_rng(0).normal(size=(2, 3, 28, 28)).astype(np.float32))
    assert all(bias.abs().max() > 0.1 for bias in key_biases(tower))
    with torch.no_grad():
        with_biases = tower(images).last_hidden_state.numpy()
    other = torch_encoder("Blip2VisionModel", **SIZES, **BLIP2_IMAGE)
    for bias in key_biases(other):
        bias.zero_()
    with torch.no_grad():
        without = other(images).last_hidden_state.numpy()
    assert_close(with_biases, without, 1e-5)
    pair = (stored_values(load(weights_of(model), BLIP2_CONFIG)[0]) for model in (tower, other))
    assert_bit_equal(*pair)


def test_blip2_on_another_grid_with_fewer_blocks(tower):
    weights = weights_of(tower)
    config = EvaVitConfig(**OUR_SIZES | {"num_layers": 1}, **BLIP2_IMAGE | {"image_size": 42}, **FLOAT32)
    model, report = load({f"vision_model.{name}": value for name, value in weights.items()}, config)
    block = {name for name in split_projections(weights) if ".layers.1." in name and not name.endswith("qkv.weight")}
    block -= {"encoder.layers.1.self_attn.qkv.bias"}
    assert set(report.dropped) == block | {"encoder.layers.0.self_attn.qkv.bias[k]"}
    positions = weights["embeddings.position_embedding"][0]
    expected = torch_bicubic(positions[1:].reshape(4, 4, 32), 6, 6).reshape(36, 32)
    assert np.max(np.abs(np.asarray(model.embed.positions[...])[1:] - expected)) <= 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"post_layernorm.weight": None}, ["1 missing: post_layernorm.weight"]),
        ({"pooler.weight": np.ones(3)}, ["1 unknown: pooler.weight"]),
        ({"ln_vision.weight": np.ones(32)}, ["1 unknown: ln_vision.weight"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_blip2_that_does_not_fit(tower, changes, words):
    """Its `ln_vision` is a part of it, never made up or replaced."""
    with user_error(*words):
        load(changed(weights_of(tower), **changes), BLIP2_CONFIG)


@pytest.mark.smoke
def test_weights_of_something_else():
    with user_error("in-memory.pth", "missing", "1 unknown: lm_head.weight", "right file"):
        load({"lm_head.weight": np.ones((3, 3), np.float32)})


# --- how it is stored ---


def test_on_a_mesh(reference):
    """The same numbers, each device holding its part; the 209 hidden units of the MLP do not divide and stay whole."""
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    model, report = load_eva_vit(EVA_FILE, CONFIG, ln_vision=LN_FILE, mesh=mesh, rules=DEFAULT_SHARDING)
    assert report == reference[1]
    values = stored_values(model)
    assert_bit_equal(values, stored_values(reference[0]))
    shards = {
        "embed.patches.proj.kernel": (588, 12),
        "embed.positions": (17, 12),
        "layers.attn.q_proj.kernel": (3, 12, 24),
        "layers.attn.q_proj.bias": (3, 24),
        "layers.attn.o_proj.kernel": (3, 24, 12),
        "layers.mlp.up_proj.kernel": (3, 12, 209),
        "layers.attn_norm.scale": (3, 48),
    }
    for path, shape in shards.items():
        assert len(values[path].sharding.device_set) == 8
        assert values[path].addressable_shards[0].data.shape == shape, path


def test_int8(reference):
    """The kernels of the blocks are rounded to 8 bits, nothing else; the tokens move by a few percent at most."""
    config = EvaVitConfig(**SETTINGS | {"kernel_dtype": "int8"})
    model, report = load_eva_vit(EVA_FILE, config, ln_vision=LN_FILE)
    assert report == reference[1]
    exact = stored_values(reference[0])
    for path, value in stored_values(model).items():
        if path.startswith("layers.") and path.endswith("kernel"):
            assert value.qvalue.dtype == jnp.int8
            largest = np.abs(exact[path]).max(axis=1, keepdims=True)
            error = np.abs(np.asarray(value.qvalue * value.scale) - np.asarray(exact[path])) / largest
            assert 0 < error.max() <= 0.5 / 127 * 1.001, path
        else:
            assert_bit_equal({path: value}, {path: exact[path]})
    ours, theirs = tokens_of(model), tokens_of(reference[0])
    assert 0 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.02
