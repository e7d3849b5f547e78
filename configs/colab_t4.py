"""Own clips on Colab's T4, which has 16 GB and no bfloat16, from Emotion-LLaMA's weights: int8 base, float16 compute.

    emollama extract --config colab_t4 clips --list clips.csv \\
        --videos clips --frame peak --image image_tokens --out data
    emollama plan --config colab_t4 --topology t4-1
    emollama train --config colab_t4

Clips are stored as EVA-ViT's tokens, so that training needs neither that encoder nor its memory. A step is 4 rows of
1024 tokens, about 12 clips.

Expected: 33,554,432 LoRA parameters and 41,439,232 of the projectors, 74,993,664 trained in all.
By compiler estimates (nothing has been measured) training takes 9.01 of 13.11 GiB, 6.5 of them for the frozen weights,
and at least 2.6 s a step.
"""

import dataclasses

from emollama_jax.config import Config, DataConfig, MeshConfig, load_config


def get_config() -> Config:
    stage2 = load_config("stage2_merr")
    half = {"compute_dtype": "float16"}
    encoders = {
        name: dataclasses.replace(getattr(stage2, name), **half) for name in ("eva_vit", "mae", "videomae", "hubert")
    }
    return dataclasses.replace(
        stage2,
        **encoders,
        mesh=MeshConfig(fsdp=1),
        llama=dataclasses.replace(stage2.llama, kernel_dtype="int8", **half),
        data=DataConfig(
            train=("data/clips/image_tokens/1.0.0:train",),
            sequence_length=1024,
            clips_per_row=3,
            batch_rows=4,
        ),
        prompt=dataclasses.replace(stage2.prompt, tasks=("emotion", "reason_v2")),
        weights=dataclasses.replace(stage2.weights, trained="weights/Emotion_LLaMA.pth"),
        train=dataclasses.replace(
            stage2.train,
            workdir="runs/finetune",
            steps=200,
            warmup_steps=20,
            warmup_from=1e-6,
            learning_rate=2e-5,
            final_rate=2e-6,
            grad_accum_steps=4,
            loss_scale=4096.0,
            non_finite="skip",
            log_interval=1,
            checkpoint_interval=25,
        ),
    )
