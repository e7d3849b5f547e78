"""VideoMAE's encoder from Hugging Face folders, pre-trained or fine-tuned.

model, report = load_videomae("videomae-large")
"""

from typing import Any

from jax.sharding import Mesh

from emollama_jax.io.paths import PathLike
from emollama_jax.models.videomae import VideoMae, VideoMaeConfig
from emollama_jax.sharding import AxisRules
from emollama_jax.weights.architecture import check_variant, read_architecture
from emollama_jax.weights.encoders import load_encoder
from emollama_jax.weights.engine import TRANSPOSE, LoadReport, Rule, Table
from emollama_jax.weights.mae import hugging_face_block_rules, hugging_face_sizes
from emollama_jax.weights.tensors import WeightSource
from emollama_jax.weights.vit import norm_rules, patch_rules, without_prefix

# Of training, and of parts that are not the encoder's.
HARMLESS = (r"decoder_\w+|mask_ratio|norm_pix_loss",)
BIASES = ("qkv_bias", "qv_bias")  # the name in transformers 4, and that in its newer versions


def load_videomae(
    where: PathLike | WeightSource, *, mesh: Mesh | None = None, rules: AxisRules = (), **settings: Any
) -> tuple[VideoMae, LoadReport]:
    """The encoder in a Hugging Face folder.

    Args:
        mesh: where the parameters go, after `rules`; default: the first device.
        settings: `VideoMaeConfig` fields that the file does not fix: `kernel_dtype`, `compute_dtype`, ...

    Raises:
        UserError: no model there, damaged files, another architecture, or tensors that do not fit it.
    """

    def arrange(source: WeightSource) -> tuple[VideoMaeConfig, WeightSource, Table]:
        config = VideoMaeConfig(
            **read_architecture(source, _architecture, VideoMaeConfig, "VideoMAE", HARMLESS), **settings
        )
        return config, without_prefix(source, "videomae."), hugging_face_table(config)

    return load_encoder(VideoMae, where, arrange, mesh=mesh, rules=rules)


def hugging_face_table(config: VideoMaeConfig) -> Table:
    """Names of `VideoMAEModel`; what pre-training and classification add is dropped."""
    attention = "encoder.layer.{layer}.attention.attention"
    window = (config.tubelet_size, config.patch_size, config.patch_size)
    rules = [
        *patch_rules("embeddings.patch_embeddings.projection", "patches", *window),
        *hugging_face_block_rules(),
        *(
            Rule(f"{attention}.{theirs}.weight", f"layers.attn.{ours}_proj.kernel", TRANSPOSE)
            for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"))
        ),
        *(Rule(f"{attention}.{part}_bias", f"layers.attn.{part}_proj.bias") for part in "qv"),
    ]
    if config.final_norm:
        rules += norm_rules([("layernorm", "final_norm")])
    drop = (
        r"(decoder|encoder_to_decoder)\..*",
        r"mask_token",
        r"(fc_norm|classifier)\..*",
        r"(embeddings\.)?position_embeddings",  # fixed sines, which we compute
    )
    return Table(tuple(rules), drop)


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    act = config.get("hidden_act", "gelu")
    unsupported = {
        f"activation {act}": act != "gelu",
        "no biases of queries and values": not all(config.get(name, True) for name in BIASES),
        f"frames of {config.get('num_channels')} channels": config.get("num_channels", 3) != 3,
    }
    check_variant(config, ("videomae",), unsupported)
    return hugging_face_sizes(config) | {
        "num_frames": config["num_frames"],
        "tubelet_size": config["tubelet_size"],
        "final_norm": not config.get("use_mean_pooling", True),
    }
