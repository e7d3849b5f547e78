"""Stage 1: labels and coarse captions of MERR, from MiniGPT-v2's checkpoint. The paper's model at full size.

    emollama prepare merr MERR --out data
    emollama params --config stage1_merr

Expected: 33,554,432 LoRA parameters (0.4955 % of LLaMA + LoRA, the paper's "34M, 0.495 %") and 41,439,232 of the
projectors, 74,993,664 trained in all.
"""

from emollama_jax.config import Config, DataConfig, MeshConfig
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.text.prompts import PromptConfig


def get_config() -> Config:
    return Config(
        lora=LoRAConfig(rank=64, alpha=16.0, dropout=0.05, targets=("q_proj", "v_proj")),
        data=DataConfig(train=("data/merr/frame/1.0.0:coarse",), row_length=2048, clips_per_row=6, batch_rows=16),
        mesh=MeshConfig(fsdp=-1),
        prompt=PromptConfig(tasks=("emotion", "reason")),
    )
