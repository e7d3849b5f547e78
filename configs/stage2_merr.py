"""Stage 2: fine captions of MERR, from stage 1.

    emollama train --config stage2_merr
    emollama params --config stage2_merr

The rate stays the same from the first step to the last, at what stage 1 begins with.

Expected: the 74,993,664 trained parameters of stage 1.
"""

import dataclasses

from emollama_jax.config import Config, load_config


def get_config() -> Config:
    stage1 = load_config("stage1_merr")
    return dataclasses.replace(
        stage1,
        data=dataclasses.replace(stage1.data, train=("data/merr/frame/1.0.0:fine",)),
        prompt=dataclasses.replace(stage1.prompt, tasks=("reason_v2",)),
        weights=dataclasses.replace(stage1.weights, trained="runs/stage1"),
        train=dataclasses.replace(stage1.train, workdir="runs/stage2", learning_rate=stage1.train.warmup_from),
    )
