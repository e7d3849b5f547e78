"""Stage 2 of `emollama quickstart`: labels and fine captions, from stage 1.

    emollama quickstart
    emollama params --config quickstart_stage2

Captions are asked for twice as often as labels. A quarter of the clips comes without one or two of face, voice and
words, as in the evaluation of each alone. The rate is lower than in stage 1, so that what was learnt there stays.

Expected: the 998,208 trained parameters of stage 1.
"""

import dataclasses

from emollama_jax.config import Config, load_config


def get_config() -> Config:
    stage1 = load_config("quickstart_stage1")
    return dataclasses.replace(
        stage1,
        prompt=dataclasses.replace(stage1.prompt, tasks=("emotion", "reason_v2"), task_weights=(1.0, 2.0)),
        data=dataclasses.replace(stage1.data, modality_dropout=0.25),
        weights=dataclasses.replace(stage1.weights, trained="runs/stage1"),
        train=dataclasses.replace(
            stage1.train,
            workdir="runs/stage2",
            steps=125,
            learning_rate=1e-3,
            warmup_from=1e-4,
            final_rate=1e-4,
        ),
    )
