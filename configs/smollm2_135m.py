"""SmolLM2-135M, the smallest real chat model of this architecture, in float32 for a machine without accelerator.

    emollama params --config smollm2_135m

Expected: 3,686,400 LoRA parameters, 2.6674 % of them and the language model's 134,515,008.
"""

from emollama_jax.config import Config
from emollama_jax.models.llama import LlamaConfig


def get_config() -> Config:
    return Config(
        llama=LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            rope_theta=1e5,
            tie_embeddings=True,
            kernel_dtype="float32",
            param_dtype="float32",
            compute_dtype="float32",
        )
    )
