"""A tiny random LLaMA of Hugging Face in torch, and the same model in ours."""

import jax
import numpy as np
import pytest

from emollama_jax.models.llama import Llama, LlamaConfig
from emollama_jax.weights.llama import hugging_face_config, hugging_face_table
from tests.models.tiny import NO_ADAPTERS, llama_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


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


def tensors_of(model: "torch.nn.Module") -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


def from_torch(model: "torch.nn.Module", config: LlamaConfig) -> Llama:
    """Our model with torch's parameters."""
    return llama_of(tensors_of(model), config, NO_ADAPTERS, hugging_face_table(config))


def as_torch(x: jax.Array) -> "torch.Tensor":
    return torch.tensor(np.asarray(x))
