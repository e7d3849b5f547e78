"""Stage 2 that keeps what stage 1 learnt: labels among the fine captions of MERR, from stage 1.

    emollama train --config stage2_replay
    emollama params --config stage2_replay
    emollama evaluate forgetting runs/stage2_replay --data data/merr/frame/1.0.0:val --out results

A third of the questions asks for the label, the others for the caption, and every token counts alike: the mixture of
`quickstart_stage2`. What it keeps on synthetic clips, and what captions alone keep, is in docs/evaluation.md.

Expected: the 74,993,664 trained parameters of stage 1.
"""

import dataclasses

from emollama_jax.config import Config, load_config


def get_config() -> Config:
    stage2 = load_config("stage2_merr")
    return dataclasses.replace(
        stage2,
        prompt=dataclasses.replace(stage2.prompt, tasks=("emotion", "reason_v2"), task_weights=(1.0, 2.0)),
        train=dataclasses.replace(stage2.train, workdir="runs/stage2_replay", loss_average="token"),
    )
