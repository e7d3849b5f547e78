"""Stage 1 on one chip of 16 GB: a TPU v5e, or a T4, which knows no bfloat16.

    emollama plan --config stage1_16gb --topology v5e-1
    emollama train --config stage1_16gb

    emollama plan --config stage1_16gb --topology t4-1 --config.llama.compute_dtype=float16 \\
        --config.eva_vit.compute_dtype=float16

`emollama plan --config stage1_merr --topology v5e-1 --search` chose it, and so did the same for t4-1.

Expected: by compiler estimates (nothing has been measured), v5e-1 takes 11.14 of 15.75 GiB, 8.4 of
them for the frozen weights (int8), and 9.6 s a step, 3,406 tokens/s, 58 % MFU. T4 takes 11.76 of 13.11 GiB and at
least 24.5 s a step.
"""

import dataclasses

from emollama_jax.config import Config, MeshConfig, load_config


def get_config() -> Config:
    stage1 = load_config("stage1_merr")
    return dataclasses.replace(
        stage1,
        mesh=MeshConfig(fsdp=1),
        llama=dataclasses.replace(stage1.llama, kernel_dtype="int8"),
        train=dataclasses.replace(stage1.train, grad_accum_steps=16),
    )
