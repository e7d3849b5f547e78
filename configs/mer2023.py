"""Instruction tuning on the six labels of MER2023 (and MER2024), from stage 2.

    emollama params --config mer2023

Expected: the 74,993,664 trained parameters of stage 1.
"""

import dataclasses

from emollama_jax.config import Config, load_config
from emollama_jax.text.labels import MER2023
from emollama_jax.text.prompts import PromptConfig


def get_config() -> Config:
    return dataclasses.replace(load_config("stage1_merr"), prompt=PromptConfig(labels=MER2023, tasks=("emotion",)))
