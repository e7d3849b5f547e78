"""Instruction tuning on the six labels of MER2023 (and MER2024), from stage 2.

    emollama prepare mer2023 MER2023 --out data --frame peak
    emollama train --config mer2023
    emollama params --config mer2023

Expected: the 74,993,664 trained parameters of stage 1.
"""

import dataclasses

from emollama_jax.config import Config, load_config
from emollama_jax.text.labels import MER2023
from emollama_jax.text.prompts import PromptConfig


def get_config() -> Config:
    stage1 = load_config("stage1_merr")
    return dataclasses.replace(
        stage1,
        data=dataclasses.replace(
            stage1.data, train=("data/mer2023/frame/1.0.0:train",), eval=("data/mer2023/frame/1.0.0:test1",)
        ),
        prompt=PromptConfig(labels=MER2023, tasks=("emotion",)),
        weights=dataclasses.replace(stage1.weights, trained="runs/stage2"),
        train=dataclasses.replace(stage1.train, workdir="runs/mer2023"),
    )
