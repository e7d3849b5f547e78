"""Stage 1 on one node of eight H100.

    emollama plan --config stage1_h100_8 --topology h100-8
    emollama train --config stage1_h100_8

`emollama plan --config stage1_merr --topology h100-8 --search` chose it, among equals the one of fewest parts.

Expected: by compiler estimates (nothing has been measured), 19.02 of 71.23 GiB a GPU, with XLA's
attention in place of cuDNN's, and 0.14 s a step, 227,153 tokens/s, were all its arithmetic at the peak: a ceiling.
"""

import dataclasses

from emollama_jax.config import Config, MeshConfig, load_config


def get_config() -> Config:
    stage1 = load_config("stage1_merr")
    return dataclasses.replace(
        stage1,
        mesh=MeshConfig(fsdp=8),
        llama=dataclasses.replace(stage1.llama, remat="dots"),
    )
