"""Stage 1: labels and coarse captions of MERR, from MiniGPT-v2's checkpoint. The paper's model at full size.

    emollama prepare merr MERR --out data --frame peak
    emollama convert Llama-2-7b-chat-hf weights/llama2
    emollama train --config stage1_merr
    emollama params --config stage1_merr

The reference sees 120,000 clips in 30,000 steps of 4 clips. Here a step is 16 rows of 2048 tokens, about 80 clips (the
log's `clips` says how many), so the same clips are 1,500 steps; the warm-up is the same part of them, and the rates are
the reference's times the root of 20, as AdamW wants for batches 20 times as large. The reference's own steps:

    emollama train --config stage1_merr --config.data.batch_rows=4 --config.data.clips_per_row=1 \\
        --config.data.sequence_length=1536 --config.train.steps=30000 --config.train.warmup_steps=1000 \\
        --config.train.warmup_from=1e-6 --config.train.learning_rate=1e-5 --config.train.final_rate=1e-6

Expected: 33,554,432 LoRA parameters (0.4955 % of LLaMA + LoRA, the paper's "34M, 0.495 %") and 41,439,232 of the
projectors, 74,993,664 trained in all.
"""

from emollama_jax.config import Config, DataConfig, MeshConfig, TrainConfig, WeightsConfig
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.text.prompts import PromptConfig


def get_config() -> Config:
    return Config(
        lora=LoRAConfig(rank=64, alpha=16.0, dropout=0.05, targets=("q_proj", "v_proj")),
        data=DataConfig(train=("data/merr/frame/1.0.0:coarse",), sequence_length=2048, clips_per_row=6, batch_rows=16),
        mesh=MeshConfig(fsdp=-1),
        prompt=PromptConfig(tasks=("emotion", "reason")),
        weights=WeightsConfig(trained="weights/minigptv2_checkpoint.pth"),
        train=TrainConfig(
            workdir="runs/stage1",
            steps=1500,
            warmup_steps=50,
            warmup_from=4.5e-6,
            learning_rate=4.5e-5,
            final_rate=4.5e-6,
            checkpoint_interval=100,
        ),
    )
