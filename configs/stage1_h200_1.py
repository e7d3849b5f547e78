"""Stage 1 on one H200."""

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
