"""The one to copy: the paper's model with what people change first, for labels of your own.

    emollama prepare clips --list train=mine.csv --videos clips --labels calm,stressed,amused --out data
    emollama train --config forkme
    emollama params --config forkme
    emollama params --config forkme --config.lora.rank=16 --config.llama.kernel_dtype=int8

Expected: 16,777,216 LoRA parameters (rank 32) and 41,439,232 of the projectors, 58,216,448 trained in all.
"""

from emollama_jax.config import Config, DataConfig, MeshConfig, TrainConfig, WeightsConfig
from emollama_jax.models.llama import LlamaConfig
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.text.prompts import PromptConfig


def get_config() -> Config:
    return Config(
        # Storage of the frozen kernels: "int8" halves their memory, "nf4" quarters it.
        llama=LlamaConfig(kernel_dtype="bfloat16"),
        # More rank, or more layers to adapt, is more capacity and more memory.
        lora=LoRAConfig(rank=32, alpha=16.0, targets=("q_proj", "v_proj")),
        # Your clips, as emollama prepare clips wrote them: FOLDER:SPLIT, and as many as you like.
        data=DataConfig(train=("data/clips/frame/1.0.0:train",), batch_rows=16),
        # All devices share one copy of the parameters; data=2 keeps two copies.
        mesh=MeshConfig(fsdp=-1),
        # Your labels, in the order of the question; questions of your own for the reason task.
        prompt=PromptConfig(
            labels=("calm", "stressed", "amused"),
            tasks=("emotion", "reason"),
            questions=("How does this person feel at work, and what tells you so?",),
        ),
        # The language model and the encoders; trained="Emotion_LLaMA.pth" goes on from adapters of its rank, 64.
        weights=WeightsConfig(base="weights/llama2", eva_vit="weights/eva_vit_g.pth"),
        # Validate on clips that are not trained on, and end when it helps no
        # more: validation=("data/clips/frame/1.0.0:dev",), validation_interval=100, patience=3.
        train=TrainConfig(
            workdir="runs/forkme",
            steps=1000,
            warmup_steps=50,
            learning_rate=2e-5,
            checkpoint_interval=100,
        ),
    )
