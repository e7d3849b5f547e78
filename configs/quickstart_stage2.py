"""Stage 2 of `emollama quickstart`: labels and fine captions, from stage 1.

    emollama quickstart

Expected: the 998,208 trained parameters of stage 1.
"""

import dataclasses

from emollama_jax.config import Config, load_config


def get_config() -> Config:
    stage1 = load_config("quickstart_stage1")
    return dataclasses.replace(
        stage1,
        prompt=dataclasses.replace(stage1.prompt, tasks=("emotion", "reason_v2")),
        train=dataclasses.replace(
            stage1.train,
            init_from="runs/stage1",
            workdir="runs/stage2",
            steps=100,
            learning_rate=1e-3,
            warmup_from=1e-4,
            final_rate=1e-4,
        ),
    )
