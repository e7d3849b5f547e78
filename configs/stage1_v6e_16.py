"""Stage 1 on a TPU v6e slice of 16 chips.

    emollama plan --config stage1_v6e_16 --topology v6e-16
    emollama train --config stage1_v6e_16

`emollama plan --config stage1_merr --topology v6e-16 --search` chose it.

Expected: by compiler estimates (nothing has been measured), 16.02 of 31.25 GiB a chip, 0.30 s a step,
110,350 tokens/s, 25 % MFU.
"""

import dataclasses

from emollama_jax.config import Config, MeshConfig, load_config


def get_config() -> Config:
    stage1 = load_config("stage1_merr")
    return dataclasses.replace(
        stage1,
        mesh=MeshConfig(fsdp=16),
        llama=dataclasses.replace(stage1.llama, remat="none"),
    )
