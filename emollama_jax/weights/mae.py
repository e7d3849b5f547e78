"""MAE's encoder from Hugging Face's ViTMAE folders, and from files of the original code.

model, report = load_mae("vit-mae-large")
"""

from typing import Any

from jax.sharding import Mesh

from emollama_jax.io.paths import PathLike
from emollama_jax.models.mae import Mae, MaeConfig
from emollama_jax.sharding import AxisRules
from emollama_jax.weights.architecture import check_variant, read_architecture
from emollama_jax.weights.encoders import load_encoder
from emollama_jax.weights.engine import LoadReport, Rule, Table
from emollama_jax.weights.tensors import WeightSource
from emollama_jax.weights.vit import (
    CLS_TOKEN,
    LEADING_ONE,
    PARTS,
    linear_rules,
    norm_rules,
    patch_rules,
    split_qkv,
    timm_rules,
    without_prefix,
)

ORIGINAL_EPS = 1e-6  # of the original code's norms, which its files do not say
# Of training, and of parts that are not the encoder's.
HARMLESS = (r"decoder_\w+|mask_ratio|norm_pix_loss|encoder_stride|pooler_\w+",)


def load_mae(
    where: PathLike | WeightSource, *, mesh: Mesh | None = None, rules: AxisRules = (), **settings: Any
) -> tuple[Mae, LoadReport]:
    """The encoder in a Hugging Face folder, or in a `.pth` file of the original code or of one trained with it.

    Args:
        mesh: where the parameters go, after `rules`; default: the first device.
        settings: `MaeConfig` fields: those the file does not fix (`pool`, `compute_dtype`, ...), and of a `.pth` file,
            which says nothing about itself, the sizes where they are not ViT-L/16's.

    Raises:
        UserError: no model there, damaged files, another architecture, or tensors that do not fit it.
    """

    def arrange(source: WeightSource) -> tuple[MaeConfig, WeightSource, Table]:
        if "patch_embed.proj.weight" in source.names():
            config = MaeConfig(**{"layer_norm_eps": ORIGINAL_EPS, **settings})
            return config, split_qkv(source), original_table(config)
        config = MaeConfig(**read_architecture(source, _architecture, MaeConfig, "ViTMAE", HARMLESS), **settings)
        return config, without_prefix(source, "vit."), hugging_face_table(config)

    return load_encoder(Mae, where, arrange, mesh=mesh, rules=rules)


def hugging_face_table(config: MaeConfig) -> Table:
    """Names of `ViTMAEModel`; those of the decoder (and its mask token) are dropped."""
    rules = [
        Rule("embeddings.cls_token", "embed.cls_token", CLS_TOKEN),
        Rule("embeddings.position_embeddings", "embed.positions", LEADING_ONE),
        *patch_rules("embeddings.patch_embeddings.projection", "embed.patches", config.patch_size, config.patch_size),
        *hugging_face_block_rules(),
        *linear_rules(
            (f"encoder.layer.{{layer}}.attention.attention.{theirs}", f"layers.attn.{ours}_proj")
            for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"))
        ),
        *norm_rules([("layernorm", "final_norm")]),
    ]
    return Table(tuple(rules), drop=(r"(decoder|classifier|pooler)\..*",))


def hugging_face_block_rules() -> list[Rule]:
    """What a block of Hugging Face's ViTs has beside queries, keys and values."""
    block = "encoder.layer.{layer}"
    return [
        *norm_rules(
            [(f"{block}.layernorm_before", "layers.attn_norm"), (f"{block}.layernorm_after", "layers.mlp_norm")]
        ),
        *linear_rules(
            [
                (f"{block}.attention.output.dense", "layers.attn.o_proj"),
                (f"{block}.intermediate.dense", "layers.mlp.up_proj"),
                (f"{block}.output.dense", "layers.mlp.down_proj"),
            ]
        ),
    ]


def original_table(config: MaeConfig) -> Table:
    """Names of the original code, its fused projections taken apart; those of decoder and mask token are dropped."""
    block = "blocks.{layer}"
    rules = [
        *timm_rules(block, config.patch_size),
        *(Rule(f"{block}.attn.qkv.bias[{part}]", f"layers.attn.{part}_proj.bias") for part in PARTS),
        *norm_rules([("norm", "final_norm")]),
    ]
    return Table(tuple(rules), drop=(r"decoder_.*", r"mask_token", r"head\..*"))


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    act = config.get("hidden_act", "gelu")
    unsupported = {
        f"activation {act}": act != "gelu",
        "no biases of queries, keys and values": not config.get("qkv_bias", True),
        f"images of {config.get('num_channels')} channels": config.get("num_channels", 3) != 3,
    }
    check_variant(config, ("vit_mae", "vit"), unsupported)
    return hugging_face_sizes(config)


def hugging_face_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `VitConfig` in the configuration of one of Hugging Face's ViTs."""
    return {
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "layer_norm_eps": float(config["layer_norm_eps"]),
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
    }
