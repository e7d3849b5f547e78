"""Stage 1 on one H200.

    emollama plan --config stage1_h200_1 --topology h200-1
    emollama train --config stage1_h200_1
    emollama bench all --config stage1_h200_1 --out h200

The last measures the machine: training steps, decoding and the frame's encoder, in ten minutes.

Expected: by compiler estimates (nothing has been measured), 81.40 of 118.18 GiB, with XLA's
attention in place of cuDNN's, and 1.15 s a step, 28,394 tokens/s, were all its arithmetic at the peak: a ceiling. The
goal is 60 % of the peak at 4 operations a weight and token, 22,340 tokens/s, without the frame's encoder.
"""

import dataclasses

from emollama_jax.config import Config, MeshConfig, load_config


def get_config() -> Config:
    stage1 = load_config("stage1_merr")
    return dataclasses.replace(
        stage1,
        mesh=MeshConfig(fsdp=1),
        llama=dataclasses.replace(stage1.llama, remat="dots"),
        train=dataclasses.replace(stage1.train, grad_accum_steps=2),
    )
