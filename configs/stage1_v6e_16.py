"""Stage 1 on a TPU v6e slice of 16 chips.

    emollama plan --config stage1_v6e_16 --topology v6e-16
    emollama train --config stage1_v6e_16

Expected: by compiler estimates (nothing has been measured), 8.05 of 31.25 GiB a chip, 0.32 s a step,
104,034 tokens/s, 24 % MFU.
"""

import dataclasses

from emollama_jax.config import Config, MeshConfig, load_config


def get_config() -> Config:
    stage1 = load_config("stage1_merr")
    return dataclasses.replace(
        stage1,
        mesh=MeshConfig(fsdp=16),
        llama=dataclasses.replace(stage1.llama, remat="dots"),
    )
