"""Instruction tuning on the seven labels of DFEW, from stage 2.

    emollama params --config dfew

Expected: the 74,993,664 trained parameters of stage 1.
"""

import dataclasses

from emollama_jax.config import Config, load_config
from emollama_jax.text.labels import DFEW
from emollama_jax.text.prompts import PromptConfig


def get_config() -> Config:
    return dataclasses.replace(load_config("stage1_merr"), prompt=PromptConfig(labels=DFEW, tasks=("emotion",)))
