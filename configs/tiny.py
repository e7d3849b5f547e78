"""A LLaMA of 79 thousand parameters, and encoders as small, for tests and trials, in float32 throughout.

    emollama params --config tiny
    emollama train --config tiny --config.data.train='("data/clips/image_tokens/1.0.0:train",)'

Expected: 3,072 LoRA parameters, 3.7515 % of them and LLaMA's 78,816; 109,216 are trained.
"""

from emollama_jax.config import Config, TrainConfig, WeightsConfig
from emollama_jax.models.eva_vit import EvaVitConfig
from emollama_jax.models.hubert import HubertConfig
from emollama_jax.models.llama import LlamaConfig
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.models.mae import MaeConfig
from emollama_jax.models.videomae import VideoMaeConfig


def get_config() -> Config:
    float32 = dict.fromkeys(("kernel_dtype", "param_dtype", "compute_dtype"), "float32")
    small = {"num_layers": 2, "num_heads": 4, "hidden_size": 32, "intermediate_size": 64, **float32}
    return Config(
        llama=LlamaConfig(
            vocab_size=640,
            hidden_size=32,
            intermediate_size=88,
            num_layers=3,
            num_heads=4,
            num_kv_heads=4,
            head_dim=8,
            **float32,
        ),
        lora=LoRAConfig(rank=8),
        eva_vit=EvaVitConfig(
            num_layers=3, num_heads=4, hidden_size=48, intermediate_size=209, image_size=56, **float32
        ),
        mae=MaeConfig(image_size=32, patch_size=8, **small),
        videomae=VideoMaeConfig(image_size=32, patch_size=8, num_frames=4, **small),
        hubert=HubertConfig(conv_dims=(32,) * 7, position_kernel=16, position_groups=4, **small),
        weights=WeightsConfig(base="weights/tiny"),
        train=TrainConfig(
            workdir="runs/tiny",
            steps=100,
            warmup_steps=10,
            warmup_from=1e-3,
            learning_rate=1e-2,
            final_rate=1e-3,
            checkpoint_interval=50,
        ),
    )
