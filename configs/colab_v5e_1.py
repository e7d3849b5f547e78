"""Own clips on one TPU v5e chip, as Colab has it, from Emotion-LLaMA's weights: int8 base, bfloat16 compute.

    emollama extract --config colab_v5e_1 clips --list clips.csv \\
        --videos clips --frame peak --image image_tokens --out data
    emollama plan --config colab_v5e_1 --topology v5e-1
    emollama train --config colab_v5e_1

It is `colab_t4` in the chip's own type.

Expected: 33,554,432 LoRA parameters and 41,439,232 of the projectors, 74,993,664 trained in all.
By compiler estimates (nothing has been measured) training takes 8.46 of 15.75 GiB, 6.5 of them for the frozen weights,
and 1.01 s a step, 4,060 tokens/s, 55 % MFU.
"""

import dataclasses

from emollama_jax.config import Config, load_config


def get_config() -> Config:
    t4, stage2 = load_config("colab_t4"), load_config("stage2_merr")
    encoders = {name: getattr(stage2, name) for name in ("eva_vit", "mae", "videomae", "hubert")}
    llama = dataclasses.replace(t4.llama, compute_dtype="bfloat16")
    train = dataclasses.replace(t4.train, loss_scale=1.0, non_finite="stop")
    return dataclasses.replace(t4, **encoders, llama=llama, train=train)
