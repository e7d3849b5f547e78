"""Stage 1 on a TPU v6e slice of 16 chips.

    emollama plan --config stage1_v6e_16 --topology v6e-16
    emollama train --config stage1_v6e_16

Every chip holds the whole model, which is frozen but for 75 M parameters: nothing is gathered.

Expected: by compiler estimates (nothing has been measured), 21.87 of 31.25 GiB a chip, 0.16 s a step,
202,477 tokens/s, 46 % MFU; a stage takes 4 minutes, 1.1 chip-hours.
"""

import dataclasses

from emollama_jax.config import Config, MeshConfig, load_config


def get_config() -> Config:
    stage1 = load_config("stage1_merr")
    return dataclasses.replace(
        stage1,
        mesh=MeshConfig(data=16),
        llama=dataclasses.replace(stage1.llama, remat="dots"),
    )
