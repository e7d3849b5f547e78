"""LLaMA-2-7B-chat with the adapters of the released Emotion-LLaMA: rank 64 on the queries and values of every layer.

    emollama params --config llama2_7b

Expected: 33,554,432 LoRA parameters, 0.4955 % of them and LLaMA's 6,738,415,616: the paper's "34M, 0.495 %".
"""

from emollama_jax.config import Config
from emollama_jax.models.llama import LlamaConfig
from emollama_jax.models.lora import LoRAConfig


def get_config() -> Config:
    return Config(
        llama=LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
            tie_embeddings=False,
            kernel_dtype="bfloat16",
            param_dtype="bfloat16",
            compute_dtype="bfloat16",
            scan_layers=True,
            remat="full",
        ),
        lora=LoRAConfig(rank=64, alpha=16.0, dropout=0.05, targets=("q_proj", "v_proj")),
    )
