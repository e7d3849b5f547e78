"""A LLaMA of 79 thousand parameters for tests and trials, in float32 throughout.

    emollama params --config tiny

Expected: 78,816 base and 3,072 LoRA parameters, 3.7515 % of all.
"""

from emollama_jax.config import Config
from emollama_jax.models.llama import LlamaConfig
from emollama_jax.models.lora import LoRAConfig


def get_config() -> Config:
    return Config(
        llama=LlamaConfig(
            vocab_size=640,
            hidden_size=32,
            intermediate_size=88,
            num_layers=3,
            num_heads=4,
            num_kv_heads=4,
            head_dim=8,
            kernel_dtype="float32",
            param_dtype="float32",
            compute_dtype="float32",
        ),
        lora=LoRAConfig(rank=8),
    )
