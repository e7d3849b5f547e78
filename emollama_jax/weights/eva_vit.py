"""EVA-ViT-G from the original `eva_vit_g.pth`, and from the vision tower of a Hugging Face BLIP-2.

model, report = load_eva_vit("eva_vit_g.pth")
"""

from jax.sharding import Mesh

from emollama_jax.errors import UserError
from emollama_jax.io.paths import PathLike
from emollama_jax.models.eva_vit import EvaVit, EvaVitConfig
from emollama_jax.sharding import AxisRules
from emollama_jax.weights.encoders import load_encoder
from emollama_jax.weights.engine import TRANSPOSE, LoadReport, Rule, Table
from emollama_jax.weights.sources import open_source
from emollama_jax.weights.tensors import WeightSource
from emollama_jax.weights.vit import (
    CLS_TOKEN,
    LEADING_ONE,
    PARTS,
    linear_rules,
    norm_rules,
    patch_rules,
    resize_positions,
    split_qkv,
    timm_rules,
    without_prefix,
)

BLIP2_PREFIX = "vision_model."
LN_VISION = "ln_vision."


def load_eva_vit(
    where: PathLike | WeightSource,
    config: EvaVitConfig = EvaVitConfig(),
    *,
    ln_vision: PathLike | None = None,
    mesh: Mesh | None = None,
    rules: AxisRules = (),
) -> tuple[EvaVit, LoadReport]:
    """The encoder in `eva_vit_g.pth`, or in the folder or a file of a Hugging Face BLIP-2 or its vision model.

    The files do not say how many of their layers are to be used: `config` does, and it decides the grid to which the
    positions are interpolated.

    Args:
        ln_vision: a file with the weight and the bias of `ln_vision`, where the encoder's has none. Without them it is
            the identity but for the normalisation, as in the released Emotion-LLaMA.
        mesh: where the parameters go, after `rules`; default: the first device.

    Raises:
        UserError: no weights there, damaged files, or tensors that do not fit `config`.
    """

    def arranged(source: WeightSource) -> tuple[EvaVitConfig, WeightSource, Table]:
        if ln_vision is not None:
            with open_source(ln_vision) as norm:
                extra = {LN_VISION + name.removeprefix(LN_VISION): norm.stored(name) for name in norm.names()}
                source = source.with_tensors({name: source.stored(name) for name in source.names()} | extra)
        return config, *arrange(source, config)

    return load_encoder(EvaVit, where, arranged, mesh=mesh, rules=rules)


def arrange(source: WeightSource, config: EvaVitConfig) -> tuple[WeightSource, Table]:
    """The tensors as the model has them, and their table: the original's, or BLIP-2's."""
    if "patch_embed.proj.weight" in source.names():
        return split_qkv(resize_positions(source, "pos_embed", config.grid)), original_table(config)
    _check_blip2(source, config)
    source = without_prefix(source, BLIP2_PREFIX)
    return split_qkv(resize_positions(source, "embeddings.position_embedding", config.grid)), blip2_table(config)


def _check_blip2(source: WeightSource, config: EvaVitConfig) -> None:
    """Raises UserError when a BLIP-2's settings, where there are some, contradict `config` in what its tensors do not
    show."""
    given = source.config or {}
    vision = given.get("vision_config") or given
    expected = {"hidden_act": "gelu", "qkv_bias": True, "num_attention_heads": config.num_heads}
    if wrong := [f"{name}={vision[name]!r}" for name, value in expected.items() if vision.get(name, value) != value]:
        wanted = ", ".join(f"{name}={value!r}" for name, value in expected.items())
        raise UserError(f"the vision model has {', '.join(wrong)}, not {wanted}: {source.path}; use EVA-ViT-G's BLIP-2")


def original_table(config: EvaVitConfig) -> Table:
    """Names of `eva_vit_g.pth`, its fused projections taken apart."""
    block = "blocks.{layer}"
    rules = [
        *timm_rules(block, config.patch_size),
        *(Rule(f"{block}.attn.{part}_bias", f"layers.attn.{part}_proj.bias") for part in "qv"),
        *norm_rules([("ln_vision", "ln_vision")]),
    ]
    drop = (
        _further_layers("blocks", config.num_layers),
        r"(norm|fc_norm|head)\..*",  # of the classifier it was trained as
        r"mask_token",
    )
    return Table(tuple(rules), drop, init=(r"ln_vision\..*",))


def blip2_table(config: EvaVitConfig) -> Table:
    """Names of `Blip2VisionModel`, its fused projections taken apart."""
    block = "encoder.layers.{layer}"
    rules = [
        Rule("embeddings.class_embedding", "embed.cls_token", CLS_TOKEN),
        Rule("embeddings.position_embedding", "embed.positions", LEADING_ONE),
        *patch_rules("embeddings.patch_embedding", "embed.patches", config.patch_size, config.patch_size),
        *norm_rules([(f"{block}.layer_norm1", "layers.attn_norm"), (f"{block}.layer_norm2", "layers.mlp_norm")]),
        *(Rule(f"{block}.self_attn.qkv.weight[{p}]", f"layers.attn.{p}_proj.kernel", TRANSPOSE) for p in PARTS),
        *(Rule(f"{block}.self_attn.qkv.bias[{p}]", f"layers.attn.{p}_proj.bias") for p in "qv"),
        *linear_rules(
            [
                (f"{block}.self_attn.projection", "layers.attn.o_proj"),
                (f"{block}.mlp.fc1", "layers.mlp.up_proj"),
                (f"{block}.mlp.fc2", "layers.mlp.down_proj"),
            ]
        ),
        *norm_rules([("post_layernorm", "ln_vision")]),
    ]
    drop = (
        _further_layers(r"encoder\.layers", config.num_layers),
        # Adds the same to all of a query's scores, which the softmax takes out again; zero in what was trained.
        r"encoder\.layers\.\d+\.self_attn\.qkv\.bias\[k\]",
        r"(qformer|language_model|language_projection|vision_projection|text_projection|itm_head)\..*",
        r"embeddings\.(word|position)_embeddings\.weight",  # of its retrieval model's text
        r"query_tokens",
    )
    return Table(tuple(rules), drop)


def _further_layers(blocks: str, num_layers: int) -> str:
    """A pattern of the tensors of layers that are not used: the file has more than the 39."""
    used = "|".join(map(str, range(num_layers)))
    return rf"{blocks}\.(?!(?:{used})\.)\d+\..*"
