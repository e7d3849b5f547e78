"""VideoMAE's encoder from Hugging Face's three models: names, what is dropped, and settings that are refused."""

import numpy as np
import pytest

from emollama_jax.models.videomae import VideoMaeConfig
from emollama_jax.weights.videomae import load_videomae
from tests.weights.encoders import (
    IMAGE,
    OUR_SIZES,
    SIZES,
    MemorySource,
    assert_filled,
    eagerly,
    source_of,
    torch_encoder,
    weights_of,
)
from tests.weights.tiny import FLOAT32, user_error

CLIP = {"num_frames": 6, "tubelet_size": 3}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_intermediate_size": 24,
    "decoder_num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
}
NAMES = {
    "patches.proj": "embeddings.patch_embeddings.projection",
    "layers.attn_norm": "encoder.layer.{layer}.layernorm_before",
    "layers.mlp_norm": "encoder.layer.{layer}.layernorm_after",
    "layers.attn.q_proj": "encoder.layer.{layer}.attention.attention.query",
    "layers.attn.q_proj.bias": "encoder.layer.{layer}.attention.attention.q_bias",
    "layers.attn.k_proj": "encoder.layer.{layer}.attention.attention.key",
    "layers.attn.v_proj": "encoder.layer.{layer}.attention.attention.value",
    "layers.attn.v_proj.bias": "encoder.layer.{layer}.attention.attention.v_bias",
    "layers.attn.o_proj": "encoder.layer.{layer}.attention.output.dense",
    "layers.mlp.up_proj": "encoder.layer.{layer}.intermediate.dense",
    "layers.mlp.down_proj": "encoder.layer.{layer}.output.dense",
    "final_norm": "layernorm",
}
# What each model has around the encoder.
KINDS = {
    "VideoMAEModel": set(),
    "VideoMAEForPreTraining": {"mask_token", "decoder", "encoder_to_decoder"},
    "VideoMAEForVideoClassification": {"classifier"},
}


def tiny(kind: str, use_mean_pooling: bool):
    settings = {**SIZES, **IMAGE, **CLIP, **DECODER, "layer_norm_eps": 1e-7}
    return torch_encoder(kind, **settings, use_mean_pooling=use_mean_pooling)


def encoder_weights(theirs) -> dict[str, np.ndarray]:
    return {name.removeprefix("videomae."): value for name, value in weights_of(theirs).items()}


@pytest.mark.parametrize("use_mean_pooling", [True, False], ids=["mean", "final_norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_model(kind, use_mean_pooling):
    """Every tensor in its place; what is around the encoder is dropped unread, a fine-tuned model's norm too."""
    theirs = tiny(kind, use_mean_pooling)
    source = source_of(theirs)
    model, report = eagerly(load_videomae, source, **FLOAT32)
    has_norm = not use_mean_pooling
    assert model.config == VideoMaeConfig(
        **OUR_SIZES, **IMAGE, **CLIP, **FLOAT32, layer_norm_eps=1e-7, final_norm=has_norm, attention="chunked"
    )
    assert (model.final_norm is not None) == has_norm
    assert_filled(model, report, encoder_weights(theirs), NAMES)
    norm_of_pooled = {"fc_norm"} if kind == "VideoMAEForVideoClassification" and use_mean_pooling else set()
    assert {name.split(".")[0] for name in report.dropped} == KINDS[kind] | norm_of_pooled
    encoder = {name for name in source.names() if kind == "VideoMAEModel" or name.startswith("videomae.")}
    assert set(source.reads) == encoder == set(source.names()) - set(report.dropped)


def test_folder(tmp_path):
    theirs = tiny("VideoMAEForPreTraining", use_mean_pooling=False)
    theirs.save_pretrained(tmp_path)
    model, report = eagerly(load_videomae, tmp_path, **FLOAT32, attention="xla")
    assert model.config.attention == "xla"
    assert_filled(model, report, encoder_weights(theirs), NAMES)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """The encoder's alone, with its norm."""
    return weights_of(tiny("VideoMAEModel", use_mean_pooling=False))


def config_json(**changes):
    """The settings of the encoder with its norm; None takes one away."""
    settings = {"model_type": "videomae", **SIZES, **IMAGE, **CLIP, "layer_norm_eps": 1e-12, "use_mean_pooling": False}
    return {name: value for name, value in (settings | changes).items() if value is not None}


@pytest.mark.parametrize("name", ["position_embeddings", "embeddings.position_embeddings"])
def test_stored_sines_are_dropped(weights, name):
    """They are computed."""
    sines = {name: np.ones((1, 32, 32), np.float32)}
    _, report = eagerly(load_videomae, MemorySource(weights | sines, config_json()), **FLOAT32)
    assert report.dropped == (name,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_mean_pooling": True}, ["2 unknown: layernorm.bias, layernorm.weight"]),
        ({"use_mean_pooling": None}, ["2 unknown: layernorm.bias, layernorm.weight"]),
        ({"num_hidden_layers": 3}, ["15 missing: encoder.layer.2.attention.attention.key.weight"]),
        ({"num_hidden_layers": 1}, ["15 unknown: encoder.layer.1.attention.attention.key.weight"]),
        ({"tubelet_size": 2}, ["projection.weight is [32, 3, 3, 8, 8], not [32, 3, 2, 8, 8]"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_settings_of_another_file(weights, changes, words):
    """Blocks, too, must be as many as the settings say."""
    with user_error("in-memory.pth", *words):
        load_videomae(MemorySource(weights, config_json(**changes)), **FLOAT32)


def test_norm_that_is_missing(weights):
    without = {name: value for name, value in weights.items() if not name.startswith("layernorm.")}
    with user_error("2 missing: layernorm.bias, layernorm.weight"):
        load_videomae(MemorySource(without, config_json()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "vivit"}, ["the model is a vivit, not a videomae", "only VideoMAE models"]),
        ({"hidden_act": "gelu_pytorch_tanh"}, ["the model has activation gelu_pytorch_tanh"]),
        ({"qkv_bias": False}, ["the model has no biases of queries and values"]),
        ({"qv_bias": False}, ["the model has no biases of queries and values"]),
        ({"num_channels": 4}, ["the model has frames of 4 channels"]),
        ({"num_frames": None}, ["the configuration lacks 'num_frames'"]),
        ({"tubelet_size": 4}, ["num_frames=6 must be a multiple of tubelet_size=4"]),
        ({"num_frames": "16"}, ["unusable configuration (num_frames='16')"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refused_settings(changes, words):
    with user_error("in-memory.pth", *words):
        load_videomae(MemorySource({}, config_json(**changes)))


@pytest.mark.smoke
def test_no_config_json():
    with user_error("no config.json beside the weights: in-memory.pth"):
        load_videomae(MemorySource({}))
