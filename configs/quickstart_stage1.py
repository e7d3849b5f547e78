"""Stage 1 of `emollama quickstart`: the labels of synthetic clips, with SmolLM2-135M, on two CPU cores.

    emollama quickstart
    emollama params --config quickstart_stage1

The encoders are as small as tells faces and voices apart while untrained; one image token stands for a frame. Their
outputs differ little from clip to clip, so the projectors are centred. The question is short: the labels need not be
listed for a model that learns them.

Expected: 460,800 LoRA parameters and 537,408 of the projectors, 998,208 trained in all.
"""

import dataclasses

from emollama_jax.config import Config, DataConfig, TrainConfig, WeightsConfig, load_config
from emollama_jax.media.clip import ClipConfig
from emollama_jax.models.eva_vit import EvaVitConfig
from emollama_jax.models.hubert import HubertConfig
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.models.mae import MaeConfig
from emollama_jax.models.videomae import VideoMaeConfig
from emollama_jax.text.prompts import PromptConfig


def get_config() -> Config:
    smollm2 = load_config("smollm2_135m")
    float32 = dict.fromkeys(("kernel_dtype", "param_dtype", "compute_dtype"), "float32")
    width = 256
    small = {"hidden_size": width, "intermediate_size": 2 * width, "num_layers": 1, "num_heads": 4, **float32}
    return dataclasses.replace(
        smollm2,
        llama=dataclasses.replace(smollm2.llama, remat="none", loss_chunk=16),
        lora=LoRAConfig(rank=8, alpha=16.0, dropout=0.0, targets=("q_proj", "v_proj")),
        eva_vit=EvaVitConfig(
            hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, image_size=28, patch_size=14, **float32
        ),
        mae=MaeConfig(image_size=32, patch_size=32, **small),
        videomae=VideoMaeConfig(image_size=32, patch_size=32, num_frames=16, tubelet_size=16, **small),
        hubert=HubertConfig(
            conv_dims=(32,) * 3 + (64,) * 4,
            conv_norm="group",
            feature_norm=False,
            position_kernel=16,
            position_groups=4,
            **small,
        ),
        projectors=dataclasses.replace(smollm2.projectors, feature_size=width),
        clip=ClipConfig(max_faces=8),
        data=DataConfig(
            train=("data/clips/image_tokens/1.0.0:train",),
            eval=("data/clips/image_tokens/1.0.0:test",),
            sequence_length=220,
            clips_per_row=5,
            batch_rows=1,
        ),
        prompt=PromptConfig(
            tasks=("emotion",),
            emotion_question="Which emotion?",
            questions=("What do you notice?",),
        ),
        weights=WeightsConfig(base="weights/smollm2"),
        train=TrainConfig(
            workdir="runs/stage1",
            steps=95,
            warmup_steps=15,
            warmup_from=1e-4,
            learning_rate=1.5e-3,
            final_rate=1.5e-4,
            weight_decay=0.0,
            beta2=0.95,
            clip_norm=1.0,
            center_projectors=True,
            loss_average="token",
            log_interval=5,
            checkpoint_interval=50,
        ),
    )
