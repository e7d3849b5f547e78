"""A tiny LLaMA with the tokenizer of the reference, its weights under Hugging Face's names, and ways to write them.

Nothing here uses the code under test to name, order or store a tensor.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from safetensors.numpy import save_file
from sentencepiece import SentencePieceProcessor

from emollama_jax.errors import UserError
from emollama_jax.models.llama import LlamaConfig
from emollama_jax.weights.engine import param_values
from emollama_jax.weights.tensors import StoredTensor, WeightSource

REFERENCE = Path(__file__).parents[1] / "data/reference_tiny/llama"
FLOAT32 = dict.fromkeys(("kernel_dtype", "param_dtype", "compute_dtype"), "float32")

Weights = Mapping[str, np.ndarray]


def tiny_config(**changes) -> LlamaConfig:
    """Sizes that are all different, in rows of whole quantisation blocks, and even, for two devices; float32."""
    sizes = {
        "vocab_size": 640,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 24,
        "rope_theta": 5000.0,
    }
    return LlamaConfig(**{**sizes, **FLOAT32, "remat": "none", **changes})


def random_weights(config: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights [out, in] under the names of torch's `LlamaForCausalLM`; every one of them matters."""
    rng = np.random.default_rng(seed)
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrix = lambda rows, columns: rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
    norm = lambda: rng.normal(1, 0.3, d).astype(np.float32)
    weights = {"model.embed_tokens.weight": rng.normal(size=(v, d)).astype(np.float32)}
    for i in range(config.num_layers):
        block = f"model.layers.{i}"
        weights[f"{block}.input_layernorm.weight"] = norm()
        for name, rows, columns in (("q", q, d), ("k", kv, d), ("v", kv, d), ("o", d, q)):
            weights[f"{block}.self_attn.{name}_proj.weight"] = matrix(rows, columns)
        weights[f"{block}.post_attention_layernorm.weight"] = norm()
        for name, rows, columns in (("gate", f, d), ("up", f, d), ("down", d, f)):
            weights[f"{block}.mlp.{name}_proj.weight"] = matrix(rows, columns)
    weights["model.norm.weight"] = norm()
    if not config.tie_embeddings:
        weights["lm_head.weight"] = matrix(v, d)
    return weights


# --- the formats ---


def settings_of(config: LlamaConfig) -> dict[str, Any]:
    """The `config.json` of transformers 4."""
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
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def write_folder(folder: Path, config: LlamaConfig, weights: Weights, **settings: Any) -> Path:
    """A Hugging Face folder with one safetensors file; `settings` change its `config.json` (None removes a key)."""
    write_config(folder, config, **settings)
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_config(folder: Path, config: LlamaConfig, **settings: Any) -> None:
    """The configuration and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = {**settings_of(config), **settings}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((REFERENCE / name).read_bytes())


def write_sharded(
    folder: Path, config: LlamaConfig, weights: Weights, main: str, save: Callable[[Weights, Path], Any]
) -> Path:
    """A folder of three shards and their index, whose names follow `main` (model.safetensors, ...)."""
    write_config(folder, config)
    stem, suffix = main.split(".")
    weight_map = {}
    for number in range(3):
        shard = {name: weights[name] for name in list(weights)[number::3]}
        file = f"{stem}-{number + 1:05d}-of-00003.{suffix}"
        save(shard, folder / file)
        weight_map |= dict.fromkeys(flax_names(shard) if suffix == "msgpack" else shard, file)
    (folder / f"{main}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def flax_names(weights: Weights) -> dict[str, np.ndarray]:
    """The weights as `FlaxLlamaForCausalLM` has them: kernels [in, out], "/" between the levels."""

    def renamed(name: str) -> str:
        parent, _, leaf = name.replace(".", "/").rpartition("/")
        leaf = "embedding" if "embed" in name else leaf if "norm" in name else "kernel"
        return f"{parent}/{leaf}"

    return {renamed(n): v if "embed" in n else np.ascontiguousarray(v.T) for n, v in weights.items()}


def save_flax(weights: Weights, path: Path) -> None:
    """One Flax file: a nested map."""
    tree: dict[str, Any] = {}
    for name, value in flax_names(weights).items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    path.write_bytes(serialization.msgpack_serialize(tree))


def save_torch(weights: Weights, path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({name: torch.from_numpy(value.copy()) for name, value in weights.items()}, path)


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def in_gguf(name: str, value: np.ndarray, config: LlamaConfig) -> tuple[str, np.ndarray]:
    """A tensor's name in llama.cpp, and the tensor with q's and k's rows in its order."""
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    outside |= {"rope_freqs": "rope_freqs"}
    if (stem := name.removesuffix(".weight")) in outside:
        return f"{outside[stem]}.weight", value
    _, _, layer, part = stem.split(".", 3)
    heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}.get(part)
    if heads:
        halves = value.reshape(heads, 2, config.head_dim // 2, config.hidden_size)
        value = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(value.shape))
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight", value


def write_gguf(
    path: Path,
    config: LlamaConfig,
    weights: Weights,
    kind: str = "F32",
    *,
    architecture: str = "llama",
    metadata: Mapping[str, str] | None = None,
    numbers: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """A GGUF file with the reference's tokenizer, vectors in F32 and matrices as `kind`.

    Returns:
        The weights as the gguf package dequantises them, in Hugging Face's order and under its names.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    for name, value in (metadata or {}).items():
        writer.add_string(name, value)
    for name, value in (numbers or {}).items():
        writer.add_uint32(name, value)
    vocabulary = SentencePieceProcessor(model_file=str(REFERENCE / "tokenizer.model"))
    ids = range(vocabulary.vocab_size())
    kinds = {"is_unknown": 2, "is_control": 3, "is_byte": 6}
    writer.add_tokenizer_model("llama")
    writer.add_token_list([vocabulary.id_to_piece(i) for i in ids])
    writer.add_token_scores([vocabulary.get_score(i) for i in ids])
    writer.add_token_types([next((k for is_, k in kinds.items() if getattr(vocabulary, is_)(i)), 1) for i in ids])
    stored = {}
    for name, value in weights.items():
        theirs, ordered = in_gguf(name, value, config)
        quantisation = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        data = gguf.quants.quantize(ordered, quantisation)
        writer.add_tensor(theirs, data, raw_dtype=quantisation)
        back = gguf.quants.dequantize(data, quantisation)
        if theirs.endswith(("attn_q.weight", "attn_k.weight")):
            back = back.reshape(-1, config.head_dim // 2, 2, config.hidden_size).swapaxes(1, 2).reshape(value.shape)
        stored[name] = back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


# --- sources in memory ---


class CountingSource(WeightSource):
    """Tensors in memory that notes the name of each one read."""

    def __init__(self, weights: Weights, config: dict[str, Any] | None = None):
        tensors = {name: StoredTensor(weights[name].shape, partial(weights.__getitem__, name)) for name in weights}
        super().__init__(Path("memory.safetensors"), "safetensors", tensors, config)
        self.reads: list[str] = []

    def read(self, name: str) -> np.ndarray:
        self.reads.append(name)
        return super().read(name)


# --- comparing ---


def stored_values(model: nnx.Module) -> dict[str, Any]:
    """All parameters by path, with the arrays of quantised ones."""
    return param_values(nnx.state(model))


def assert_bit_equal(ours: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """The same paths, dtypes, shapes and bits."""
    assert set(ours) == set(others)
    for path in ours:
        pair = jax.tree.leaves(ours[path]), jax.tree.leaves(others[path])
        for one, other in zip(*map(partial(map, np.asarray), pair), strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape), path
            assert one.tobytes() == other.tobytes(), path


def assert_holds(model: nnx.Module, weights: Weights) -> None:
    """The float32 model holds exactly these Hugging Face weights."""
    values = stored_values(model)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm", "self_attn": "attn"}
    outside = {"model.embed_tokens": "embed.embedding", "model.norm": "final_norm.scale", "lm_head": "lm_head.kernel"}
    seen = set()
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if stem in outside:
            path, value = outside[stem], values[outside[stem]]
        else:
            _, _, layer, part = stem.split(".", 3)
            first, *rest = part.split(".")
            path = ".".join(["layers", names.get(first, first), *rest, "scale" if "norm" in first else "kernel"])
            value = values[path][int(layer)]
        expected = weight.T if path.endswith("kernel") else weight
        np.testing.assert_array_equal(np.asarray(value), expected.astype(np.float32), err_msg=name)
        seen.add(path)
    assert seen == {path for path in values if "lora" not in path}


TOKENS = np.random.default_rng(7).integers(0, 640, (2, 11))


@nnx.jit
def _logits(model, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.logits(model(model.embed_tokens(tokens), positions, jnp.ones_like(tokens)))


def logits_of(model: nnx.Module, tokens: np.ndarray = TOKENS) -> np.ndarray:
    return np.asarray(_logits(model, jnp.asarray(tokens)))


def torch_model(config: LlamaConfig, weights: Weights):
    """torch's model with these weights, in float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings_of(config)))
    tensors = {name: torch.from_numpy(np.asarray(value, np.float32)) for name, value in weights.items()}
    if config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def torch_logits(model, tokens: np.ndarray = TOKENS) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-4) -> None:
    """Absolutely, and not because there is nothing to compare; the error is printed."""
    error = np.max(np.abs(ours - theirs))
    print(f"max error {error:.2e} of values up to {np.max(np.abs(theirs)):.2f}")
    assert np.std(theirs) > 0.1
    assert error <= tolerance


@contextmanager
def user_error(*words: str) -> Iterator[None]:
    """The block raises a UserError of one line that holds all the words and a remedy after the last semicolon."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    print(message)
    assert "\n" not in message
    assert "; " in message
    for word in words:
        assert word in message, word
