"""HuBERT from Hugging Face: names of both forms, weight norms, what is dropped, and settings that are refused."""

import shutil

import numpy as np
import pytest

from emollama_jax.models.hubert import HubertConfig
from emollama_jax.weights.hubert import join_weight_norm, load_hubert
from tests.weights.encoders import (
    OUR_SIZES,
    SIZES,
    MemorySource,
    assert_filled,
    eagerly,
    source_of,
    torch_encoder,
    weights_of,
)
from tests.weights.tiny import FLOAT32, assert_bit_equal, stored_values, user_error

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")

CONVS = {"conv_dim": (20, 24, 24), "conv_kernel": (10, 3, 2), "conv_stride": (5, 2, 2)}
OUR_CONVS = {"conv_dims": (20, 24, 24), "conv_kernels": (10, 3, 2), "conv_strides": (5, 2, 2)}
POSITIONS = {"num_conv_pos_embeddings": 6, "num_conv_pos_embedding_groups": 4}
FORMS = {
    "large": {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True},
    "base": {"do_stable_layer_norm": False, "feat_extract_norm": "group", "conv_bias": False},
    "no feature norm": {"feat_proj_layer_norm": False, "feat_extract_norm": "group", "conv_bias": True},
}
OUR_FORMS = {
    "large": {"norm_first": True, "conv_norm": "layer", "conv_bias": True},
    "base": {"norm_first": False, "conv_norm": "group", "conv_bias": False},
    "no feature norm": {"norm_first": False, "conv_norm": "group", "conv_bias": True, "feature_norm": False},
}
CONV = "encoder.pos_conv_embed.conv"
NEW = {"g": f"{CONV}.parametrizations.weight.original0", "v": f"{CONV}.parametrizations.weight.original1"}
OLD = {"g": f"{CONV}.weight_g", "v": f"{CONV}.weight_v"}
NAMES = {
    **{f"convs.{i}.conv": f"feature_extractor.conv_layers.{i}.conv" for i in range(3)},
    **{f"convs.{i}.norm": f"feature_extractor.conv_layers.{i}.layer_norm" for i in range(3)},
    "feature_norm": "feature_projection.layer_norm",
    "proj": "feature_projection.projection",
    "positions": CONV,
    "norm": "encoder.layer_norm",
    "layers.attn_norm": "encoder.layers.{layer}.layer_norm",
    "layers.mlp_norm": "encoder.layers.{layer}.final_layer_norm",
    **{f"layers.attn.{part}_proj": f"encoder.layers.{{layer}}.attention.{part}_proj" for part in "qkv"},
    "layers.attn.o_proj": "encoder.layers.{layer}.attention.out_proj",
    "layers.mlp.up_proj": "encoder.layers.{layer}.feed_forward.intermediate_dense",
    "layers.mlp.down_proj": "encoder.layers.{layer}.feed_forward.output_dense",
}


def tiny(kind: str = "HubertModel", form: str = "large", **settings):
    settings = {**SIZES, **CONVS, **POSITIONS, **FORMS[form], "layer_norm_eps": 1e-6, **settings}
    return torch_encoder(kind, **settings)


def with_old_weight_norm(theirs):
    """The model with the weight norm that torch had before parametrizations."""
    torch = pytest.importorskip("torch")
    conv = theirs.encoder.pos_conv_embed.conv
    torch.nn.utils.parametrize.remove_parametrizations(conv, "weight")
    torch.nn.utils.weight_norm(conv, name="weight", dim=2)
    return theirs


def encoder_weights(theirs) -> dict[str, np.ndarray]:
    """Without the prefix, and with the kernel that torch computes from magnitude and direction."""
    encoder = getattr(theirs, "hubert", theirs)
    kernel = encoder.encoder.pos_conv_embed.conv.weight.detach().numpy()
    return weights_of(encoder) | {f"{CONV}.weight": kernel}


def assert_holds(model, report, theirs) -> None:
    """The model holds torch's numbers, and the kernel of the positions up to the order of the sum over its taps."""
    weights = encoder_weights(theirs)
    ours = np.asarray(model.positions.kernel[...]).T
    assert np.max(np.abs(ours - weights[f"{CONV}.weight"])) <= 1e-6
    assert np.std(ours) > 0.01
    assert_filled(model, report, weights | {f"{CONV}.weight": ours}, NAMES)


# --- names ---


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form):
    theirs = tiny(form=form)
    model, report = eagerly(load_hubert, source_of(theirs), **FLOAT32)
    assert model.config == HubertConfig(
        **OUR_SIZES,
        **OUR_CONVS,
        **OUR_FORMS[form],
        **FLOAT32,
        layer_norm_eps=1e-6,
        position_kernel=6,
        position_groups=4,
        attention="chunked",
    )
    norms = [hasattr(conv, "norm") for conv in model.convs]
    assert norms == ([True] * 3 if form == "large" else [True, False, False])
    assert (model.feature_norm is None) == (form == "no feature norm")
    assert report.dropped == ("masked_spec_embed",)
    assert_holds(model, report, theirs)


@pytest.mark.parametrize(
    ("kind", "dropped"),
    [
        ("HubertForCTC", {"lm_head.weight", "lm_head.bias"}),
        (
            "HubertForSequenceClassification",
            {"layer_weights", "projector.weight", "projector.bias", "classifier.weight", "classifier.bias"},
        ),
    ],
)
def test_fine_tuned_models(kind, dropped):
    """Their names have a prefix, the weight norm's too; what was put on top is dropped unread."""
    theirs = tiny(kind, vocab_size=7, classifier_proj_size=5, use_weighted_layer_sum=True)
    source = source_of(theirs)
    model, report = eagerly(load_hubert, source, **FLOAT32)
    assert set(report.dropped) == dropped | {"masked_spec_embed"}
    assert_holds(model, report, theirs)
    encoder = {name for name in source.names() if name.startswith("hubert.")}
    assert set(source.reads) == encoder - {"hubert.masked_spec_embed"}


# --- weight norm ---


def test_both_spellings_of_weight_norm():
    """They give the same kernel, the one that torch computes."""
    theirs = tiny()
    new = eagerly(load_hubert, source_of(theirs), **FLOAT32)
    assert set(NEW.values()) < set(weights_of(theirs))
    theirs = with_old_weight_norm(theirs)
    assert set(OLD.values()) < set(weights_of(theirs))
    old = eagerly(load_hubert, source_of(theirs), **FLOAT32)
    assert_holds(*old, theirs)
    assert np.max(np.abs(np.asarray(new[0].positions.kernel[...] - old[0].positions.kernel[...]))) <= 1e-6
    assert {f"{CONV}.weight", f"{CONV}.bias"} < set(new[1].read)


@pytest.mark.smoke
@pytest.mark.parametrize("spelling", [NEW, OLD], ids=["new", "old"])
def test_weight_norm(spelling):
    """Each tap of a kernel [D, D / groups, K] has the length that its magnitude says; nothing is read before."""
    rng = np.random.default_rng(0)
    direction, magnitude = rng.normal(size=(8, 2, 5)), rng.uniform(0.5, 2, (1, 1, 5))
    weights = {spelling["v"]: direction.astype(np.float16), spelling["g"]: magnitude.astype(np.float16)}
    source = MemorySource(weights | {"other": np.ones(3)})
    joined = join_weight_norm(source)
    assert joined.names() == [f"{CONV}.weight", "other"]
    assert joined.shape(f"{CONV}.weight") == (8, 2, 5)
    assert source.reads == []
    kernel = joined.read(f"{CONV}.weight")
    assert kernel.dtype == np.float32
    lengths = np.linalg.norm(kernel.reshape(16, 5), axis=0)
    np.testing.assert_allclose(lengths, weights[spelling["g"]][0, 0], rtol=1e-6)
    cosines = np.sum(kernel * direction, axis=(0, 1)) / lengths / np.linalg.norm(direction.reshape(16, 5), axis=0)
    np.testing.assert_allclose(cosines, 1, atol=1e-5)


@pytest.mark.parametrize(
    "shapes",
    [{"g": (1, 1, 5)}, {"v": (8, 2, 5)}, {"g": (8, 1, 1), "v": (8, 2, 5)}, {"g": (1, 1, 5), "v": (8, 5)}, {}],
    ids=str,
)
def test_weight_norms_that_are_none_stay(shapes):
    """The engine refuses them by name."""
    weights = {OLD[part]: np.ones(shape, np.float32) for part, shape in shapes.items()}
    assert join_weight_norm(MemorySource(weights)).names() == sorted(weights)


def test_weight_norm_over_other_axes():
    weights = weights_of(tiny())
    weights[NEW["g"]] = np.ones((32, 1, 1), np.float32)
    words = f"1 missing: {CONV}.weight", f"2 unknown: {NEW['g']}", NEW["v"]
    with user_error(*words):
        load_hubert(MemorySource(weights, tiny().config.to_dict()))


def test_kernel_without_weight_norm():
    """Stored as it is used."""
    theirs = tiny()
    kernel = encoder_weights(theirs)[f"{CONV}.weight"]
    weights = {name: value for name, value in weights_of(theirs).items() if name not in NEW.values()}
    source = MemorySource(weights | {f"{CONV}.weight": kernel}, theirs.config.to_dict())
    model, _ = eagerly(load_hubert, source, **FLOAT32)
    np.testing.assert_array_equal(np.asarray(model.positions.kernel[...]).T, kernel)


# --- folders ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What transformers itself writes."""
    folder = tmp_path_factory.mktemp("hubert")
    tiny().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("safe_serialization", [True, False], ids=["safetensors", "torch"])
@pytest.mark.parametrize("is_old", [False, True], ids=["new", "old"])
def test_folders(tmp_path, folder, is_old, safe_serialization):
    """Both weight norms, in both formats, are the folder's model."""
    theirs = with_old_weight_norm(tiny()) if is_old else tiny()
    theirs.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    assert (tmp_path / "pytorch_model.bin").exists() != safe_serialization
    model, report = eagerly(load_hubert, tmp_path, **FLOAT32)
    assert_holds(model, report, theirs)
    values, expected = stored_values(model), stored_values(eagerly(load_hubert, folder, **FLOAT32)[0])
    pair = values.pop("positions.kernel"), expected.pop("positions.kernel")
    np.testing.assert_allclose(*map(np.asarray, pair), atol=1e-6)
    assert_bit_equal(values, expected)


def test_no_config_json(tmp_path, folder):
    shutil.copy(folder / "model.safetensors", tmp_path)
    with user_error(f"no config.json beside the weights: {tmp_path}"):
        load_hubert(tmp_path)


def test_fewer_layers_than_stored(folder):
    """As many blocks as the settings say, no more."""
    theirs = tiny()
    with user_error("16 unknown: encoder.layers.1.attention.k_proj.bias"):
        load_hubert(source_of(theirs, num_hidden_layers=1))
    with user_error("16 missing: encoder.layers.2.attention.k_proj.bias"):
        load_hubert(source_of(theirs, num_hidden_layers=3))


# --- settings ---


def config_json(**changes):
    """The settings of a tiny HuBERT; None takes one away."""
    settings = {"model_type": "hubert", **SIZES, **CONVS, **POSITIONS, **FORMS["large"], "layer_norm_eps": 1e-5}
    return {name: value for name, value in (settings | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "wav2vec2"}, ["the model is a wav2vec2, not a hubert", "only HuBERT models"]),
        ({"conv_pos_batch_norm": True}, ["the model has a batch norm before its positions"]),
        ({"hidden_act": "relu"}, ["the model has activations gelu, relu"]),
        ({"feat_extract_activation": "gelu_new"}, ["the model has activations gelu, gelu_new"]),
        ({"num_conv_pos_embeddings": None}, ["the configuration lacks 'num_conv_pos_embeddings'", "a HuBERT model's"]),
        ({"do_stable_layer_norm": None}, ["the configuration lacks 'do_stable_layer_norm'"]),
        ({"conv_bias": 1}, ["unusable configuration (conv_bias=1)"]),
        ({"conv_dim": 512}, ["unusable configuration"]),
        ({"conv_dim": [20, "24", 24.0]}, ["unusable configuration (conv_dims=(20, '24', 24.0))"]),
        ({"conv_stride": (5, 2)}, ["conv_dims, conv_kernels and conv_strides must hold one number"]),
        ({"feat_extract_norm": "batch"}, ["conv_norm='batch': choose one of layer, group"]),
        ({"num_conv_pos_embedding_groups": 5}, ["hidden_size=32 must be a multiple of position_groups=5"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refused_settings(changes, words):
    with user_error("in-memory.pth", *words):
        load_hubert(MemorySource({}, config_json(**changes)))


def test_old_settings_mean_what_they_meant():
    """Before `feat_proj_layer_norm` and `conv_pos_batch_norm` there were always a norm and never a batch norm."""
    with user_error("feature_projection.layer_norm.weight"):  # the configuration is all right, the tensors are missing
        load_hubert(MemorySource({}, config_json()))
