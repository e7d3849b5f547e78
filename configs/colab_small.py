"""The small model of the notebooks in colab/: labels and captions of synthetic clips in one short stage.

    emollama params --config colab_small
    emollama train --config colab_small

It is `quickstart_stage2` from new adapters and projectors, in a third of the quickstart's steps.

Expected: 460,800 LoRA parameters and 537,408 of the projectors, 998,208 trained in all.
"""

import dataclasses

from emollama_jax.config import Config, GenerateConfig, load_config


def get_config() -> Config:
    stage2 = load_config("quickstart_stage2")
    return dataclasses.replace(
        stage2,
        weights=dataclasses.replace(stage2.weights, trained=""),
        data=dataclasses.replace(stage2.data, modality_dropout=0.1),
        generate=GenerateConfig(max_new_tokens=60),  # its captions are shorter
        train=dataclasses.replace(
            stage2.train,
            workdir="runs/small",
            steps=70,
            warmup_steps=8,
            warmup_from=2e-4,
            learning_rate=2e-3,
            final_rate=2e-4,
            log_interval=1,
            checkpoint_interval=20,
        ),
    )
