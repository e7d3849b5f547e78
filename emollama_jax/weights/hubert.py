"""HuBERT from Hugging Face folders: large and base, Chinese and English.

model, report = load_hubert("chinese-hubert-large")
"""

from typing import Any

import numpy as np
from jax.sharding import Mesh

from emollama_jax.io.paths import PathLike
from emollama_jax.models.hubert import Hubert, HubertConfig
from emollama_jax.sharding import AxisRules
from emollama_jax.weights.architecture import check_variant, read_architecture
from emollama_jax.weights.encoders import load_encoder
from emollama_jax.weights.engine import TRANSPOSE, LoadReport, Rule, Table
from emollama_jax.weights.tensors import StoredTensor, WeightSource
from emollama_jax.weights.vit import linear_rules, norm_rules, without_prefix

POSITIONS = "encoder.pos_conv_embed.conv"
# Magnitude and direction of a kernel under torch's weight norm, as old and new versions name them.
WEIGHT_NORMS = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))
# Of training, and of parts that are not the encoder's.
HARMLESS = (
    r"mask_(time|feature|channel)_\w+|apply_spec_augment|ctc_\w+|vocab_size|num_feat_extract_layers"
    r"|use_weighted_layer_sum|classifier_proj_size|feat_\w+_dropout",
)


def load_hubert(
    where: PathLike | WeightSource, *, mesh: Mesh | None = None, rules: AxisRules = (), **settings: Any
) -> tuple[Hubert, LoadReport]:
    """The encoder in a Hugging Face folder.

    Args:
        mesh: where the parameters go, after `rules`; default: the first device.
        settings: `HubertConfig` fields that the file does not fix: `kernel_dtype`, `compute_dtype`, ...

    Raises:
        UserError: no model there, damaged files, another architecture, or tensors that do not fit it.
    """

    def arrange(source: WeightSource) -> tuple[HubertConfig, WeightSource, Table]:
        config = HubertConfig(**read_architecture(source, _architecture, HubertConfig, "HuBERT", HARMLESS), **settings)
        return config, join_weight_norm(without_prefix(source, "hubert.")), hugging_face_table(config)

    return load_encoder(Hubert, where, arrange, mesh=mesh, rules=rules)


def hugging_face_table(config: HubertConfig) -> Table:
    """Names of `HubertModel`, the weight norm of the position convolution multiplied out."""
    block, rules = "encoder.layers.{layer}", []
    for i in range(len(config.conv_dims)):
        theirs = f"feature_extractor.conv_layers.{i}"
        rules.append(Rule(f"{theirs}.conv.weight", f"convs.{i}.conv.kernel", TRANSPOSE))
        if config.conv_bias:
            rules.append(Rule(f"{theirs}.conv.bias", f"convs.{i}.conv.bias"))
        if config.conv_norm == "layer" or i == 0:
            rules += norm_rules([(f"{theirs}.layer_norm", f"convs.{i}.norm")])
    if config.feature_norm:
        rules += norm_rules([("feature_projection.layer_norm", "feature_norm")])
    rules += [
        *linear_rules([("feature_projection.projection", "proj")]),
        Rule(f"{POSITIONS}.weight", "positions.kernel", TRANSPOSE),
        Rule(f"{POSITIONS}.bias", "positions.bias"),
        *norm_rules(
            [
                ("encoder.layer_norm", "norm"),
                (f"{block}.layer_norm", "layers.attn_norm"),
                (f"{block}.final_layer_norm", "layers.mlp_norm"),
            ]
        ),
        *linear_rules((f"{block}.attention.{part}_proj", f"layers.attn.{part}_proj") for part in "qkv"),
        *linear_rules(
            [
                (f"{block}.attention.out_proj", "layers.attn.o_proj"),
                (f"{block}.feed_forward.intermediate_dense", "layers.mlp.up_proj"),
                (f"{block}.feed_forward.output_dense", "layers.mlp.down_proj"),
            ]
        ),
    ]
    drop = (
        r"masked_spec_embed",  # stands for masked frames in training
        r"(lm_head|projector|classifier|final_proj|label_embs_concat)(\..*)?",
        r"layer_weights",
    )
    return Table(tuple(rules), drop)


def join_weight_norm(source: WeightSource) -> WeightSource:
    """The source with the position convolution's kernel [D, D / groups, K] instead of its magnitude [1, 1, K] and
    direction, in either spelling (weight norm, arXiv:1602.07868, of each tap)."""
    names = set(source.names())
    for spelling in WEIGHT_NORMS:
        magnitude, direction = (f"{POSITIONS}.{name}" for name in spelling)
        if not {magnitude, direction} <= names:
            continue
        g, v = source.stored(magnitude), source.stored(direction)
        if len(v.shape) != 3 or g.shape != (1, 1, v.shape[2]):
            continue  # the engine's to refuse

        def read(g: StoredTensor = g, v: StoredTensor = v) -> np.ndarray:
            kernel = v.read().astype(np.float32)
            return kernel * (g.read() / np.sqrt(np.square(kernel).sum(axis=(0, 1), keepdims=True)))

        tensors = {name: source.stored(name) for name in names - {magnitude, direction}}
        return source.with_tensors(tensors | {f"{POSITIONS}.weight": StoredTensor(v.shape, read)})
    return source


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    acts = {config.get("hidden_act", "gelu"), config.get("feat_extract_activation", "gelu")}
    unsupported = {
        f"activations {', '.join(sorted(acts))}": acts != {"gelu"},
        "a batch norm before its positions": bool(config.get("conv_pos_batch_norm")),
    }
    check_variant(config, ("hubert",), unsupported)
    return {
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "layer_norm_eps": float(config["layer_norm_eps"]),
        "conv_dims": tuple(config["conv_dim"]),
        "conv_kernels": tuple(config["conv_kernel"]),
        "conv_strides": tuple(config["conv_stride"]),
        "conv_norm": config["feat_extract_norm"],
        "conv_bias": config["conv_bias"],
        "feature_norm": config.get("feat_proj_layer_norm", True),
        "norm_first": config["do_stable_layer_norm"],
        "position_kernel": config["num_conv_pos_embeddings"],
        "position_groups": config["num_conv_pos_embedding_groups"],
    }
