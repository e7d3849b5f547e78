"""MAE's encoder from Hugging Face and from the original code: names, what is dropped, and settings that are refused."""

import dataclasses

import numpy as np
import pytest

from emollama_jax.models.mae import MaeConfig
from emollama_jax.weights.architecture import read_architecture
from emollama_jax.weights.mae import load_mae
from tests.weights.encoders import (
    IMAGE,
    OUR_SIZES,
    SIZES,
    MemorySource,
    assert_filled,
    eagerly,
    source_of,
    split_projections,
    torch_encoder,
    weights_of,
)
from tests.weights.tiny import FLOAT32, assert_bit_equal, stored_values, user_error

DECODER = {
    "decoder_hidden_size": 16,
    "decoder_intermediate_size": 24,
    "decoder_num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
}
# Hugging Face's names and the original code's, and ours for both.
OURS = {
    "embed.cls_token": ("embeddings.cls_token", "cls_token"),
    "embed.positions": ("embeddings.position_embeddings", "pos_embed"),
    "embed.patches.proj": ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    "layers.attn_norm": ("encoder.layer.{layer}.layernorm_before", "blocks.{layer}.norm1"),
    "layers.mlp_norm": ("encoder.layer.{layer}.layernorm_after", "blocks.{layer}.norm2"),
    **{
        f"layers.attn.{theirs[0]}_proj.{ours}": (
            f"encoder.layer.{{layer}}.attention.attention.{theirs}.{leaf}",
            f"blocks.{{layer}}.attn.qkv.{leaf}[{theirs[0]}]",
        )
        for theirs in ("query", "key", "value")
        for ours, leaf in (("kernel", "weight"), ("bias", "bias"))
    },
    "layers.attn.o_proj": ("encoder.layer.{layer}.attention.output.dense", "blocks.{layer}.attn.proj"),
    "layers.mlp.up_proj": ("encoder.layer.{layer}.intermediate.dense", "blocks.{layer}.mlp.fc1"),
    "layers.mlp.down_proj": ("encoder.layer.{layer}.output.dense", "blocks.{layer}.mlp.fc2"),
    "final_norm": ("layernorm", "norm"),
}
NAMES = {ours: theirs for ours, (theirs, _) in OURS.items()}
ORIGINAL_NAMES = {ours: theirs for ours, (_, theirs) in OURS.items()}
CONFIG = MaeConfig(**OUR_SIZES, **IMAGE, layer_norm_eps=1e-7, **FLOAT32)


@pytest.fixture(scope="module")
def pretrained():
    """The torch model that MAE trains: the encoder, and the decoder that is not needed."""
    return torch_encoder("ViTMAEForPreTraining", **SIZES, **IMAGE, **DECODER, layer_norm_eps=1e-7)


@pytest.fixture(scope="module")
def original() -> dict[str, np.ndarray]:
    """Weights under the names of the original code, with its decoder."""
    rng = np.random.default_rng(0)
    block = {
        **{f"norm{i}.{leaf}": (32,) for i in (1, 2) for leaf in ("weight", "bias")},
        **{"attn.qkv.weight": (96, 32), "attn.qkv.bias": (96,), "attn.proj.weight": (32, 32), "attn.proj.bias": (32,)},
        **{"mlp.fc1.weight": (80, 32), "mlp.fc1.bias": (80,), "mlp.fc2.weight": (32, 80), "mlp.fc2.bias": (32,)},
    }
    shapes = {
        **{"cls_token": (1, 1, 32), "pos_embed": (1, 17, 32)},
        **{"patch_embed.proj.weight": (32, 3, 8, 8), "patch_embed.proj.bias": (32,)},
        **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()},
        **{"norm.weight": (32,), "norm.bias": (32,)},
        **{"mask_token": (1, 1, 16), "decoder_pos_embed": (1, 17, 16), "decoder_embed.weight": (16, 32)},
        **{"decoder_blocks.0.attn.qkv.weight": (48, 16), "decoder_norm.bias": (16,), "decoder_pred.bias": (192,)},
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


DROPPED_OF_ORIGINAL = (
    *(f"decoder_blocks.0.attn.qkv.weight[{part}]" for part in "kqv"),
    *("decoder_embed.weight", "decoder_norm.bias", "decoder_pos_embed", "decoder_pred.bias", "mask_token"),
)


# --- Hugging Face ---


def test_encoder_alone(pretrained):
    """Every tensor in its place, and the settings of the file."""
    source = source_of(pretrained.vit)
    model, report = eagerly(load_mae, source, **FLOAT32)
    assert model.config == dataclasses.replace(CONFIG, attention="chunked")
    assert report.dropped == ()
    assert_filled(model, report, weights_of(pretrained.vit), NAMES)
    assert source.config["model_type"] == "vit_mae"


def test_pretrained_model(pretrained):
    """Its names have a prefix; the decoder and its mask token are dropped unread."""
    source = source_of(pretrained)
    model, report = eagerly(load_mae, source, **FLOAT32)
    assert_bit_equal(stored_values(model), stored_values(eagerly(load_mae, source_of(pretrained.vit), **FLOAT32)[0]))
    decoder = [name for name in source.names() if not name.startswith("vit.")]
    assert "decoder.mask_token" in decoder
    assert report.dropped == tuple(decoder)
    assert sorted(source.reads) == [name for name in source.names() if name.startswith("vit.")]


@pytest.mark.parametrize(
    ("kind", "dropped"),
    [
        ("ViTModel", ("pooler.dense.bias", "pooler.dense.weight")),
        ("ViTForImageClassification", ("classifier.bias", "classifier.weight")),
    ],
)
def test_plain_vit(kind, dropped):
    """What MAE's encoder is once it is fine-tuned."""
    theirs = torch_encoder(kind, **SIZES, **IMAGE)
    model, report = eagerly(load_mae, source_of(theirs), **FLOAT32)
    assert report.dropped == dropped
    weights = {name.removeprefix("vit."): value for name, value in weights_of(theirs).items()}
    assert_filled(model, report, weights, NAMES)
    assert model.config.layer_norm_eps == theirs.config.layer_norm_eps == 1e-12


def test_folder(tmp_path, pretrained):
    pretrained.save_pretrained(tmp_path)
    model, report = eagerly(load_mae, tmp_path, **FLOAT32, pool="cls")
    assert model.config == dataclasses.replace(CONFIG, pool="cls", attention="chunked")
    weights = {name.removeprefix("vit."): value for name, value in weights_of(pretrained).items()}
    assert_filled(model, report, weights, NAMES)


def config_json(**changes):
    """The settings of a tiny ViTMAE; None takes one away."""
    settings = {"model_type": "vit_mae", **SIZES, **IMAGE, "layer_norm_eps": 1e-12, **changes}
    return {name: value for name, value in settings.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "swin"}, ["the model is a swin, not a vit_mae or vit", "ViTMAE"]),
        ({"model_type": None}, ["the model is a nameless one, not a vit_mae"]),
        ({"hidden_act": "gelu_new"}, ["the model has activation gelu_new", "only ViTMAE models without these"]),
        ({"qkv_bias": False}, ["the model has no biases of queries, keys and values"]),
        ({"num_channels": 1, "hidden_act": "relu"}, ["the model has activation relu, images of 1 channels"]),
        ({"patch_size": None}, ["the configuration lacks 'patch_size'", "it must be a ViTMAE model's"]),
        ({"layer_norm_eps": [1e-6]}, ["unusable configuration", "again"]),
        ({"image_size": [32, 32]}, ["unusable configuration (image_size=[32, 32])"]),
        ({"hidden_size": "32", "num_hidden_layers": True}, ["(hidden_size='32', num_layers=True)"]),
        ({"num_attention_heads": 5}, ["hidden_size=32 must be a multiple of num_heads=5"]),
        ({"patch_size": 7}, ["image_size=32 must be a multiple of patch_size=7"]),
        ({"num_hidden_layers": 0}, ["num_layers=0: must be above 0"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refused_settings(changes, words):
    with user_error("in-memory.pth", *words):
        load_mae(MemorySource({}, config_json(**changes)))


def test_old_settings_mean_what_they_meant():
    """Keys that a file does not have: the exact GELU, biases, three channels. Those of the decoder do not matter."""
    source = MemorySource({}, config_json(mask_ratio=0.75, decoder_num_hidden_layers=8))
    with user_error("missing: embeddings.cls_token"):  # the configuration is all right, the tensors are not
        load_mae(source)


def test_no_config_json():
    with user_error("no config.json beside the weights: in-memory.pth"):
        load_mae(MemorySource({"embeddings.cls_token": np.ones((1, 1, 32), np.float32)}))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Kinds of fields that a model's settings have."""

    width: int = 1
    rates: tuple[int, ...] = ()
    eps: float = 0.1
    is_deep: bool = False

    def __post_init__(self):
        if self.width < 0:
            raise ValueError("width is negative")


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (lambda file: {"width": file["depth"]}, ["lacks 'depth'", "it must be a Toy model's"]),
        (lambda file: {"width": 1 // file["zero"]}, ["unusable configuration", "division"]),
        (lambda file: {"width": file["name"].real}, ["unusable configuration"]),
        (lambda file: {"width": file["zero"] - 1}, ["unusable configuration (width is negative)"]),
        (lambda file: {"width": 2.0, "eps": 1, "is_deep": 0}, ["(width=2.0, eps=1, is_deep=0)"]),
        (lambda file: {"width": True, "rates": [1]}, ["(width=True, rates=[1])"]),
        (lambda file: {"rates": (1, 2.0)}, ["(rates=(1, 2.0))"]),
    ],
)
def test_unusable_configurations(parse, words):
    source = MemorySource({}, {"zero": 0, "name": "a"})
    with user_error("in-memory.pth", *words):
        read_architecture(source, parse, Settings, "Toy")


def test_usable_configuration():
    """Only what the file fixes is in it."""
    fields = {"width": 3, "rates": (1, 2), "is_deep": True}
    assert read_architecture(MemorySource({}, {}), lambda file: fields, Settings, "Toy") == fields


# --- the original code ---


@pytest.mark.smoke
def test_original_names(original):
    model, report = eagerly(load_mae, MemorySource(original), **OUR_SIZES, **IMAGE, **FLOAT32)
    assert model.config == dataclasses.replace(CONFIG, layer_norm_eps=1e-6, attention="chunked")
    assert report.dropped == DROPPED_OF_ORIGINAL
    assert_filled(model, report, split_projections(original), ORIGINAL_NAMES)


def test_original_training_checkpoint(tmp_path, original):
    """A `.pth` file with the state of its training."""
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(value) for name, value in original.items()}
    moments = {0: {"exp_avg": torch.ones(3), "step": torch.tensor(4.0)}}
    checkpoint = {
        "model": tensors | {"head.weight": torch.ones(3, 32)},
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1}]},
        "scaler": {"scale": torch.ones(1)},
        "epoch": 3,
    }
    torch.save(checkpoint, tmp_path / "checkpoint-3.pth")
    settings = {**OUR_SIZES, **IMAGE, **FLOAT32, "layer_norm_eps": 1e-5}
    model, report = eagerly(load_mae, tmp_path / "checkpoint-3.pth", **settings)
    training = ("optimizer/state/0/exp_avg", "optimizer/state/0/step", "scaler/scale")
    assert report.dropped == tuple(sorted((*DROPPED_OF_ORIGINAL, "head.weight", *training)))
    assert_filled(model, report, split_projections(original), ORIGINAL_NAMES)
    assert model.config.layer_norm_eps == 1e-5


def test_original_files_are_taken_for_large_ones(original):
    """They do not state their sizes."""
    words = "missing: blocks.10.", "blocks.23.norm2.weight", "pos_embed is [1, 17, 32], not [1, 197, 1024]"
    with user_error(*words):
        load_mae(MemorySource(original))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": "fc_norm"}, ["2 missing: norm.bias, norm.weight", "2 unknown: fc_norm.bias, fc_norm.weight"]),
        ({"blocks.1.attn.qkv": "blocks.1.attn.kvq"}, ["6 missing", "2 unknown: blocks.1.attn.kvq.bias"]),
        ({"blocks.1.": "blocks.2."}, ["missing: blocks.1.attn.proj.bias", "unknown: blocks.2.attn.proj.bias"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_original_names_that_do_not_fit(original, changes, words):
    [(old, new)] = changes.items()
    renamed = {new + name[len(old) :] if name.startswith(old) else name: value for name, value in original.items()}
    with user_error(*words):
        load_mae(MemorySource(renamed), **OUR_SIZES, **IMAGE)
