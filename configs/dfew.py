"""Instruction tuning on the seven labels of DFEW, from stage 2.

    emollama prepare dfew DFEW --fold 1 --out data
    emollama train --config dfew
    emollama params --config dfew

Expected: the 74,993,664 trained parameters of stage 1.
"""

import dataclasses

from emollama_jax.config import Config, load_config
from emollama_jax.text.labels import DFEW
from emollama_jax.text.prompts import PromptConfig


def get_config() -> Config:
    stage1 = load_config("stage1_merr")
    return dataclasses.replace(
        stage1,
        data=dataclasses.replace(
            stage1.data, train=("data/dfew/frame/1.0.0:train",), eval=("data/dfew/frame/1.0.0:test",)
        ),
        prompt=PromptConfig(labels=DFEW, tasks=("emotion",)),
        weights=dataclasses.replace(stage1.weights, trained="runs/stage2"),
        train=dataclasses.replace(stage1.train, workdir="runs/dfew"),
    )
