"""A tiny random LLaMA of Hugging Face and the same model in ours."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from emollama_jax.models.llama import Llama, LlamaConfig
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.weights.engine import Table, load
from emollama_jax.weights.llama import hugging_face_config, hugging_face_table
from emollama_jax.weights.sources import Source, StoredTensor

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NO_ADAPTERS = LoRAConfig(rank=0)


def tiny_config(**changes) -> LlamaConfig:
    """Sizes that are all different, so that no two axes can be mixed up unnoticed; float32 throughout."""
    dtypes = dict.fromkeys(("kernel_dtype", "param_dtype", "compute_dtype"), "float32")
    sizes = {
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 44,
        "num_layers": 3,
        "num_heads": 6,
        "num_kv_heads": 6,
        "head_dim": 10,
    }
    return LlamaConfig(**{**sizes, **dtypes, "remat": "none", "loss_chunk": 5, **changes})


def torch_llama(config: LlamaConfig, seed: int = 0) -> "transformers.LlamaForCausalLM":
    """A model whose every parameter matters: attention far from uniform, norms far from 1."""
    settings = hugging_face_config(config, "float32")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, attn_implementation="eager"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise if "embed" in name else noise * parameter.shape[1] ** -0.5)
    return model.eval()


def memory_source(tensors: dict[str, np.ndarray], format: str = "safetensors") -> Source:
    stored = {name: StoredTensor(value.shape, lambda value=value: value) for name, value in tensors.items()}
    return Source(Path("memory"), format, stored)


def from_torch(
    model: "torch.nn.Module", config: LlamaConfig, lora: LoRAConfig = NO_ADAPTERS, table: Table | None = None
) -> Llama:
    """Our model with torch's parameters."""
    source = memory_source({name: value.numpy().copy() for name, value in model.state_dict().items()})
    make_model = lambda: Llama(config, lora, rngs=nnx.Rngs(0))
    return load(make_model, source, table or hugging_face_table(config))[0]


def rows(config: LlamaConfig, lengths: tuple[int, ...] = (13, 13), seed: int = 1):
    """Random tokens padded at the right to the longest: tokens, positions, segment ids [B, T]."""
    width = max(lengths)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (len(lengths), width))
    positions = np.broadcast_to(np.arange(width), tokens.shape)
    return tokens, positions, (positions < np.array(lengths)[:, None]).astype(np.int32)


def close(ours, theirs, tolerance: float, what: str) -> None:
    """Equal up to `tolerance`, absolute; the error found is printed."""
    ours, theirs = (np.asarray(x.detach() if torch.is_tensor(x) else x, np.float64) for x in (ours, theirs))
    assert ours.shape == theirs.shape, what
    error = np.max(np.abs(ours - theirs))
    print(f"{what}: max error {error:.2e} of values up to {np.max(np.abs(theirs)):.2f}")
    assert error <= tolerance, what
