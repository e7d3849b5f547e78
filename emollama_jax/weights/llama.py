"""LLaMA's names and settings in Hugging Face, Flax and GGUF files."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from emollama_jax.errors import UserError
from emollama_jax.models.llama import LlamaConfig
from emollama_jax.weights.architecture import check_variant, read_architecture
from emollama_jax.weights.engine import SAME, TRANSPOSE, Rule, Table, Transform
from emollama_jax.weights.tensors import StoredTensor, WeightSource

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Settings of a config.json, and keys of a GGUF file, that do not change what the model computes. Those of the
# tokenizer are its reader's; pretraining_tp splits a product into parts of the same sum.
HARMLESS = (r"max_position_embeddings|max_sequence_length|pretraining_tp|is_llama_config|unsloth_\w+",)
GGUF_HARMLESS = (
    r"(GGUF|general|tokenizer|quantize|split)\..*|llama\.(context_length|vocab_size|tensor_data_layout)"
    r"|llama\.rope\.scaling\.(original_context_length|finetuned)",
)
ROPE_FACTORS = "rope_freqs.weight"  # what each frequency is divided by, in a GGUF file
ADAPTERS = (r".*\.lora_[ab]",)  # not in a base model's files: they start as a new model's


def projections(names: Iterable[str]) -> list[tuple[str, str]]:
    """The (Hugging Face, our) names within a block of its linear layers."""
    return [(f"self_attn.{n}", f"attn.{n}") if n in ATTENTION else (f"mlp.{n}", f"mlp.{n}") for n in names]


def hugging_face_table(config: LlamaConfig) -> Table:
    """Names of `LlamaForCausalLM` in torch: weights [out, in]."""
    block = "model.layers.{layer}"
    rules = [
        Rule(EMBEDDING, "embed.embedding"),
        Rule(f"{block}.input_layernorm.weight", "layers.attn_norm.scale"),
        *(Rule(f"{block}.{a}.weight", f"layers.{b}.kernel", TRANSPOSE) for a, b in projections(ATTENTION)),
        Rule(f"{block}.post_attention_layernorm.weight", "layers.mlp_norm.scale"),
        *(Rule(f"{block}.{a}.weight", f"layers.{b}.kernel", TRANSPOSE) for a, b in projections(MLP)),
        Rule("model.norm.weight", "final_norm.scale"),
    ]
    drop = [r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"]  # a constant that old versions stored
    if config.tie_embeddings:
        drop.append(r"lm_head\.weight")
    else:
        rules.append(Rule(HEAD, "lm_head.kernel", TRANSPOSE))
    return Table(tuple(rules), tuple(drop), ADAPTERS)


def flax_table(config: LlamaConfig) -> Table:
    """Names of `FlaxLlamaForCausalLM`: the same parts, kernels [in, out]."""
    leaf = {"embed.embedding": "embedding"}

    def renamed(rule: Rule) -> Rule:
        name = rule.tensor.removesuffix(".weight").replace(".", "/")
        kernel = rule.param.endswith("kernel")
        return Rule(f"{name}/{leaf.get(rule.param, 'kernel' if kernel else 'weight')}", rule.param, SAME)

    torch = hugging_face_table(config)
    drop = (r"lm_head/kernel",) if config.tie_embeddings else ()
    return Table(tuple(renamed(rule) for rule in torch.rules), drop, ADAPTERS)


def gguf_table(config: LlamaConfig) -> Table:
    """Names of llama.cpp, which orders the rows of q and k for another form of the rotary embedding."""
    names = {
        "embed.embedding": "token_embd.weight",
        "layers.attn_norm.scale": "blk.{layer}.attn_norm.weight",
        "layers.mlp_norm.scale": "blk.{layer}.ffn_norm.weight",
        "layers.attn.o_proj.kernel": "blk.{layer}.attn_output.weight",
        **{f"layers.attn.{n}_proj.kernel": f"blk.{{layer}}.attn_{n}.weight" for n in "qkv"},
        **{f"layers.mlp.{n}_proj.kernel": f"blk.{{layer}}.ffn_{n}.weight" for n in ("gate", "up", "down")},
        "final_norm.scale": "output_norm.weight",
        "lm_head.kernel": "output.weight",
    }
    heads = {
        "layers.attn.q_proj.kernel": adjacent_pairs(config.num_heads),
        "layers.attn.k_proj.kernel": adjacent_pairs(config.num_kv_heads),
    }
    rules = hugging_face_table(config).rules
    rules = (Rule(names[r.param], r.param, heads.get(r.param, r.transform)) for r in rules)
    return Table(tuple(rules), init=ADAPTERS)


def adjacent_pairs(num_heads: int) -> Transform:
    """From rows whose rotated pairs lie side by side, (2i, 2i + 1), to pairs half a head apart, and transposed."""
    regroup = lambda x, *inner: x.reshape(num_heads, *inner, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
    return Transform(into=lambda x: regroup(x, -1, 2).T, out=lambda x: regroup(x.T, 2, -1))


TABLES = {"safetensors": hugging_face_table, "torch": hugging_face_table, "flax": flax_table, "gguf": gguf_table}


def architecture(source: WeightSource) -> dict[str, Any]:
    """The `LlamaConfig` fields that a file's own configuration fixes.

    Raises:
        UserError: no configuration, another architecture, a variant of LLaMA that the model does not have, or values
            that make no sense.
    """

    def parse(config: dict[str, Any]) -> dict[str, Any]:
        if source.format == "gguf":  # which says that the head is tied by not having one
            return _gguf_architecture(config) | {"tie_embeddings": "output.weight" not in source.names()}
        return _hugging_face_architecture(config)

    harmless = GGUF_HARMLESS if source.format == "gguf" else HARMLESS
    return read_architecture(source, parse, LlamaConfig, "LLaMA", harmless)


def arrange(source: WeightSource, config: LlamaConfig) -> WeightSource:
    """The tensors as the tables name them: the embedding of a tied model may be stored as its head, and `LlamaModel`,
    which is the model without a head, has shorter names.

    Raises:
        UserError: a tied model whose head is not its embedding, a model without a head that is not tied, or a GGUF file
            with scaled rotary frequencies.
    """
    tensors = _of_causal_lm(source, config)
    names = set(tensors)
    if source.format == "gguf" and ROPE_FACTORS in names:
        if not np.all(tensors.pop(ROPE_FACTORS).read() == 1):
            raise UserError(f"scaled rotary positions, {ROPE_FACTORS}: {source.path}; only LLaMA models without")
    if config.tie_embeddings and HEAD in names:
        if EMBEDDING not in names:
            tensors[EMBEDDING] = tensors.pop(HEAD)
        elif not np.array_equal(source.read(EMBEDDING), source.read(HEAD)):
            raise UserError(
                f"{HEAD} is not {EMBEDDING}, although config.json has tie_word_embeddings: {source.path}; "
                'put "tie_word_embeddings": false into it where the head is to be used'
            )
    return source.with_tensors(tensors)


def _of_causal_lm(source: WeightSource, config: LlamaConfig) -> dict[str, StoredTensor]:
    """The tensors under `LlamaForCausalLM`'s names, where they are `LlamaModel`'s too."""
    stored = {name: source.stored(name) for name in source.names()}
    separator = "/" if source.format == "flax" else "."
    if not any(name.startswith(f"embed_tokens{separator}") for name in stored):
        return stored
    head = f"lm_head{separator}"
    if not (config.tie_embeddings or any(name.startswith(head) for name in stored)):
        raise UserError(
            f"no lm_head: {source.path} is a LlamaModel, the language model without its head, and config.json does not "
            "tie that to the embedding; save the LlamaForCausalLM that it belongs to"
        )
    return {name if name.startswith(head) else f"model{separator}{name}": x for name, x in stored.items()}


def _hugging_face_architecture(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}  # transformers 5; before, rope_theta and rope_scaling
    unsupported = {
        "biases": bool(config.get("attention_bias") or config.get("mlp_bias")),
        f"activation {config.get('hidden_act')}": config.get("hidden_act", "silu") not in ("silu", "swish"),
        "scaled rotary positions": not all(map(_is_plain_rope, (config.get("rope_scaling") or {}, rope))),
        "rotary positions on a part of each head": config.get("partial_rotary_factor", 1) != 1,
        "rotary positions in interleaved pairs": bool(config.get("rope_interleaved")),
    }
    check_variant(config, ("llama",), unsupported)
    num_heads = config["num_attention_heads"]
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": config.get("num_key_value_heads") or num_heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // num_heads,
        "rms_norm_eps": float(config["rms_norm_eps"]),
        "rope_theta": float(config.get("rope_theta") or rope.get("rope_theta", 10000.0)),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _is_plain_rope(settings: dict[str, Any]) -> bool:
    """Whether the settings of rotary positions leave them as they are: none, or a linear scaling by 1."""
    kind = settings.get("rope_type", settings.get("type", "default"))
    given = {name: value for name, value in settings.items() if value is not None} | {"kind": kind}
    plain = {"kind": ("default", "linear"), "factor": (1,), "partial_rotary_factor": (1,), "attention_factor": (1,)}
    known = plain.keys() | {"rope_type", "type", "rope_theta", "original_max_position_embeddings"}
    return given.keys() <= known and all(given[name] in values for name, values in plain.items() if name in given)


def _gguf_architecture(metadata: dict[str, Any]) -> dict[str, Any]:
    if (found := metadata.get("general.architecture")) != "llama":
        raise NotImplementedError(f"the model is a {found}, not a llama")
    of = lambda key: metadata[f"llama.{key}"]
    given = lambda key, default: metadata.get(f"llama.{key}", default)
    num_heads = of("attention.head_count")
    head_dim = given("attention.key_length", of("embedding_length") // num_heads)
    # llama.cpp reads a factor without a type as a linear one.
    kind, factor = given("rope.scaling.type", "linear"), given("rope.scaling.factor", given("rope.scale_linear", 1))
    unsupported = {
        "scaled rotary positions": kind not in ("none", "linear") or (kind == "linear" and factor not in (0, 1)),
        "an attention factor of its rotary positions": given("rope.scaling.attn_factor", 1) != 1,
        "rotary positions on a part of each head": given("rope.dimension_count", head_dim) != head_dim,
        "values of another width than its keys": given("attention.value_length", head_dim) != head_dim,
        "experts": bool(given("expert_count", 0) or given("expert_used_count", 0)),
        "attention to later tokens": not given("attention.causal", True),
    }
    if wrong := ", ".join(name for name, is_set in unsupported.items() if is_set):
        raise NotImplementedError(f"the model has {wrong}")
    return {
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_layers": of("block_count"),
        "num_heads": num_heads,
        "num_kv_heads": given("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": round(of("attention.layer_norm_rms_epsilon"), 12),  # stored as float32
        "rope_theta": float(given("rope.freq_base", 10000.0)),
    }


def hugging_face_config(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of the model in torch, for transformers 4 and 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }
